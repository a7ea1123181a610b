"""Which channels of a network go together, read from a trace and from the rules of transformers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from stillhouse.errors import UserError, did_you_mean
from stillhouse.students.groups import Group, Member, call, plain
from stillhouse.students.layers import Axis, attention, is_depthwise, layout, part, tensors, under, width_of
from stillhouse.students.plan import bare_copy
from stillhouse.students.proof import on, proved, trial_copy

Scope = Literal["inside", "all"]


def find_groups(
    model: nn.Module,
    example: Any,
    *,
    ignore: Sequence[str] = (),
    only: Sequence[str] = (),
    scope: Scope = "inside",
) -> tuple[list[Group], list[str]]:
    """The prunable groups of a network, and a sentence for every layer that has to stay whole.

    Convolutional nets and MLPs are traced with torch-pruning's dependency graph; attention heads and
    transformer MLPs have rules of their own. Every group is then tried out on a copy with random weights: the
    smaller network must run and give what the full one gives when nothing reads the removed channels.

    Args:
        model: the base network; it is not changed.
        example: one input (a tensor, a tuple of arguments or a mapping of keyword arguments).
        ignore: module paths that must stay as they are (a shared trunk), and groups that reach into them.
        only: if given, only groups whose root lies under one of these paths.
        scope: "inside" leaves channels that pass through a residual add whole, "all" takes them too.

    Returns:
        groups in the order of the network's modules, and sentences ``"module path: why it is left whole"``.

    Raises:
        UserError: a path in ignore or only is not a module of the network, or scope is unknown.

    Source: Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023 (the tracing).

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> groups, whole = find_groups(net, torch.zeros(1, 4))
        >>> [(g.name, g.size) for g in groups], whole
        ([('0', 8)], ['2: its outputs are outputs of the model'])
    """
    check_paths(model, ignore=ignore, only=only)
    if scope not in ("inside", "all"):
        raise UserError(f"scope must be 'inside' or 'all', got {scope!r}")
    trial = trial_copy(model)
    shown = on(trial, example)
    try:
        with torch.no_grad():
            call(trial, shown)
    except Exception as error:  # whatever a user's forward raises
        raise UserError(f"the example does not fit the model ({type(model).__name__}): {error}") from error
    said = dict(_unsupported(trial))
    groups = list(_transformer_groups(trial))
    groups += _Trace(bare_copy(trial), scope, groups, said).groups(shown)
    order = {name: i for i, name in enumerate(n for n, _ in trial.named_modules())}
    kept = []
    for group in sorted(groups, key=lambda g: order.get(g.name, len(order))):
        why = _left_whole(trial, group, ignore, only)
        if why:
            said.setdefault(group.name, why)
        else:
            kept.append(group)
    kept = proved(trial, example, kept, said)
    covered = {(m.module, m.axis) for g in kept for m in plain(trial, g)}
    inner = [n for n, m in trial.named_modules() if isinstance(m, nn.MultiheadAttention)]
    for name, module in trial.named_modules():
        open_ends = isinstance(module, _ConvNd | nn.Linear) and (name, "out") not in covered
        if open_ends and name not in said and under(name, inner) is None:
            said[name] = "no group of channels could be traced through it"
    for group in kept:
        said.pop(group.name, None)
    return kept, [f"{name or 'the model'}: {why}" for name, why in said.items()]


def check_paths(model: nn.Module, **paths: Sequence[str]) -> None:
    names = [n for n, _ in model.named_modules()]
    for option, given in paths.items():
        if isinstance(given, str):
            raise UserError(f"{option} takes a list of module paths, got the string {given!r}; write [{given!r}]")
        for path in given:
            if path not in names:
                known = did_you_mean(path, [n for n in names if n])
                raise UserError(f"{option}={path!r} is not a module of this {type(model).__name__}; {known}")


def _unsupported(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Layers of torch whose parameters this library cannot slice."""
    parents = {n for n, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)}
    for name, module in model.named_modules():
        kind = type(module).__name__
        own = list(module.parameters(recurse=False))
        if isinstance(module, nn.MultiheadAttention) and not attention(module):
            variants = "kdim, vdim, add_bias_kv, add_zero_attn, changed weights or a forward of its own"
            yield name, f"an nn.MultiheadAttention with {variants} cannot lose heads"
        elif name in parents or name.rpartition(".")[0] in parents:
            continue
        elif isinstance(module, _ConvNd) and module.groups > 1 and not is_depthwise(module):
            yield name, f"a {kind} with {module.groups} groups that is not depthwise cannot be sliced"
        elif nn.utils.parametrize.is_parametrized(module):
            yield name, f"its weights are parametrised ({kind}); prune first, or bake them in"
        elif isinstance(module, nn.PReLU) and module.num_parameters == 1:
            continue
        elif own and type(module).__module__.startswith("torch.nn") and layout(module, "out") is None:
            yield name, f"{kind} is not a kind of layer that can be sliced"


