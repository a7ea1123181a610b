"""Weights as functions of other weights while they are trained: quantised, N:M sparse, or of your own making.

A projector is a parametrization (`torch.nn.utils.parametrize`): the layer keeps a dense weight that the optimiser
moves, and computes with what the projector makes of it. `bake` puts the projected values in its place and gives the
edits with which a `Plan` stores them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stillhouse.errors import UserError, did_you_mean
from stillhouse.students.dictionary import Mix
from stillhouse.students.edits import Edit, Pack
from stillhouse.students.packing import PARTS, Code, grouped, groups, nearest, ungrouped, whole_points
from stillhouse.students.patterns import Pattern
from stillhouse.students.patterns import nm_mask as nm_mask

EPS = 1e-10  # below it a group of equal values has scale 1


class _Through(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(w: Tensor, values: Tensor, passes: Tensor | None) -> Tensor:
        return values.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])
        ctx.save_for_forward(inputs[2])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (passes,) = ctx.saved_tensors
        return g if passes is None else g * passes, None, None

    @staticmethod
    def jvp(ctx: Any, dw: Tensor, dv: Any, dp: Any) -> Tensor:
        (passes,) = ctx.saved_tensors
        return dw.clone() if passes is None else dw * passes


def straight_through(w: Tensor, values: Tensor, passes: Tensor | None = None) -> Tensor:
    """The given values, exactly, with the derivative of w: ∂/∂w = 1, or `passes` where that is given.

    Args:
        w: what the optimiser moves.
        values: what the network computes with, of w's shape; detached.
        passes: factors of the gradient, such as a mask.

    Source: Bengio, Léonard, Courville (2013, arXiv 1308.3432).

    Example:
        >>> w = torch.tensor([0.3, 0.8], requires_grad=True)
        >>> straight_through(w, w.detach().round()).sum().backward()
        >>> w.grad.tolist()
        [1.0, 1.0]
    """
    return _Through.apply(w, values.detach(), None if passes is None else passes.to(w.dtype))


class Projector(nn.Module):
    """w ↦ P(w), the gradient straight through; subclasses say `values` and perhaps `passes`."""

    def values(self, w: Tensor) -> Tensor:
        """P(w); w is detached."""
        raise NotImplementedError

    def passes(self, w: Tensor) -> Tensor | None:
        """Factors of the gradient; None for 1."""
        return None

    def forward(self, w: Tensor) -> Tensor:
        fixed = w.detach()
        return straight_through(w, self.values(fixed), self.passes(fixed))


class NM(Projector):
    """N:M sparsity (`nm_mask`), the mask found anew in every forward pass, or kept as it is given.

    Args:
        n, m: n weights of every m stay.
        mask: a fixed one.
        dense_gradient: whether weights that are out are moved too (the straight-through way); with a fixed mask they
            are not.
        unit: neighbours that stay or go together.
    """

    mask: Tensor | None

    def __init__(
        self, n: int = 2, m: int = 4, mask: Tensor | None = None, dense_gradient: bool | None = None, unit: int = 1
    ):
        super().__init__()
        self.pattern = Pattern(n, m, unit)
        self.dense_gradient = mask is None if dense_gradient is None else dense_gradient
        self.register_buffer("mask", mask)

    def chosen(self, w: Tensor) -> Tensor:
        return self.pattern.mask(w) if self.mask is None else self.mask

    def values(self, w: Tensor) -> Tensor:
        return (w * self.chosen(w)).add_(0.0)  # several times faster than where on a CPU; + 0 leaves no −0

    def passes(self, w: Tensor) -> Tensor | None:
        return None if self.dense_gradient else self.chosen(w)


class Half(Projector):
    """w as float16 has it, and so it is stored."""

    def values(self, w: Tensor) -> Tensor:
        return w.half().to(w.dtype)


class Quantizer(Projector):
    """A projector whose values are `Code` levels.

    Args:
        bits: of a code, 1 to 8.
        group: values with one scale and zero; 0: per output channel, -1: one for the tensor, else buckets of so many
            consecutive values.
    """

    least = 1  # fewest bits

    def __init__(self, bits: int, group: int = 0):
        super().__init__()
        if not self.least <= bits <= 8 or group < -1:
            known = f"{self.least} to 8 bits and a group of -1, 0 or more"
            raise UserError(f"{type(self).__name__} quantisation needs {known}, got {bits}, {group}")
        self.bits, self.group = bits, group

    def code(self, w: Tensor) -> Code:
        """Points, scales and zeros for a tensor."""
        raise NotImplementedError

    def index(self, w: Tensor, code: Code) -> Tensor:
        """Codes of the values, (groups, size)."""
        return nearest(grouped(w.float(), self.group), code.levels())

    def values(self, w: Tensor) -> Tensor:
        code = self.code(w)
        return ungrouped(code.levels().gather(1, self.index(w, code)), w.shape).to(w.dtype)


class Symmetric(Quantizer):
    """scale_g · q, q a whole number in ±(2^{b−1}−1), scale_g = max|w_g| / (2^{b−1}−1), rounded half to even.

    Zero stays exactly zero, so that masks survive; with one bit nothing else would.
    """

    least = 2

    @property
    def most(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def scale(self, x: Tensor) -> Tensor:
        """(groups,), of values as (groups, size)."""
        scale = x.abs().amax(1).div_(self.most)
        return scale.masked_fill_(scale < EPS, 1.0)

    def steps(self, x: Tensor, scale: Tensor) -> Tensor:
        """q as floats, of values as (groups, size)."""
        return torch.div(x, scale[:, None]).round_().clamp_(-self.most, self.most)

    def code(self, w: Tensor) -> Code:
        scale = self.scale(grouped(w.float(), self.group))
        return Code(whole_points(self.bits).to(w.device), scale, torch.zeros_like(scale), self.bits, self.group)

    def index(self, w: Tensor, code: Code) -> Tensor:
        return (self.steps(grouped(w.float(), self.group), code.scale) + self.most).long()

    def values(self, w: Tensor) -> Tensor:
        x = grouped(w.float(), self.group)
        scale = self.scale(x)  # below: as `levels` has it, bit for bit (+ 0 leaves no −0), without looking values up
        return ungrouped(self.steps(x, scale).mul_(scale[:, None]).add_(0.0), w.shape).to(w.dtype)


class MinMax(Quantizer):
    """min_g + (max_g − min_g) · k / (2^b − 1), k a whole number, rounded half to even."""

    @property
    def most(self) -> int:
        return 2**self.bits - 1

    def range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest value and range, (groups,) each, of values as (groups, size)."""
        low = x.amin(1)
        scale = x.amax(1).sub_(low)
        return low, scale.masked_fill_(scale < EPS, 1.0)

    def steps(self, x: Tensor, low: Tensor, scale: Tensor) -> Tensor:
        """k as floats, of values as (groups, size)."""
        u = torch.sub(x, low[:, None]).div_(scale[:, None])
        return self.rounded(u.mul_(self.most)).clamp_(0, self.most)

    def rounded(self, x: Tensor) -> Tensor:
        """Whole numbers for real ones; x may be changed."""
        return x.round_()

    def code(self, w: Tensor) -> Code:
        low, scale = self.range(grouped(w.float(), self.group))
        points = torch.arange(2**self.bits, device=w.device).float() / self.most
        return Code(points, scale, low, self.bits, self.group)

    def index(self, w: Tensor, code: Code) -> Tensor:
        return self.steps(grouped(w.float(), self.group), code.zero, code.scale).long()

    def values(self, w: Tensor) -> Tensor:
        x = grouped(w.float(), self.group)
        low, scale = self.range(x)  # below: as `levels` has it, bit for bit, without looking values up
        points = self.steps(x, low, scale).div_(self.most)
        return ungrouped(points.mul_(scale[:, None]).add_(low[:, None]), w.shape).to(w.dtype)


