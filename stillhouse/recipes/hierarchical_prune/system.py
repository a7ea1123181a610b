"""Repair: what learns, how fast, and from which differences to the teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import takewhile
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.diffusion.denoiser import Condition, Denoiser
from stillhouse.diffusion.process import Flow, View, Weighting, loss_weight
from stillhouse.diffusion.sampling import ManySteps
from stillhouse.errors import UserError
from stillhouse.recipes.hierarchical_prune.parts import Part
from stillhouse.students.removed import keep_parts
from stillhouse.system import Batch, Clock, Schedule, System, Terms, Update, walk


def behind(network: nn.Module, removed: Sequence[str]) -> list[str]:
    """Names of the parameters that come after the first of the removed parts, in the order of the modules.

    Example:
        >>> behind(nn.Sequential(nn.Linear(1, 1), nn.Identity(), nn.Linear(1, 1)), ["1"])
        ['2.weight', '2.bias']
    """
    found, on = [], False
    for path, module in network.named_modules():
        on = on or path in removed
        if on and not any(path == r or path.startswith(f"{r}.") for r in removed):
            found += [f"{path}.{name}".lstrip(".") for name, _ in module.named_parameters(recurse=False)]
    return found


def rates(impact: Mapping[str, float]) -> dict[str, float]:
    """clip(median(ΔP) / ΔP_i, 0, 1) for each part by path; 1 where ΔP_i ≤ 0: what harms nobody may move freely.

    Example:
        >>> rates({"a": 1.0, "b": 2.0, "c": 8.0, "d": -1.0, "e": 2.0})
        {'a': 1.0, 'b': 1.0, 'c': 0.25, 'd': 1.0, 'e': 1.0}
    """
    if not impact:
        return {}
    middle = median(impact.values())
    return {path: 1.0 if value <= 0 else min(1.0, max(0.0, middle / value)) for path, value in impact.items()}


def unfreeze(
    student: nn.Module,
    blocks: Sequence[str],
    removed: Sequence[str],
    factors: Mapping[str, float],
    *,
    everything: bool = False,
    listed: Sequence[int] = (),
) -> int:
    """Lets learn what lies `behind` the first removed part (or everything, or the listed blocks), unless its rate is 0.

    Args:
        blocks: paths of all blocks. factors: rate by path; the deepest path that holds a parameter counts.

    Returns:
        How many numbers learn.

    Raises:
        UserError: a block that is not there, or nothing to learn.
    """
    names = set(behind(student, removed))
    if missing := [n for n in listed if not 0 <= n < len(blocks)]:
        raise UserError(f"train_blocks: there is no block {missing[0]}; this network has 0 to {len(blocks) - 1}")
    if listed or everything:
        held = tuple(f"{blocks[n]}." for n in listed) or ("",)
        names = {n for n, _ in student.named_parameters() if n.startswith(held)}

    def rate(name: str) -> float:
        mine = [path for path in factors if name.startswith(f"{path}.")]
        return factors[max(mine, key=len)] if mine else 1.0

    for name, p in student.named_parameters():
        p.requires_grad_(name in names and rate(name) > 0)
    count = sum(p.numel() for p in student.parameters() if p.requires_grad)
    if not count:
        raise UserError(
            "nothing is left to learn: there are no parameters behind a removed part; lower --budget, say --train all "
            "or --train-blocks, or repair nothing with --steps 0"
        )
    return count


@contextmanager
def block_outputs(network: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """All tensors that some modules give, by path: both streams of a block; a stream that is None is left out."""
    found: dict[str, list[Tensor]] = {}

    def keep(path: str, module: nn.Module, args: object, output: object) -> None:
        found[path] = list(walk(output))

    handles = [network.get_submodule(p).register_forward_hook(partial(keep, p)) for p in paths]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class Given(nn.Module):
    """Gives what it was handed, whatever it is called with."""

    value: Any = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.value


@contextmanager
def common_start(
    student: ManySteps, teacher: ManySteps, blocks: Sequence[Part], gone: Sequence[Part], inputs: Sequence[Any]
) -> Iterator[int]:
    """While this is open the student does not compute the first blocks, where it cannot differ from the teacher.

    It takes what each of them gave in the teacher's last pass, which must have had the same inputs. They end at the
    first block of which a part is gone, or whose output needs a gradient: something up to there learns.

    Args:
        blocks: all of them, in order. gone: removed parts. inputs: x_t, t and condition of a pass that finds out.

    Yields:
        How many blocks these are.
    """
    with block_outputs(student, [b.module for b in blocks]) as found, torch.enable_grad():
        student.denoiser.predict(*inputs)

    def alike(block: Part) -> bool:
        return not any(block.touches(g) for g in gone) and not any(t.requires_grad for t in found[block.module])

    common = list(takewhile(alike, blocks))
    were = [student.get_submodule(b.module) for b in common]
    handles = []
    try:
        for block, module in zip(common, were, strict=True):
            given = Given()
            student.set_submodule(block.module, keep_parts(given, module, block.keeps))
            handles.append(teacher.get_submodule(block.module).register_forward_hook(partial(_hand, given)))
        yield len(common)
    finally:
        for handle in handles:
            handle.remove()
        for block, module in zip(common, were, strict=True):
            student.set_submodule(block.module, module)


def _hand(given: Given, module: nn.Module, args: object, output: object) -> None:
    given.value = output


class Repair(System):
    """l_task E w‖x̂_0 − x_0‖² + l_out E w‖v_S − v_T‖² + l_feat Σ_blocks Σ_streams E‖h_S − h_T‖², means over elements.

    Student and teacher see the same x_t, t and condition; the teacher has no gradient. The student stays in eval mode:
    what drops labels or activations by itself would drop others than the teacher's.

    Args:
        student: some of its parameters require a gradient; these are moved. teacher: not a part of this module.
        blocks: paths of blocks in the student, the same blocks in the teacher by number.
        weights: l_task, l_out, l_feat. weighting: w(σ), for a flow.
        drop: part of the samples whose condition is taken away, by "chance" in the batch.
        optimizer, lr, clip: of the one update.

    The batch holds "input" x_0, "noise" ε, "time" t, "chance" in [0, 1) and perhaps "condition".
    """

    def __init__(
        self,
        student: ManySteps,
        teacher: ManySteps,
        blocks: Sequence[str],
        *,
        weights: tuple[float, float, float] = (0.0, 1.0, 1e-4),
        weighting: Weighting = "one",
        drop: float = 0.0,
        optimizer: Callable[[Sequence[Tensor]], torch.optim.Optimizer],
        lr: Schedule | None = None,
        clip: float | None = 1.0,
    ):
        super().__init__()
        self.student, self.blocks, self.weights = student, list(blocks), weights
        if not (weights[0] or self.asks):
            raise UserError("only block outputs are to be compared, and no block that learns is left; give --output")
        self.weighting, self.drop, self.how = weighting, drop, partial(Update, optimizer=optimizer, lr=lr, clip=clip)
        self._teacher = [teacher]  # not registered: never moved, never saved

    def train(self, mode: bool = True) -> Repair:
        super().train(mode)
        self.student.eval()
        return self

    @property
    def asks(self) -> bool:
        """Whether the teacher is asked at all."""
        return bool(self.weights[1] or (self.weights[2] and self.blocks))

    def updates(self) -> Sequence[Update]:
        return [self.how("repair", [p for p in self.student.parameters() if p.requires_grad])]

    def repair(self, batch: Batch, clock: Clock) -> Terms:
        """The weighted terms of one batch; those of weight 0 are not computed."""
        (teacher,), of = self._teacher, self.student.denoiser
        x0, eps, t = batch["input"], batch["noise"], batch["time"]
        x_t, condition = of.process.add_noise(x0, eps, t), self.dropped(of, batch)
        _, sigma = of.process.scales(t, x0)
        w = loss_weight(self.weighting if isinstance(of.process, Flow) else "one", sigma.flatten())
        l_task, l_out, l_feat = self.weights
        paths = self.blocks if l_feat else []
        if self.asks:  # before the student, which may go on from there: `common_start`
            with torch.no_grad(), block_outputs(teacher, paths) as theirs:
                wanted = teacher.denoiser.predict(x_t, t, condition)
        with block_outputs(self.student, paths) as mine:
            said = _wide(of.ask(x_t, t, condition))
        terms: dict[str, Tensor] = {}
        if l_task:
            guess = View(of.process, x_t, t, of.prediction, said).x0
            terms["task"] = l_task * (w * (guess - x0).square().flatten(1).mean(1)).mean()
        if l_out:
            terms["out"] = l_out * (w * (said - wanted).square().flatten(1).mean(1)).mean()
        if paths:
            pairs = [pair for p in paths for pair in zip(mine[p], theirs[p], strict=True)]
            terms["feature"] = l_feat * torch.stack([(_wide(a) - _wide(b)).square().mean() for a, b in pairs]).sum()
        return Terms(**terms)

    def dropped(self, of: Denoiser, batch: Batch) -> Condition:
        """The condition, taken away from the samples whose chance is below `drop`."""
        condition = batch.get("condition")
        if condition is None or not self.drop or of.null is None:
            return condition
        return of.drop(condition, batch["chance"] < self.drop)

    def outcome(self) -> ManySteps:
        return self.student


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))
