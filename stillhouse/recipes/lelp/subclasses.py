"""Sub-classes in a teacher's embedding: directions per class, found once, and the targets over C·S outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.evaluate import logits_of
from stillhouse.export import read_tensors, save_tensors
from stillhouse.system import Batch, Signals, fold, map_tensors
from stillhouse.taps import head
from stillhouse.teachers import Frozen, state_fingerprint

FILES = ("subclasses.safetensors", "subclasses.json")


@dataclass(frozen=True)
class Subclasses:
    """Directions that part the samples of each class; all float64.

    Attributes:
        basis: U, (d, r), orthonormal: what the head reads; nothing where it is not projected out.
        mean: μ_c of the projected embeddings, (C, d).
        directions: v_{c,k}, (C, S, d), after the rotation; rows are orthonormal but for classes of too low a rank.
        sigma: σ_c, (C,): mean over k of the standard deviation of class c along v_{c,k}; 1 where there is none.
        sizes: inputs of each class, (C,).
        before, after: variance of class c along each principal direction and along each rotated one, (C, S).
        total: variance of class c in all directions that were left, (C,).
    """

    basis: Tensor
    mean: Tensor
    directions: Tensor
    sigma: Tensor
    sizes: Tensor
    before: Tensor
    after: Tensor
    total: Tensor

    def scores(self, h: Tensor) -> Tensor:
        """a_{c,k} = ⟨v_{c,k}, h̃ − μ_c⟩ / σ_c with h̃ = h − U Uᵀ h, of embeddings (n, d) for every class: (n, C, S)."""
        left = project_out(h.double(), self.basis)
        along = torch.einsum("nd,ckd->nck", left, self.directions)
        return (along - torch.einsum("cd,ckd->ck", self.mean, self.directions)) / self.sigma[:, None]

    def targets(self, h: Tensor, logits: Tensor, temperature: float = 1.0, beta: float = 0.5) -> Tensor:
        """log q_{c,k} = log softmax(z/T)_c + log softmax_k(a_{c,·}/β), (n, C·S); Σ_k q_{c,k} = softmax(z/T)_c."""
        log_p = (logits.double() / temperature).log_softmax(-1)
        log_r = (self.scores(h) / beta).log_softmax(-1)
        return (log_p[:, :, None] + log_r).flatten(1)

    def notes(self, classes: tuple[str, ...]) -> list[str]:
        """What was found, a line per class."""
        made = []
        for c, name in enumerate(classes):
            kept = float(self.before[c].sum() / self.total[c]) if self.total[c] > 0 else 0.0
            said = f"{name}: {int(self.sizes[c])} inputs, its {self.before.shape[1]} directions hold {kept:.0%} of the "
            made.append(
                said + f"variance that is left; variances {spread(self.before[c])}, rotated {spread(self.after[c])}"
            )
        return made

    def save(self, folder: str | Path, facts: dict[str, Any]) -> None:
        save_tensors(folder, {f.name: getattr(self, f.name) for f in fields(self)}, facts, FILES)

    @classmethod
    def load(cls, folder: str | Path) -> tuple[Subclasses, dict[str, Any]]:
        tensors, facts = read_tensors(Path(folder), FILES)
        return cls(**tensors), facts


def project_out(h: Tensor, basis: Tensor) -> Tensor:
    """h̃ = h − U Uᵀ h of rows h (n, d), for U (d, r) with orthonormal columns."""
    return h - h @ basis @ basis.T


def head_basis(weight: Tensor) -> Tensor:
    """U (d, r): an orthonormal basis of what a head with this weight, (C, d) or (1, d), can see of an embedding."""
    u, s, _ = torch.linalg.svd(weight.detach().double().cpu().T, full_matrices=False)
    return u[:, s > 1e-8 * s.max()]


def orthogonal(size: int, seed: int) -> Tensor:
    """A random orthogonal matrix, evenly distributed: QR of a Gaussian one, with the signs of R's diagonal."""
    g = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(size, size, generator=g, dtype=torch.float64))
    return q * r.diagonal().sign()