class Codebook(Quantizer):
    """min_g + (max_g − min_g) · p_k with learned points p, one set per tensor; the weight itself stays as it is.

    ∂L/∂p_k = Σ_{i: code k} (max − min)_{g(i)} ∂L/∂w_i. Sort the points after every step (`sort_`).

    Args:
        points: (2^bits,) in [0, 1], or fewer; they are filled up with the last.

    Source: Polino, Pascanu, Alistarh (ICLR 2018), section 4.
    """

    def __init__(self, bits: int, points: Tensor, group: int = 256):
        super().__init__(bits, group)
        if points.dim() != 1 or not 2 <= len(points) <= 2**bits:
            raise UserError(f"a codebook of {bits} bits has 2 to {2**bits} points, got {tuple(points.shape)}")
        self.points = nn.Parameter(points.detach().float().sort().values)

    def code(self, w: Tensor) -> Code:
        low_high = MinMax(self.bits, self.group).code(w)
        filled = torch.cat([self.points, self.points[-1:].expand(2**self.bits - len(self.points))])
        return Code(filled, low_high.scale, low_high.zero, self.bits, self.group)

    def forward(self, w: Tensor) -> Tensor:
        code = self.code(w.detach())
        with torch.no_grad():
            index = self.index(w.detach(), code)
        return ungrouped(code.levels().gather(1, index), w.shape).to(w.dtype)

    @torch.no_grad()
    def sort_(self) -> None:
        """Puts the points in ascending order."""
        self.points.copy_(self.points.sort().values)