def _transformer_groups(model: nn.Module) -> Iterator[Group]:
    """Attention heads, and hidden units between two linear layers of an MLP."""
    for name, module in model.named_modules():
        dot = name + "." if name else ""
        if attention(module):
            heads = width_of(model, name, "heads")
            yield Group(name, heads, (Member(name, "heads", tuple((h,) for h in range(heads))),))
        elif isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            yield from _chained(dot, module)
        else:
            a, b = next(
                (p for p in (("fc1", "fc2"), ("linear1", "linear2")) if all(hasattr(module, n) for n in p)),
                ("", ""),
            )
            known = isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)
            if a and (known or (type(module).__name__ == "Mlp" and isinstance(module.norm, nn.Identity))):
                yield from _pair(dot + a, getattr(module, a), dot + b, getattr(module, b))


def _chained(dot: str, chain: nn.Sequential) -> Iterator[Group]:
    """Linear layers of a Sequential with nothing but element-wise layers between them."""
    last: tuple[str, nn.Linear] | None = None
    for key, layer in chain.named_children():
        if isinstance(layer, nn.Linear):
            if last is not None:
                yield from _pair(last[0], last[1], dot + key, layer)
            last = (dot + key, layer)
        elif next(layer.parameters(), None) is not None or isinstance(layer, nn.Flatten | nn.Unflatten | nn.Softmax):
            last = None


def _pair(first: str, a: Any, second: str, b: Any) -> Iterator[Group]:
    if isinstance(a, nn.Linear) and isinstance(b, nn.Linear) and a.out_features == b.in_features:
        units = tuple((i,) for i in range(a.out_features))
        yield Group(first, a.out_features, (Member(first, "out", units), Member(second, "in", units)))


def _left_whole(model: nn.Module, group: Group, ignore: Sequence[str], only: Sequence[str]) -> str | None:
    """Why a traced group must nevertheless stay whole, if it must."""
    tied: dict[int, int] = {}
    for tensor in tensors(model).values():
        tied[id(tensor)] = tied.get(id(tensor), 0) + 1
    if only and under(group.name, only) is None:
        return f"not among only={list(only)}"
    if group.size < 2:
        return "it has a single channel"
    for member in plain(model, group):
        held = under(member.module, ignore)
        if held is not None:
            return f"left whole, {member.module} lies in ignore={held!r}"
        layer = part(model, member.module)
        where = layout(layer, member.axis)
        if where is None:
            return f"it is coupled with {member.module}, a {type(layer).__name__} that cannot be sliced"
        if max((c for unit in member.index for c in unit), default=0) >= where.width:
            return f"its channels could not be followed to {member.module}"
        own = [layer] if isinstance(layer, nn.Parameter) else [getattr(layer, n, None) for n in where.dims]
        if any(tied.get(id(t), 0) > 1 for t in own if t is not None):
            return f"{member.module} shares its weights with another layer"
    return None