def find_subclasses(
    h: Tensor, groups: Tensor, classes: int, subclasses: int, *, weight: Tensor | None = None, rotate: bool = True,
    seed: int = 0,
) -> Subclasses:  # fmt: skip
    """Principal directions of each class in an embedding, rotated at random.

    Per class c, of the rows h̃ with ``groups == c``: mean μ_c, the S directions of largest variance V_c, then
    V_c ← R_c V_c with a random orthogonal R_c, so that no direction has much more variance than another. Where a class
    has fewer than S directions of variance, zeros fill up before the rotation.

    Args:
        h: embeddings (N, d).
        groups: class of each, (N,); negative ones are left out.
        classes, subclasses: C and S.
        weight: of the head, (C, d) or (1, d): what it can see is projected out first. None keeps everything.
        rotate: with R_c.
        seed: of R_c.

    Raises:
        UserError: shapes that do not fit, more sub-classes than directions.

    Example:
        >>> h = torch.tensor([[0.0, 3.0], [0.0, -3.0], [1.0, 1.0], [1.0, -1.0]])
        >>> found = find_subclasses(h, torch.tensor([0, 0, 1, 1]), 2, 1, rotate=False)
        >>> found.directions[:, 0].tolist(), found.sigma.tolist()
        ([[0.0, 1.0], [0.0, 1.0]], [3.0, 1.0])
    """
    if h.dim() != 2 or groups.shape != h.shape[:1] or not 1 <= subclasses <= h.shape[1]:
        raise UserError(
            f"sub-classes: expected embeddings (N, d) with d >= {subclasses} and N classes, got {tuple(h.shape)} and "
            f"{tuple(groups.shape)}; give fewer --subclasses, or a teacher with a wider embedding"
        )
    h, d, s = h.detach().double().cpu(), h.shape[1], subclasses
    basis = h.new_zeros(d, 0) if weight is None else head_basis(weight)
    left = project_out(h, basis)
    mean, found = h.new_zeros(classes, d), h.new_zeros(classes, s, d)
    sigma, sizes = h.new_ones(classes), h.new_zeros(classes)
    before, after, total = h.new_zeros(classes, s), h.new_zeros(classes, s), h.new_zeros(classes)
    for c in range(classes):
        mine = left[groups.cpu() == c]
        sizes[c] = len(mine)
        if len(mine) < 2:
            continue  # no direction: every sub-class is as likely, r = 1/S
        mean[c] = mine.mean(0)
        centred = mine - mean[c]
        variance, vectors = torch.linalg.eigh(centred.T @ centred / len(mine))
        variance, vectors = variance.flip(0).clamp(min=0), vectors.T.flip(0)
        rank = min(s, int((variance > 1e-12 * variance[0]).sum()))
        first = vectors[:rank]
        sign = first.gather(1, first.abs().argmax(1, keepdim=True)).sign()  # an eigenvector has no sign of its own
        found[c, :rank] = first * sign
        before[c], total[c] = variance[:s], variance.sum()
        if rotate:
            found[c] = orthogonal(s, fold(seed, "rotation", c)) @ found[c]
        after[c] = (centred @ found[c].T).var(0, correction=0)
        spread = after[c].sqrt().mean()
        sigma[c] = spread if spread > 0 else 1.0
    return Subclasses(basis, mean, found, sigma, sizes, before, after, total)


def head_of(model: nn.Module, inputs: Any, classes: int) -> tuple[str, int]:
    """Path of a teacher's head and its number of logits: C, or 1 for two classes.

    Raises:
        UserError: no linear head, another number of logits.
    """
    at = head(model, inputs)
    outputs = int(model.get_submodule(at).out_features)  # type: ignore[arg-type]
    if outputs != classes and (outputs, classes) != (1, 2):
        raise UserError(f"the teacher gives {outputs} logits, but the data have {classes} classes")
    return at, outputs