def weight_layers(
    model: nn.Module,
    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv2d),
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> list[str]:
    """Paths of the layers of some kinds, in the order of the network.

    Args:
        include, exclude: module paths, or patterns with ``*``; a path stands for all that lies under it.

    Raises:
        UserError: a pattern that no module has, or a module that is named and of another kind.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> weight_layers(net, exclude=["0"])
        ['2']
    """
    paths = {n: m for n, m in model.named_modules() if n}

    def meant(pattern: str, path: str) -> bool:
        return fnmatchcase(path, pattern) or path.startswith(pattern + ".")

    for pattern in (*include, *exclude):
        if not any(meant(pattern, p) for p in paths):
            raise UserError(f"{type(model).__name__} has no module {pattern!r}; {did_you_mean(pattern, paths)}")
    for pattern in include:
        if pattern in paths and not any(isinstance(m, kinds) for m in paths[pattern].modules()):
            known = ", ".join(k.__name__ for k in kinds)
            raise UserError(f"{pattern}: {type(paths[pattern]).__name__} is not supported; it must be or hold {known}")
    found = [p for p, m in paths.items() if isinstance(m, kinds) and not any(meant(e, p) for e in exclude)]
    return [p for p in found if not include or any(meant(i, p) for i in include)]


def weight_name(layer: nn.Module) -> str:
    """Which tensor of a layer is meant: ``weight``, of an nn.MultiheadAttention ``in_proj_weight``."""
    return "in_proj_weight" if isinstance(layer, nn.MultiheadAttention) else "weight"


def parametrize_weights(
    model: nn.Module, layers: Sequence[str], make: Callable[[str, nn.Module], nn.Module | None]
) -> list[str]:
    """Puts a projector on the weight of each of these layers, in place; those for which `make` gives None stay.

    Returns:
        The paths that have one now.

    Raises:
        UserError: a weight that is a mix from a dictionary which other layers share.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 2))
        >>> parametrize_weights(net, ["0"], lambda path, layer: NM(2, 4)), int((net[0].weight != 0).sum())
        (['0'], 4)
    """
    done = []
    for path in layers:
        layer = model.get_submodule(path)
        projector, name = make(path, layer), weight_name(layer)
        if projector is None:
            continue
        if parametrize.is_parametrized(layer, name) and isinstance(layer.parametrizations[name][0], Mix):  # type: ignore[index]
            raise UserError(
                f"{path}: its weight is a mix from a dictionary that other layers share; leave it out, or give the "
                "network before it was shared"
            )
        parametrize.register_parametrization(layer, name, projector)
        done.append(path)
    return done


