"""Intermediate outputs of a network by module path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stillhouse.errors import UserError, did_you_mean
from stillhouse.evaluate import call, evaluating, logits_of
from stillhouse.system import map_tensors


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


class Ends(NamedTuple):
    """Where a classifier ends: the last feature map before pooling, and the linear layer that gives the logits."""

    features: str
    head: str


def ends(model: nn.Module, inputs: Any) -> Ends:
    """Paths, as for `tap`, of the last feature map before global pooling and of the classifier.

    The classifier is the last `nn.Linear` that is called. The feature map is what enters the last global pooling
    module; without one, or where maps come after it, the last output (n, C, H, W) or, in a transformer, (n, tokens, C)
    before the classifier.

    Args:
        model: any module; it is called once, as it is (put it in eval mode to leave its statistics alone).
        inputs: one batch.

    Raises:
        UserError: no linear layer is called, or no feature map comes before it.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        >>> ends(net, torch.zeros(2, 1, 8, 8))
        Ends(features='2:in', head='4')
    """
    calls: list[tuple[str, nn.Module, Tensor | None, Tensor | None]] = []
    handles = []
    for path, module in model.named_modules():
        if path:

            def note(m: nn.Module, args: tuple[Any, ...], output: Any, path: str = path) -> None:
                calls.append((path, m, _first_tensor(args), _first_tensor(output)))

            handles.append(module.register_forward_hook(note))
    try:
        with torch.no_grad():
            call(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    what = type(model).__name__
    heads = [i for i, (_, m, _, _) in enumerate(calls) if isinstance(m, nn.Linear)]
    if not heads:
        raise UserError(f"{what} has no nn.Linear that gives its logits; end it with one")
    found = ""
    for path, module, given, made in calls[: heads[-1]]:
        if given is not None and given.dim() == 4 and "Pool" in type(module).__name__ and _positions(made) == 1:
            found = f"{path}:in"
        # A normalisation behind the pooling (ConvNeXt) gives one position; a block behind a gate's pooling gives more.
        elif made is not None and made.dim() in (3, 4) and (_positions(made) > 1 or not found.endswith(":in")):
            found = path
    if not found:
        raise UserError(
            f"{what} has no feature map (n, C, H, W) or (n, tokens, C) before its classifier {calls[heads[-1]][0]!r}; "
            "give a convolutional network or a transformer"
        )
    return Ends(found, calls[heads[-1]][0])


def head(model: nn.Module, inputs: Any) -> str:
    """Path of the linear layer whose output is the model's logits: ``PATH:in`` taps the embedding it reads.

    Args:
        model: any classifier; it is called once, in eval mode.
        inputs: one batch.

    Raises:
        UserError: the logits are not what an `nn.Linear` gives.

    Example:
        >>> head(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)), torch.zeros(1, 2))
        '2'
    """
    linear = [path for path, m in model.named_modules() if path and isinstance(m, nn.Linear)]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with torch.no_grad(), evaluating(model), tap(model, linear) as seen:
        logits = logits_of(call(model, map_tensors(inputs, lambda t: t.to(device))))
    same = [path for path, z in seen.items() if z.shape == logits.shape and torch.equal(z, logits)]
    if not same:
        raise UserError(
            f"the logits of {type(model).__name__} are not the output of an nn.Linear, and so there is no embedding "
            "before them; end it with one, or give a network that does"
        )
    return same[-1]


def _positions(t: Tensor | None) -> int:
    """Positions of a map: 1 behind a global pooling, whether or not it flattens."""
    return 0 if t is None else t[0, 0].numel() if t.dim() == 4 else t.shape[1] if t.dim() == 3 else 1
