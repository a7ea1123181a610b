"""Activations of few bits: a layer's input behind a fake quantiser, whose range is calibrated, followed, then fixed.

A quantised layer is an ordinary module: its class says that the input is quantised, its range is a tensor of the state.
So it is copied, saved, loaded, parametrised and exported like any other; no hooks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.evaluate import call, evaluating
from stillhouse.students.attention import HeadAttention, resize_heads, torch_attention
from stillhouse.students.edits import module_at
from stillhouse.students.projectors import EPS, straight_through
from stillhouse.system import Clock

Mode = Literal["quantise", "follow", "measure"]


class FakeQuantize(nn.Module):
    """x ↦ s · clip(round(x/s), ±q), q = 2^{b−1}−1, s = limit/q; ∂/∂x = 1 where |x| <= limit, else 0.

    One range for the whole tensor, symmetric, so that zero stays zero; not learned. In the mode ``follow`` it notes in
    training what it sees, for `follow_ranges`; in ``measure`` it notes that and lets x through.

    Args:
        bits: b, 2 to 8. percentile: of |x| that is noted as a batch's range; 100 is its maximum.

    Example:
        >>> four = FakeQuantize(4)
        >>> four.limit.fill_(7.0)
        tensor(7.)
        >>> four(torch.tensor([-9.0, 0.4, 2.6]))
        tensor([-7.,  0.,  3.])
    """

    limit: Tensor

    def __init__(self, bits: int, percentile: float = 100.0):
        super().__init__()
        if not 2 <= bits <= 8 or not 0 < percentile <= 100:
            raise UserError(f"activations need 2 to 8 bits and a percentile in (0, 100], got {bits}, {percentile}")
        self.bits, self.percentile = bits, percentile
        self.mode: Mode = "quantise"
        self.seen: Tensor | None = None  # since it was last asked; not part of the state
        self.register_buffer("limit", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.mode == "measure" or (self.mode == "follow" and self.training):
            self.note(x.detach())
        if self.mode == "measure":
            return x
        most = 2 ** (self.bits - 1) - 1
        limit = self.limit.to(x.dtype)
        scale = torch.where(limit < EPS, torch.ones_like(limit), limit) / most
        values = torch.round(x.detach() / scale).clamp(-most, most) * scale
        if not (torch.is_grad_enabled() and x.requires_grad):
            return values
        return straight_through(x, values, x.detach().abs() <= limit)

    def note(self, x: Tensor) -> None:
        sizes = x.abs().flatten().float()
        if self.percentile < 100:
            found = sizes.kthvalue(max(1, round(self.percentile / 100 * len(sizes)))).values
        else:
            found = sizes.amax()
        self.seen = found if self.seen is None else torch.maximum(self.seen, found)


class QuantizedLinear(nn.Linear):
    """A linear layer whose input is quantised."""

    inputs: FakeQuantize

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.inputs(x))


class QuantizedConv2d(nn.Conv2d):
    """A convolution whose input is quantised."""

    inputs: FakeQuantize

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.inputs(x))


class QuantizedAttention(HeadAttention):
    """An attention whose input is quantised; its output projection is a layer of its own."""

    inputs: FakeQuantize

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        made = {id(x): self.inputs(x) for x in (query, key, value)}
        return super()._project(*(made[id(x)] for x in (query, key, value)))


STANDS_FOR: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: QuantizedLinear, nn.Conv2d: QuantizedConv2d, HeadAttention: QuantizedAttention,
}  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """A plan's edit: the input of a layer is quantised.

    Attributes:
        module: path of a linear layer, a convolution or an nn.MultiheadAttention with one packed weight.
        bits: of a value.
        percentile: see `FakeQuantize`; for training further.
    """

    kind: ClassVar[str] = "inputs"
    module: str
    bits: int
    percentile: float = 100.0

    def apply(self, model: nn.Module) -> nn.Module:
        """In place, on the layer's own tensors; nn.MultiheadAttention gives way to a `HeadAttention` first."""
        layer = module_at(model, self.module, (nn.Linear, nn.Conv2d, nn.MultiheadAttention), "given quantised inputs")
        if type(layer) is nn.MultiheadAttention and torch_attention(layer):
            model = resize_heads(model, self.module, layer.num_heads)
            layer = model.get_submodule(self.module)
        own = type(layer).forward
        for plain, quantized in STANDS_FOR.items():
            if isinstance(layer, plain) and own in (plain.forward, quantized.forward):
                layer.__class__ = quantized
                layer.inputs = FakeQuantize(self.bits, self.percentile).to(next(layer.parameters()).device)
                return model
        raise UserError(f"{self.module}: the input of a {type(layer).__name__} with its own forward is not quantised")

    def facts(self) -> dict[str, Any]:
        return {"module": self.module, "bits": self.bits, "percentile": self.percentile}


def fake_quantizers(model: nn.Module) -> Iterator[tuple[str, FakeQuantize]]:
    """(path of the layer, its quantiser) of every quantised input."""
    for path, module in model.named_modules():
        if isinstance(module, FakeQuantize):
            yield path.rpartition(".")[0], module


def set_mode(model: nn.Module, mode: Mode) -> None:
    """Gives all quantisers of inputs a mode, and lets them forget what they have seen."""
    for _, quantizer in fake_quantizers(model):
        quantizer.mode, quantizer.seen = mode, None


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Any], momentum: float = 0.9) -> None:
    """Sets every range: limit ← the first batch's, then momentum · limit + (1 − momentum) · this batch's.

    The network runs in eval mode with its inputs as they are.

    Args:
        model: with quantised inputs. batches: what it is called with. momentum: 0 keeps the last batch's.

    Raises:
        UserError: no batch, or a quantised layer that the network does not call.
    """
    set_mode(model, "measure")
    with evaluating(model):
        for x in batches:
            call(model, x)
            silent = [path for path, q in fake_quantizers(model) if q.seen is None]
            if silent:
                raise UserError(f"{silent[0]}: its input cannot be quantised, the network does not call it; exclude it")
            follow_ranges(model, Clock(), momentum)
    if unset := [path for path, q in fake_quantizers(model) if not bool(q.limit > 0)]:
        raise UserError(f"{unset[0]}: calibration saw nothing but zeros at its input; give other samples")
    set_mode(model, "quantise")


@torch.no_grad()
def follow_ranges(model: nn.Module, clock: Clock, momentum: float = 0.9) -> None:
    """limit ← momentum · limit + (1 − momentum) · seen, `seen` the largest of all processes; forgets it.

    Call it after a step, in all processes. A range that is 0 becomes what was seen.
    """
    found = [(q, q.seen) for _, q in fake_quantizers(model) if q.seen is not None]
    if not found:
        return
    seen = clock.all_rows(torch.stack([s for _, s in found])[None]).amax(0)
    for (quantizer, _), now in zip(found, seen, strict=True):
        limit = quantizer.limit
        limit.copy_(torch.where(limit == 0, now.to(limit), momentum * limit + (1 - momentum) * now.to(limit)))
        quantizer.seen = None