class SubclassTeacher:
    """A teacher whose ``logits`` are log q over C·S sub-classes; what it says of the classes is ``classes``, (n, C).

    Args:
        model: a classifier that ends in an `nn.Linear`, with C logits, or with one for two classes.
        at: path of that layer (`head_of`).
        options: of `Frozen`: input, normalize, resize.
    """

    def __init__(self, model: nn.Module, at: str, **options: Any):
        self._path = f"{at}:in"
        self._frozen = Frozen(model, taps=[self._path], **options)
        self.weight: Tensor = model.get_submodule(at).weight.detach()  # type: ignore[operator]
        self.subclasses: Subclasses | None = None
        self.temperature, self.beta = 1.0, 0.5

    @property
    def network(self) -> str:
        """Fingerprint of the network alone."""
        return self._frozen.fingerprint

    def embed(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Embeddings at the head's input (n, d), and class logits (n, C); one logit z of two classes is (0, z)."""
        said = self._frozen(batch)
        h, z = said[self._path], said["logits"]
        if h.dim() != 2:
            raise UserError(f"the teacher's head reads {tuple(h.shape)}; an embedding (n, d) per sample is needed")
        return h, torch.cat([torch.zeros_like(z), z], -1) if z.shape[1] == 1 else z

    def use(self, subclasses: Subclasses, temperature: float, beta: float) -> SubclassTeacher:
        """This teacher, with what it is to say."""
        self.subclasses, self.temperature, self.beta = subclasses, temperature, beta
        return self

    @property
    def fingerprint(self) -> str:
        held = nn.ParameterDict({f.name: nn.Parameter(getattr(self.subclasses, f.name)) for f in fields(Subclasses)})
        return f"{fold(self.network, state_fingerprint(held), self.temperature, self.beta):016x}"

    def unchanged(self) -> bool:
        return self._frozen.unchanged()

    def __call__(self, batch: Batch) -> Signals:
        h, z = self.embed(batch)
        assert self.subclasses is not None, "use() comes first"
        log_q = self.subclasses.targets(h.cpu(), z.cpu(), self.temperature, self.beta)  # float64, which not all GPUs do
        return Signals(logits=log_q.to(z.device, z.dtype), classes=z)


class TwoLogits(nn.Module):
    """A classifier with one logit z for two classes as one with two, (0, z): what reports and baselines read."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        z = logits_of(self.model(*args, **kwargs))
        return torch.cat([torch.zeros_like(z), z], -1)


def spread(variance: Tensor) -> str:
    """The least and the largest of some variances."""
    return f"{float(variance.min()):.3g} to {float(variance.max()):.3g}"


def information(log_q: Tensor, classes: int) -> tuple[float, float]:
    """Bits of a target beyond its class: mean H(p), and what sub-classes add, H(mean r) − mean H(r) in their class.

    Args:
        log_q: (n, C·S).
        classes: C.

    Returns:
        Softness of the classes in 0 … log₂ C, and information of the sub-classes in 0 … log₂ S, weighted by class.

    Example:
        >>> [round(b, 3) for b in information(torch.tensor([[0.0, -99, -99, -99], [-99, 0.0, -99, -99]]), 2)]
        [0.0, 1.0]
    """
    log_q = log_q.double().unflatten(-1, (classes, -1))
    log_p = log_q.logsumexp(-1)
    softness = torch.special.entr(log_p.exp()).sum(-1).mean()
    added, r = log_p.new_zeros(()), (log_q - log_p.unsqueeze(-1)).exp()
    for c in range(classes):
        mine = r[log_p.argmax(-1) == c, c]
        if len(mine):
            each = torch.special.entr(mine).sum(-1).mean()
            added += len(mine) / len(r) * (torch.special.entr(mine.mean(0)).sum() - each)
    return float(softness) / math.log(2), max(0.0, float(added)) / math.log(2)


def answers(teacher: SubclassTeacher, samples: Any, ids: Any, device: Any, size: int = 256) -> tuple[Tensor, ...]:
    """Embeddings (n, d), class logits (n, C) and labels (n,) of these samples, un-augmented, on the CPU."""
    found = []
    for start in range(0, len(ids), size):
        batch = samples.take(ids[start : start + size], view=None)
        h, z = teacher.embed(map_tensors(batch, lambda t: t.to(device)))
        found.append((h.cpu(), z.cpu(), batch["label"]))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))
