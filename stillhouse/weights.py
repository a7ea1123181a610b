"""Weights that change: schedules over the clock, learning rates by module, and weights on the simplex."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError, did_you_mean
from stillhouse.system import Clock, Schedule
from stillhouse.taps import tap

# -- schedules: multipliers as functions of the clock


def constant(value: float = 1.0) -> Schedule:
    """The same factor at every step."""
    return lambda clock: value


def linear_warmup(steps: int) -> Schedule:
    """min(1, (step + 1) / steps): the first step already moves, step ``steps − 1`` has the full factor.

    Example:
        >>> [linear_warmup(4)(Clock(step=s)) for s in (0, 3, 9)]
        [0.25, 1.0, 1.0]
    """
    return lambda clock: min(1.0, (clock.step + 1) / max(1, steps))


def cosine(warmup_steps: int = 0, final: float = 0.0) -> Schedule:
    """final + (1 − final)·(1 + cos πt)/2, t = (step − warmup)/(steps − warmup), after a linear warm-up.

    Starts at 1; `final` is the limit at the end of the stage, one step after its last (arXiv 1608.03983).

    Example:
        >>> [round(cosine()(Clock(step=s, steps=4)), 3) for s in (0, 2, 4)]
        [1.0, 0.5, 0.0]
    """
    warm = linear_warmup(warmup_steps)

    def factor(clock: Clock) -> float:
        if clock.step < warmup_steps:
            return warm(clock)
        t = min(1.0, (clock.step - warmup_steps) / max(1, clock.steps - warmup_steps))
        return final + (1 - final) * (1 + math.cos(math.pi * t)) / 2

    return factor


def step(milestones: Sequence[float], gamma: float = 0.1) -> Schedule:
    """gamma^(number of milestones passed).

    Args:
        milestones: all in (0, 1): fractions of the stage; all >= 1: epochs.
        gamma: factor at each.

    Raises:
        UserError: milestones that are neither, or mixed.

    Example:
        >>> at = step([0.5, 0.75])
        >>> [round(at(Clock(step=s, steps=4)), 3) for s in (1, 2, 3)]
        [1.0, 0.1, 0.01]
    """
    fractions = all(0 < m < 1 for m in milestones)
    if not fractions and not all(m >= 1 for m in milestones):
        raise UserError(f"step: milestones must all be fractions in (0, 1) or all epochs >= 1, got {list(milestones)}")

    def factor(clock: Clock) -> float:
        now = clock.progress if fractions else clock.step / max(1, clock.steps_per_epoch)
        return gamma ** sum(now >= m for m in milestones)

    return factor


def sigmoid_ramp(epochs: float = 80) -> Schedule:
    """exp(−5 (1 − min(t, L)/L)²), t in (fractional) EPOCHS, L = `epochs`: from e⁻⁵ to 1 (arXiv 1610.02242).

    Example:
        >>> [round(sigmoid_ramp(80)(Clock(step=s, steps_per_epoch=10)), 4) for s in (0, 800)]
        [0.0067, 1.0]
    """
    if epochs <= 0:
        raise UserError(f"sigmoid_ramp: epochs must be > 0, got {epochs}; use constant() for no ramp")

    def factor(clock: Clock) -> float:
        t = clock.step / max(1, clock.steps_per_epoch)
        return math.exp(-5 * (1 - min(t, epochs) / epochs) ** 2)

    return factor


def warm_decay(decay: float = 0.999) -> Schedule:
    """min(1 − 1/(t + 1), decay), t = step + 1: the decay of an EMA that forgets where it began (arXiv 1703.01780).

    Give it to `stillhouse.teachers.EMA`, updated after the step: the first update is the mean of both.

    Example:
        >>> [round(warm_decay(0.999)(Clock(step=s)), 4) for s in (0, 1, 4999)]
        [0.5, 0.6667, 0.999]
    """
    if not 0 <= decay <= 1:
        raise UserError(f"warm_decay: decay must lie in [0, 1], got {decay}")
    return lambda clock: min(1 - 1 / (clock.step + 2), decay)


# -- learning rates by module


def by_module(
    model: nn.Module, factors: Mapping[str, float], optimizer: Callable[[Any], torch.optim.Optimizer]
) -> Callable[[Sequence[Tensor]], torch.optim.Optimizer]:
    """`optimizer` with the learning rate of some modules' parameters multiplied; the rest keeps it.

    Args:
        model: whose modules `factors` names. factors: module path → factor; a deeper path goes before the one above it.
        optimizer: builds the optimiser from parameters or parameter groups, with its ``lr``.

    Raises:
        UserError: a path that the model does not have.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> made = by_module(net, {"0": 0.1}, partial(torch.optim.SGD, lr=1.0))(list(net.parameters()))
        >>> [(len(g["params"]), g["lr"]) for g in made.param_groups]
        [(2, 0.1), (2, 1.0)]
    """
    with tap(model, list(factors)):
        pass  # an unknown path is said here
    at: dict[int, float] = {}
    for path in sorted(factors, key=lambda p: p.count(".")):
        at |= {id(p): factors[path] for p in model.get_submodule(path).parameters()}

    def build(params: Sequence[Tensor]) -> torch.optim.Optimizer:
        if not factors:
            return optimizer(params)
        groups = {f: [p for p in params if at.get(id(p), 1.0) == f] for f in dict.fromkeys([*factors.values(), 1.0])}
        made = optimizer([{"params": ps} for ps in groups.values() if ps])
        for group, f in zip(made.param_groups, (f for f, ps in groups.items() if ps), strict=True):
            group["lr"] *= f
        return made

    return build


def by_layer(
    model: nn.Module,
    blocks: str,
    decay: float,
    optimizer: Callable[[Any], torch.optim.Optimizer],
    fresh: Sequence[str] = (),
) -> Callable[[Sequence[Tensor]], torch.optim.Optimizer]:
    """`optimizer` with decay^(L − l) times its learning rate for block l of L, counted from 0 (arXiv 2106.08254).

    What is registered before the blocks (embeddings) has decay^(L + 1), what comes after them (norm, head) the whole
    rate. Weight decay is for the weights of layers alone: biases, norms, tokens and positions have none.

    Args:
        model: whose parameters are moved. blocks: path of its list of blocks.
        decay: 1 leaves the learning rates alone. optimizer: as for `by_module`.
        fresh: names of parameters that are learned anew and have the whole rate wherever they stand.

    Raises:
        UserError: a path or a name that the model does not have.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2))
        >>> made = by_layer(net, "1", 0.5, partial(torch.optim.AdamW, lr=1.0))(list(net.parameters()))
        >>> [(g["lr"], g["weight_decay"]) for g in made.param_groups][::2]
        [(0.125, 0.01), (0.25, 0.01), (0.5, 0.01), (1.0, 0.01)]
    """
    with tap(model, blocks):
        pass  # an unknown path is said here
    names = [name for name, _ in model.named_parameters()]
    if missing := [name for name in fresh if name not in names]:
        raise UserError(f"{type(model).__name__} has no parameter {missing[0]!r}; {did_you_mean(missing[0], names)}")
    count = len(list(model.get_submodule(blocks).children()))
    at: dict[int, tuple[float, bool]] = {}  # of each parameter: its factor, and whether its weights decay
    inside = False
    for name, p in model.named_parameters():
        here = name.startswith(f"{blocks}.")
        inside = inside or here
        layer = int(name.removeprefix(f"{blocks}.").split(".")[0]) if here else count if inside else -1
        factor = 1.0 if name in fresh else decay ** (count - layer)
        at[id(p)] = (factor, p.dim() > 1 and name.endswith("weight"))

    def build(params: Sequence[Tensor]) -> torch.optim.Optimizer:
        groups: dict[tuple[float, bool], list[Tensor]] = {}
        for p in params:
            groups.setdefault(at.get(id(p), (1.0, p.dim() > 1)), []).append(p)
        made = optimizer(
            [{"params": ps} if decays else {"params": ps, "weight_decay": 0.0} for (_, decays), ps in groups.items()]
        )
        for group, (factor, _) in zip(made.param_groups, groups, strict=True):
            group["lr"] *= factor
        return made

    return build


def optimal_mix(u: Tensor, v: Tensor, target: Tensor) -> float:
    """The a for which a·u + (1−a)·v comes closest to `target`: ⟨u − v, y − v⟩ / ‖u − v‖².

    It may lie outside [0, 1], which goes beyond u or v; clip it where that is not wanted. 1 where u and v are equal.

    Args:
        u, v, target: of one shape, such as predictions (n, q) of two models on held-out samples and their targets.

    Source: least squares; Borup & Andersen 2021 (arXiv 2102.13088) choose label weights by it.

    Example:
        >>> optimal_mix(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 0.0]), torch.tensor([1.0, 9.0]))
        0.5
    """
    if not u.shape == v.shape == target.shape:
        raise UserError(
            f"optimal_mix: shapes differ: {tuple(u.shape)}, {tuple(v.shape)} and target {tuple(target.shape)}"
        )
    between, wanted = (u - v).double(), (target - v).double()
    size = float((between * between).sum())
    return float((between * wanted).sum()) / size if size > 0 else 1.0


# -- the simplex


def simplex(m: int, dtype: torch.dtype | None = None) -> nn.Parameter:
    """A parameter of m equal weights 1/m, to be moved by `MirrorDescent` and by no other optimiser.

    Example:
        >>> simplex(4).data
        tensor([0.2500, 0.2500, 0.2500, 0.2500])
    """
    if m < 1:
        raise UserError(f"simplex: needs at least one weight, got {m}")
    return nn.Parameter(torch.full((m,), 1.0 / m, dtype=dtype))


def entropy(p: Tensor) -> Tensor:
    """−Σ p log p in nats over the last dimension: log m when even, 0 when one weight has everything."""
    return torch.special.entr(p).sum(-1)


class MirrorDescent(torch.optim.Optimizer):
    """Exponentiated gradient on the simplex: p_i ← p_i e^{−lr·h_i} / Σ_j p_j e^{−lr·h_j}, in place.

    h is the gradient, centred to mean zero and then clipped symmetrically; afterwards p ← (1−ρ)p + ρ/m.
    Computed in log space. No state, no weight decay (Kivinen & Warmuth 1997; clip=None and floor=0 give the
    update of WML, NeurIPS 2022). Centring alone changes nothing, since the step ignores a constant added to
    h; it makes the clip fair to both signs.

    Args:
        params: one-dimensional parameters, each a point of its simplex.
        lr: η.
        floor: ρ in [0, 1); keeps every weight at least ρ/m.
        clip: largest |h_i|; None does not clip.
        centre: subtract the mean of h.

    Raises:
        UserError: a parameter that is not on the simplex, or settings out of range.

    Example:
        >>> p = simplex(2)
        >>> p.grad = torch.tensor([1.0, -1.0])
        >>> _ = MirrorDescent([p], lr=0.5, floor=0.0).step()
        >>> p.data
        tensor([0.2689, 0.7311])
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        floor: float = 0.02,
        clip: float | None = 1.0,
        centre: bool = True,
    ):
        if lr < 0 or not 0 <= floor < 1 or (clip is not None and clip <= 0):
            raise UserError(
                f"MirrorDescent: needs lr >= 0, 0 <= floor < 1, clip > 0 or None; got lr={lr}, "
                f"floor={floor}, clip={clip}"
            )
        super().__init__(params, {"lr": lr, "floor": floor, "clip": clip, "centre": centre})
        for p in (p for group in self.param_groups for p in group["params"]):
            total = float(p.detach().sum())
            if p.dim() != 1 or abs(total - 1) > 1e-3 or bool((p < 0).any()):
                raise UserError(
                    f"MirrorDescent: moves weights on the simplex, got shape {tuple(p.shape)} with "
                    f"sum {total:.4g}; make them with simplex(m)"
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step from each parameter's ``.grad``; a parameter without one stays."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.copy_(self._moved(p, p.grad, group))
        return loss

    @staticmethod
    def _moved(p: Tensor, h: Tensor, group: dict[str, Any]) -> Tensor:
        if group["centre"]:
            h = h - h.mean()
        if group["clip"] is not None:
            h = h.clamp(-group["clip"], group["clip"])
        moved = torch.softmax(p.log() - group["lr"] * h, 0)
        return moved if group["floor"] == 0 else (1 - group["floor"]) * moved + group["floor"] / len(p)


def mirror_descent(
    lr: float = 0.1, floor: float = 0.02, clip: float | None = 1.0, centre: bool = True
) -> Callable[[Sequence[Tensor]], MirrorDescent]:
    """`MirrorDescent` with its settings, as the ``optimizer`` of an `Update`.

    Example:
        >>> type(mirror_descent(0.05)([simplex(3)])).__name__
        'MirrorDescent'
    """
    return partial(MirrorDescent, lr=lr, floor=floor, clip=clip, centre=centre)
