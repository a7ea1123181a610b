"""A small recurrent sequence-to-sequence model with attention, called as those of transformers are."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn


class GRUSeq2Seq(nn.Module):
    """Bidirectional GRU encoder, GRU decoder, attention over the encoder's states (Luong et al. 2015).

    m_s = [→h_s; ←h_s],  d_t = GRU(d_{t−1}, E[y_{t−1}]),  a_t = softmax_s(d_t·W m_s),
    logits_t = O tanh(V[Σ_s a_ts m_s; d_t]).

    Args:
        vocabulary: number of tokens.
        width: of the embeddings, of both encoder directions together and of the decoder; even.
        patch: > 0 reads a sequence of vectors of this size before the tokens (``patches``).
        dropout: on the embeddings and before the output layer.
        start, pad, eos: ids.

    Example:
        >>> model = GRUSeq2Seq(10, width=8)
        >>> ids = torch.tensor([[3, 4, 1]])
        >>> model(ids, torch.ones_like(ids), torch.tensor([[0, 5]])).shape
        torch.Size([1, 2, 10])
    """

    def __init__(
        self,
        vocabulary: int,
        width: int = 96,
        patch: int = 0,
        dropout: float = 0.0,
        start: int = 0,
        pad: int = 0,
        eos: int = 1,
    ):
        super().__init__()
        self.config = SimpleNamespace(
            decoder_start_token_id=start, pad_token_id=pad, eos_token_id=eos, vocab_size=vocabulary, model_type="gru"
        )
        self.embed = nn.Embedding(vocabulary, width)
        self.patch = nn.Linear(patch, width) if patch else None
        self.drop = nn.Dropout(dropout)
        self.forth = nn.GRU(width, width // 2, batch_first=True)
        self.back = nn.GRU(width, width // 2, batch_first=True)
        self.bridge = nn.Linear(width, width)
        self.decoder = nn.GRU(width, width, batch_first=True)
        self.attend = nn.Linear(width, width, bias=False)
        self.combine = nn.Linear(2 * width, width)
        self.out = nn.Linear(width, vocabulary)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor, patches: Tensor | None = None
    ) -> Tensor:
        """Logits (n, t, C) for ids (n, s), their mask, the decoder's input (n, t) and patches (n, k, patch)."""
        memory, mask, state = self.encode(input_ids, attention_mask, patches)
        return self.decode(memory, mask, state, decoder_input_ids)[0]

    def encode(
        self, input_ids: Tensor, attention_mask: Tensor, patches: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """States (n, s, width), which of them are real (n, s), and the decoder's first state (1, n, width)."""
        x, mask = self.embed(input_ids), attention_mask.bool()
        if self.patch is not None and patches is not None:
            seen = self.patch(patches.to(x.dtype))
            x = torch.cat([seen, x], 1)
            mask = torch.cat([mask.new_ones(seen.shape[:2]), mask], 1)
        x, lengths = self.drop(x), mask.sum(1, keepdim=True).clamp(min=1)
        # Padding stands behind the text, so the way forth never sees it before the end; the way back reads each text
        # reversed within its length. No packing, whose sizes are data and cannot be exported.
        steps = torch.arange(x.shape[1], device=x.device)[None]
        reverse = torch.where(steps < lengths, lengths - 1 - steps, steps)[..., None]
        forth = self.forth(x)[0]
        back = self.back(x.gather(1, reverse.expand(-1, -1, x.shape[2])))[0]
        at_end = (lengths - 1)[..., None].expand(-1, -1, forth.shape[2])
        last = torch.cat([forth.gather(1, at_end), back.gather(1, at_end)], 2)
        memory = torch.cat([forth, back.gather(1, reverse.expand(-1, -1, back.shape[2]))], 2)
        return memory, mask, torch.tanh(self.bridge(last)).transpose(0, 1)

    def decode(self, memory: Tensor, mask: Tensor, state: Tensor, fed: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (n, t, C) after each of the tokens `fed` (n, t), and the state behind the last."""
        d, state = self.decoder(self.drop(self.embed(fed)), state.contiguous())
        scores = d @ self.attend(memory).transpose(1, 2)
        scores = scores.masked_fill(~mask[:, None], torch.finfo(scores.dtype).min)
        context = scores.softmax(-1) @ memory
        return self.out(self.drop(torch.tanh(self.combine(torch.cat([context, d], 2))))), state

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int, patches: Tensor | None = None
    ) -> Tensor:
        """Greedy decoding: (n, ≤ max_new_tokens) ids without the start token; padded behind the end token."""
        memory, mask, state = self.encode(input_ids, attention_mask, patches)
        ids = torch.full_like(input_ids[:, :1], self.config.decoder_start_token_id)
        done = torch.zeros_like(ids, dtype=torch.bool)
        said = []
        for _ in range(max_new_tokens):
            logits, state = self.decode(memory, mask, state, ids)
            ids = logits[:, -1:].argmax(-1).masked_fill(done, self.config.pad_token_id)
            said.append(ids)
            done = done | (ids == self.config.eos_token_id)
            if bool(done.all()):
                break
        return torch.cat(said, 1) if said else ids[:, :0]
