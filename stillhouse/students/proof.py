"""The trial of a group: a copy with random weights must lose the group's channels and compute the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.students.groups import Group, assemble, call
from stillhouse.students.layers import mixes_channels, part
from stillhouse.students.plan import bare_copy
from stillhouse.system import fold, map_tensors, walk

_TOLERANCE = 1e-4  # of the largest output: float32 rounding stays far below, a wrong coupling far above


def on(model: nn.Module, example: Any) -> Any:
    """The example with its floating-point tensors in the model's precision, and all on its device."""
    p = next(model.parameters())
    return map_tensors(example, lambda t: t.to(p.device, p.dtype if t.is_floating_point() else t.dtype))


def trial_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode, all trainable, with random norms and no zero weights (zeros prove nothing)."""
    trial = bare_copy(model).eval()
    if next(trial.parameters(), None) is None:
        raise UserError(f"{type(model).__name__} has no parameters, so there is nothing to prune")
    if next(trial.parameters()).dtype in (torch.float16, torch.bfloat16):
        trial.float()
    with torch.no_grad():
        for name, p in list(trial.named_parameters()) + list(trial.named_buffers()):
            if not p.is_floating_point():
                continue
            g = torch.Generator().manual_seed(fold("prune trial", name))
            wide = sum(n > 1 for n in p.shape)
            if wide > 1 and isinstance(p, nn.Parameter):
                if not p.any():
                    p.copy_(torch.randn(p.shape, generator=g) * (p.shape[0] / p.numel()) ** 0.5)
            elif isinstance(p, nn.Parameter) or name.endswith(("running_var", "running_mean")):
                p.copy_(torch.rand(p.shape, generator=g) + 0.5)
    return trial.requires_grad_(True)


def proved(trial: nn.Module, example: Any, groups: Sequence[Group], said: dict[str, str]) -> list[Group]:
    """The groups whose removal does just what it should; the reasons for the others go into ``said``."""

    def noise(t: Tensor) -> Tensor:
        g = torch.Generator().manual_seed(fold("prune trial input"))
        return torch.randn(t.shape, generator=g).to(t) if t.is_floating_point() else t

    shown = map_tensors(on(trial, example), noise)
    with torch.no_grad():
        whole = list(walk(call(trial, shown)))

    def exact(g: Group) -> bool:
        return not any(mixes_channels(part(trial, m.module)) for m in g.members)

    def why(some: Sequence[Group], check: bool) -> str | None:
        keep = [torch.tensor([u % 2 == 0 for u in range(g.size)]) for g in some]
        try:
            plan = assemble(trial, some, keep)
            with torch.no_grad():
                small = list(walk(call(plan.build(trial), shown)))
                full = list(walk(call(plan.masked(trial), shown))) if check else whole
        except Exception as error:  # whatever a user's forward raises when a shape no longer fits
            return f"the network does not run without some of its channels ({str(error).splitlines()[0][:90]})"
        if [t.shape for t in small] != [t.shape for t in whole]:
            return "the shape of the model's output depends on it"
        far = any((a - b).abs().max() > _TOLERANCE * b.abs().max() for a, b in zip(small, full) if check)
        return "something else reads its channels in a way that could not be traced" if far else None

    def halve(some: Sequence[Group], check: bool) -> list[Group]:
        reason = why(some, check) if some else None
        if reason is None:
            return list(some)
        if len(some) == 1:
            said[some[0].name] = reason
            return []
        middle = len(some) // 2
        return halve(some[:middle], check) + halve(some[middle:], check)

    good = {g.name for g in halve([g for g in groups if exact(g)], True)}
    good |= {g.name for g in halve([g for g in groups if not exact(g)], False)}
    return [g for g in groups if g.name in good]
