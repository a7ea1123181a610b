"""Intermediate outputs of a network by module path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stillhouse.errors import UserError, did_you_mean


class Features(dict[str, Tensor]):
    """Tapped tensors by path; asking for one that was never reached says so."""

    def __missing__(self, path: str) -> Tensor:
        raise UserError(
            f"no feature {path!r}: tap it, and run the model so that the module is called; has {list(self)}"
        )


def paths(model: nn.Module) -> list[str]:
    """Module paths that can be tapped, in the order the modules were defined.

    Example:
        >>> paths(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
        ['0', '1']
    """
    return [name for name, _ in model.named_modules() if name]


@contextmanager
def tap(model: nn.Module, at: str | Sequence[str], *, detach: bool = False) -> Iterator[Features]:
    """Collect the outputs of modules (or, with the suffix ``:in``, their first inputs) while the model runs.

    Each feature is a copy, because a later in-place operation (``ReLU(inplace=True)``, ``out += identity``)
    would otherwise overwrite it. A module called several times leaves its LAST value. Of a tuple output the
    first tensor is taken, of a mapping the first tensor among its values. Hooks are gone on leaving, also
    after an exception; taps may be nested.

    Args:
        model: any module.
        at: paths as in ``model.named_modules()``, e.g. ``["layer2", "fc:in"]``; ``""`` is the model itself.
        detach: cut the features from the graph; attached otherwise, so that gradients flow through them.

    Returns:
        A mapping from path (as written) to tensor, filled by the forward passes inside the block.

    Raises:
        UserError: unknown path, or a module that gives no tensor.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
        >>> with tap(net, ["0", "1:in"]) as features:
        ...     _ = net(torch.ones(5, 2))
        >>> features["0"].shape, bool((features["0"] == features["1:in"]).all())
        (torch.Size([5, 3]), True)
    """
    modules = dict(model.named_modules())
    wanted = [at] if isinstance(at, str) else list(at)
    for path in wanted:
        if path.removesuffix(":in") not in modules:
            hint = did_you_mean(path.removesuffix(":in"), (m for m in modules if m))
            raise UserError(f"no module {path!r} in {type(model).__name__} to tap; {hint}")
    features, handles = Features(), []
    try:
        for path in dict.fromkeys(wanted):
            handles.append(_hook(modules[path.removesuffix(":in")], path, features, detach))
        yield features
    finally:
        for handle in handles:
            handle.remove()


def _hook(module: nn.Module, path: str, features: Features, detach: bool) -> RemovableHandle:
    def keep(value: Any) -> None:
        tensor = _first_tensor(value)
        if tensor is None:
            raise UserError(f"tap {path!r}: {type(module).__name__} gives {type(value).__name__} without a tensor")
        features[path] = (tensor.detach() if detach else tensor).clone()

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep((*args, *kwargs.values()))

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        keep(output)

    if path.endswith(":in"):
        return module.register_forward_pre_hook(before, with_kwargs=True)
    return module.register_forward_hook(after)


def _first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return next((t for t in items if isinstance(t, Tensor)), None)