class _Trace:
    """Groups followed along torch-pruning's dependency graph of a trial model."""

    def __init__(self, model: nn.Module, scope: Scope, known: Sequence[Group], said: dict[str, str]) -> None:
        import torch_pruning

        self.model, self.scope, self.said = model, scope, said
        self.claimed = {(m.module, m.axis) for g in known for m in plain(model, g)}
        self.names: dict[int, str] = {id(m): n for n, m in model.named_modules()}
        self.names |= {id(p): n for n, p in model.named_parameters()}
        self.widest = max(max(p.shape, default=1) for p in model.parameters())
        self.graph = torch_pruning.DependencyGraph()
        self.adds: set[int] = set()

    def groups(self, example: Any) -> list[Group]:
        """The groups of the trace; when there can be no trace, that is said of the whole model ("")."""
        try:
            with warnings.catch_warnings(), torch.enable_grad():
                warnings.simplefilter("ignore")
                self.graph.build_dependency(self.model, example, forward_fn=call, verbose=False)
        except Exception as error:  # its inference of shapes fails on some reshapes
            self.said[""] = f"torch-pruning cannot trace it ({type(error).__name__}: {error})"
            return []
        self.adds = {id(n) for n in self.graph.module2node.values() if self._is_add(n)}
        found, done = [], set(self.claimed)
        for name, module in self.model.named_modules():
            known = module in self.graph.module2node and isinstance(module, _ConvNd | nn.Linear)
            if not known or (name, "out") in done:
                continue
            group, why = self._follow(name, module)
            if why is None:
                found.append(group)
                done |= {(m.module, m.axis) for m in group.members}
            else:
                self.said.setdefault(name, why)
        return found

    def _follow(self, root: str, module: nn.Module) -> tuple[Group, str | None]:
        """All layers whose channels must go with those of one layer, or why these must stay."""
        from torch_pruning._helpers import _HybridIndex as Pair  # what its index mappings take

        start = self.graph.module2node[module]
        width = self.graph.get_out_channels(module)
        cut = self.graph.get_pruner_of_module(module).prune_out_channels
        members: dict[tuple[str, Axis], dict[int, set[int]]] = {}
        seen: dict[tuple[int, Any], set[Any]] = {}
        stack = [(start, cut, [Pair(idx=i, root_idx=i) for i in range(width)])]
        why: str | None = None
        while stack and why is None:
            node, cut, pairs = stack.pop()
            before = seen.setdefault((id(node), cut), set())
            pairs = [p for p in dict.fromkeys(pairs) if p not in before]
            if not pairs:
                continue
            before.update(pairs)
            why = self._obstacle(node, cut, max(p.idx for p in pairs))
            self._note(members, node.module, cut, pairs)
            for step in node.dependencies:
                if step.is_triggered_by(cut):
                    moved = pairs
                    for mapping in step.index_mapping:
                        moved = moved if mapping is None else mapping(moved)
                    stack.append((step.target, step.handler, moved))
        group = Group(
            root,
            width,
            tuple(
                Member(name, axis, tuple(tuple(sorted(units.get(u, ()))) for u in range(width)))
                for (name, axis), units in members.items()
            ),
        )
        return group, why or self._clash(group)

    def _note(self, members: dict[tuple[str, Axis], dict[int, set[int]]], layer: Any, cut: Any, pairs: Any) -> None:
        name = self.names.get(id(layer))
        if name is None or (isinstance(layer, nn.PReLU) and layer.num_parameters == 1):
            return  # an operation without parameters of its own
        makes = self._makes(cut) or is_depthwise(layer)
        units = members.setdefault((name, "out" if makes else "in"), {})
        for pair in pairs:
            units.setdefault(pair.root_idx, set()).add(pair.idx)

    def _makes(self, cut: Any) -> bool:
        return self.graph.is_out_channel_pruning_fn(cut)

    @staticmethod
    def _is_add(node: Any) -> bool:
        """Whether a node adds two streams of features (a bias or a position embedding is not a stream)."""
        kind = str(getattr(node.module, "_grad_fn", ""))
        streams = {id(n) for n in node.inputs if not isinstance(n.module, nn.Parameter)}
        return kind in ("AddBackward0", "SubBackward0") and len(streams) > 1

    def _obstacle(self, node: Any, cut: Any, highest: int) -> str | None:
        """What on the way forbids removing the channels that pass there."""
        named = self.names.get(id(node.module))
        last = named is not None and self._makes(cut) and not node.outputs
        if last or type(node.module).__name__ == "_OutputOp":
            return "its outputs are outputs of the model"
        if highest >= self.widest:
            return "its channels could not be followed through a reshape or concatenation"
        if self.scope == "inside" and id(node) in self.adds:
            return "its channels pass through a residual add (scope='all' takes these too)"
        if is_depthwise(node.module) and not node.inputs:
            return "it reads the model's input channel by channel"
        maker = isinstance(node.module, _ConvNd | nn.Linear) and self._makes(cut)
        if self.scope == "inside" and self.adds and maker and not node.inputs:
            return "it is the stem of a residual network (scope='all' takes it too)"
        return None

    def _clash(self, group: Group) -> str | None:
        """What in the group as a whole forbids removing its units one by one."""
        for member in group.members:
            owner = part(self.model, member.module)
            if isinstance(owner, nn.Parameter):
                owner = self.model.get_submodule(member.module.rpartition(".")[0])
                if type(owner).__module__.startswith("torch.nn"):
                    return f"it is coupled with {member.module}, and no {type(owner).__name__} can be sliced"
            if (member.module, member.axis) in self.claimed:
                return f"it is coupled with {member.module}, which has a group of its own"
            if len({c for unit in member.index for c in unit}) != sum(map(len, member.index)):
                return f"several of its channels meet in one channel of {member.module}"
        return None