def projectors(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """(path, layer, its list of parametrizations) of every layer whose weight is a function."""
    for path, module in model.named_modules():
        if parametrize.is_parametrized(module, name := weight_name(module)):
            yield path, module, module.parametrizations[name]


def strip(model: nn.Module) -> None:
    """Takes the projectors off, in place, and leaves the weights behind them."""
    for _, layer, _ in list(projectors(model)):
        _off(layer, keep_values=False)


def _off(layer: nn.Module, keep_values: bool) -> None:
    # A parametrised layer and its deep copies share one class, from which torch would delete `weight` for all of them.
    kind: Any = type(layer)
    own = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    layer.__class__ = type(kind.__name__, kind.__bases__, own)
    parametrize.remove_parametrizations(layer, weight_name(layer), leave_parametrized=keep_values)
    if "weight" in layer._buffers:  # it was made of several tensors, and torch takes the result for a buffer
        layer.weight = nn.Parameter(layer._buffers.pop("weight"))  # type: ignore[arg-type]


@torch.no_grad()
def bake(model: nn.Module, layers: Sequence[str] | None = None) -> list[Edit]:
    """Puts the projected values in place of the weights, in place: plain layers that compute the same.

    Args:
        layers: paths of these alone; None takes all that have projectors.

    Returns:
        The edits with which a plan stores what the projectors left: codes where the last one is a `Quantizer`, float16
        where it is `Half`, and only the weights that stay where one is an `NM` whose pattern they have. The layer has
        the buffers that its edit needs. A last projector with ``baked(path, layer, *originals)`` gives a module that
        stands for the layer, and the edit for that. ``plan.then(*bake(model))`` is the plan of the baked model.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 2))
        >>> _ = parametrize_weights(net, ["0"], lambda path, layer: Symmetric(4))
        >>> [edit.facts() for edit in bake(net)]
        [{'module': '0', 'bits': 4, 'group': 0}]
    """
    edits: list[Edit] = []
    for path, layer, chain in [p for p in projectors(model) if layers is None or p[0] in layers]:
        code, made = None, list(chain.eval())  # what draws in training does not in the end
        if hasattr(made[-1], "baked"):
            kept = [p.detach() for n, p in chain.named_parameters(recurse=False) if n.startswith("original")]
            _off(layer, keep_values=True)
            other, edit = made[-1].baked(path, layer, *kept)
            model.set_submodule(path, other)
            edits.append(edit)
            continue
        if isinstance(last := made[-1], Quantizer):
            before = chain.original
            for earlier in made[:-1]:
                before = earlier(before)
            code = last.code(before)
        _off(layer, keep_values=True)
        name = weight_name(layer)
        w: Any = getattr(layer, name)
        sparse = _pattern(made, w)
        if code is not None:
            for part in PARTS:
                layer.register_buffer(f"{name}_{part}", getattr(code, part).detach().clone())
            assert groups(w.shape, code.group) == len(code.scale)
        bits = code.bits if code is not None else 16 if isinstance(last, Half) else 0
        if bits or sparse:
            edits.append(Pack(path, bits, code.group if code else 0, name, sparse))
    return edits


def _pattern(chain: Sequence[nn.Module], w: Tensor) -> tuple[int, ...]:
    """n, m and unit of the N:M pattern that a weight has behind its projectors; empty where it has none."""
    for p in (p.pattern for p in chain if isinstance(p, NM)):
        if p.n < p.m and p.fits(w.shape) and not p.broken(w):
            return astuple(p)
    return ()
