"""Peer sets: m students of one base, trained together, sharing nothing, a trunk, or every weight.

`PeerSet` is what a mutual-learning System holds: ``peers(x) -> (m, n, c)`` logits. How the peers share is one of

* `Separate` — m dense networks of their own;
* `Tree` — the first layers are one network, computed once; peers part from it at the same or at different depths;
* `Nested` — every weight tensor is one; peer i reads its slice; normalisation and the head's bias are its own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.evaluate import logits_of
from stillhouse.students.norms import frozen_statistics
from stillhouse.students.plan import Plan, bare_copy, take
from stillhouse.system import fold
from stillhouse.taps import tap


class PeerSet(nn.Module):
    """m students in one module; the base class of `Separate`, `Tree` and `Nested`.

    Args:
        base: the network the plans were made for; never changed.
        plans: one per peer; the identity keeps a peer whole.
        head: path of the last linear layer, whose input is a peer's feature vector.

    Attributes:
        grad_scale: factor on the gradient of each shared parameter, by name (see `average_shared`).
        rank: dimensions of an ordinary input batch; one more means a view per peer, (n, m, …).
    """

    kind = ""

    def __init__(self, base: nn.Module, plans: Sequence[Plan], head: str):
        super().__init__()
        self.plans, self.head = tuple(plans), head
        self.grad_scale: dict[str, float] = {}
        self.rank: int | None = None
        self._template = (bare_copy(base).cpu(),)  # in a tuple: not a submodule
        self.bodies = nn.ModuleList()

    def __len__(self) -> int:
        return len(self.plans)

    def forward(self, x: Tensor, only: Sequence[int] | None = None) -> Tensor:
        """Logits of the peers, (m, n, c); `only` some of them. ``x`` is (n, …), or (n, m, …) with a view per peer."""
        self.begin()
        which = range(len(self)) if only is None else only
        return torch.stack([logits_of(self.peer(i, x)) for i in which])

    def view(self, i: int, x: Tensor) -> Tensor:
        """What peer i sees of an input batch."""
        return x[:, i] if self.rank is not None and x.dim() > self.rank else x

    def with_features(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits (m, n, c) and each peer's input of its head, [(n, d_i)]."""
        self.begin()
        logits, features = [], []
        for i in range(len(self)):
            with tap(self.bodies[i], [f"{self.head}:in"]) as seen:
                logits.append(logits_of(self.peer(i, x)))
            features.append(seen[f"{self.head}:in"].flatten(1))
        return torch.stack(logits), features

    def begin(self) -> None:
        """Called before the peers run on a new batch."""

    def peer(self, i: int, x: Tensor) -> Any:
        """The raw output of peer i."""
        return self.bodies[i](x)

    def student(self, i: int) -> nn.Module:
        """Peer i as a dense network of its own, with the base's parameter names; a copy."""
        model = self.plans[i].build(self._template[0])
        tensors = {k: v.detach().to("cpu", copy=True) for k, v in self.tensors(i).items()}
        model.load_state_dict(tensors)
        return model.eval()

    def tensors(self, i: int) -> dict[str, Tensor]:
        """Peer i's state dict under the base's names."""
        return self.bodies[i].state_dict()

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that training moves, by name in this module."""
        return {k: p for k, p in self.named_parameters() if p.requires_grad}

    def users(self) -> dict[str, int]:
        """How many peers use each shared parameter, by name in this module."""
        return {}

    def average_shared(self) -> None:
        """From now on a shared parameter's gradient is the mean, not the sum, of what its peers send it.

        Without this k peers give a trunk k times the step of a single network (CL-ILR's backprop rescaling,
        here per parameter, so that peers may leave the trunk at different depths).
        """
        self.grad_scale = {name: 1 / k for name, k in self.users().items()}
        for name, factor in self.grad_scale.items():
            self.get_parameter(name).register_hook(lambda g, f=factor: g * f)


class Separate(PeerSet):
    """Peers that share nothing: m pruned copies.

    Args:
        fresh: re-initialise every peer from its own seed instead of inheriting the base's weights.
    """

    kind = "none"

    def __init__(
        self, base: nn.Module, plans: Sequence[Plan], head: str, *, fresh: bool = False, seeds: Sequence[int] = ()
    ):
        super().__init__(base, plans, head)
        for i, plan in enumerate(plans):
            body = plan.build(base)
            if fresh:
                reinitialise(body, seeds[i])
            self.bodies.append(body)

    def peer(self, i: int, x: Tensor) -> Any:
        return self.bodies[i](self.view(i, x))


class Reuse(nn.Module):
    """Stands where a trunk unit was: computes it for the first peer that asks, then gives the same tensor.

    What lies between trunk units (additions, reshapes) runs again for every peer, but on these tensors, so any
    network whose units are called once can be a tree; no tracing is needed.
    """

    def __init__(self, key: str, unit: nn.Module, memo: dict[str, Any]):
        super().__init__()
        self.key, self.memo = key, memo
        self._unit = (unit,)  # in a tuple: the trunk owns it, not this body

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.key not in self.memo:
            self.memo[self.key] = self._unit[0](*args, **kwargs)
        return self.memo[self.key]


class Tree(PeerSet):
    """A shared trunk, computed once, and pruned private tails.

    Args:
        trunks: for each peer the module paths of its trunk, in the order they run; prefixes of one chain.
        example: one input batch, to check that sharing changes nothing.

    Running statistics of the trunk move once per step, because the trunk runs once per step.
    """

    kind = "tree"

    def __init__(
        self,
        base: nn.Module,
        plans: Sequence[Plan],
        head: str,
        *,
        trunks: Sequence[Sequence[str]],
        example: Tensor,
        fresh: bool = False,
        seeds: Sequence[int] = (),
    ):
        super().__init__(base, plans, head)
        self.trunks = [tuple(t) for t in trunks]
        self.memo: dict[str, Any] = {}
        chain = max(self.trunks, key=len)
        users = {path: [i for i, t in enumerate(self.trunks) if path in t] for path in chain}
        if any(t != chain[: len(t)] for t in self.trunks):
            raise UserError("the peers' trunks must be beginnings of one another")
        shared = [path for path in chain if len(users[path]) > 1 or len(plans) == 1]
        self.trunk = nn.ModuleDict({_key(path): copy.deepcopy(base.get_submodule(path)) for path in shared})
        for i, plan in enumerate(plans):
            body = plan.build(base)
            if fresh:
                reinitialise(body, seeds[i])
            for path in self.trunks[i]:
                if _key(path) in self.trunk:
                    body.set_submodule(path, Reuse(path, self.trunk[_key(path)], self.memo))
            self.bodies.append(body)
        self._loans: list[list[tuple[nn.Module, str, nn.Module]]] = [[] for _ in plans]
        self.borrowed = self._find_silent(example)
        for i, names in self.borrowed.items():
            for name, j in names.items():
                path, _, leaf = name.rpartition(".")
                module, owner = (self.bodies[k].get_submodule(path) for k in (i, j))
                del module._parameters[leaf]
                self._loans[i].append((module, leaf, owner))
        self._check(example)

    def begin(self) -> None:
        self.memo.clear()

    def peer(self, i: int, x: Tensor) -> Any:
        try:
            for module, leaf, owner in self._loans[i]:
                module.__dict__[leaf] = getattr(owner, leaf)
            return self.bodies[i](x)
        finally:
            for module, leaf, _ in self._loans[i]:
                module.__dict__.pop(leaf, None)

    def forward(self, x: Tensor, only: Sequence[int] | None = None) -> Tensor:
        z = super().forward(x, only)
        self.memo.clear()
        return z

    def boundary(self, x: Tensor) -> tuple[Tensor, list[Tensor], Tensor]:
        """Logits, head features, and the output of the last unit that every peer shares."""
        last = min(self.trunks, key=len)[-1]
        z, features = self.with_features(x)
        h = self.memo[last]
        self.memo.clear()
        return z, features, h

    def tensors(self, i: int) -> dict[str, Tensor]:
        state = dict(self.bodies[i].state_dict())
        for path in self.trunks[i]:
            if _key(path) in self.trunk:
                unit = self.trunk[_key(path)].state_dict()
                state.update({f"{path}.{k}": v for k, v in unit.items()})
        for name, j in self.borrowed.get(i, {}).items():
            state[name] = self.bodies[j].get_parameter(name)
        return state

    def users(self) -> dict[str, int]:
        count = {_key(p): sum(p in t for t in self.trunks) for p in max(self.trunks, key=len)}
        found = {k: count[k.split(".")[1]] for k in self.trained() if k.startswith("trunk.")}
        for names in self.borrowed.values():
            for name, j in names.items():
                key = f"bodies.{j}.{name}"
                found[key] = found.get(key, 1) + 1
        return found

    def _find_silent(self, example: Tensor) -> dict[int, dict[str, int]]:
        """Parameters of peer i that lie before its boundary (position embeddings, say) and reach nothing.

        What lies between trunk units runs for every peer, but only the peer that first computes the next unit is
        heard. The others borrow its parameters: ``{i: {name: that peer}}``.
        """
        with frozen_statistics(self):
            total = self(example).float().square().sum()
        named = [(i, k, p) for i, body in enumerate(self.bodies) for k, p in body.named_parameters() if p.requires_grad]
        try:
            grads = torch.autograd.grad(total, [p for _, _, p in named], allow_unused=True)
        except RuntimeError as error:
            if "inplace operation" not in str(error):
                raise
            raise UserError(
                f"peers cannot share up to {max(self.trunks, key=len)[-1]!r}: what follows overwrites its output in "
                "place (as ReLU(inplace=True) does); let the --trunk end behind that"
            ) from None
        heard: dict[str, list[int]] = {}
        found: dict[int, dict[str, int]] = {}
        for (i, name, _), g in zip(named, grads, strict=True):
            before = heard.setdefault(name, [])
            if g is not None:
                before.append(i)
            elif before:  # of those heard before, the ones with shorter trunks use theirs behind their boundary
                found.setdefault(i, {})[name] = max(before, key=lambda j: len(self.trunks[j]))
        return found

    def _check(self, example: Tensor) -> None:
        """Every peer here must compute what it will compute alone, also after training has moved its weights."""
        trial = copy.deepcopy(self).eval()
        with torch.no_grad():
            for name, p in trial.named_parameters():
                if p.requires_grad:
                    g = torch.Generator().manual_seed(fold("tree check", name))
                    size = 0.1 * (float(p.abs().mean()) or 1.0)
                    p.add_(size * torch.randn(p.shape, generator=g).to(p))
            together = trial(example)
            for i in range(len(trial)):
                alone = logits_of(trial.student(i).to(example.device)(example))
                if not torch.allclose(together[i], alone, rtol=1e-3, atol=1e-4 * float(alone.abs().max())):
                    raise UserError(
                        f"peers cannot share up to {self.trunks[i][-1]!r}: the network does not run its parts in one "
                        "chain there; name an earlier --trunk, or use --share none or nested"
                    )


class Nested(PeerSet):
    """One set of weights; every peer reads its slice of each tensor, with its own normalisation and head bias."""

    kind = "nested"

    def __init__(self, base: nn.Module, plans: Sequence[Plan], head: str):
        super().__init__(base, plans, head)
        private = private_names(base, head)
        tensors = dict(base.named_parameters())
        self.weights = nn.ParameterDict({_key(k): nn.Parameter(v.detach().clone()) for k, v in tensors.items()
                                         if k not in private})  # fmt: skip
        self._views: list[list[tuple[nn.Module, str, str, tuple[tuple[int, Tensor], ...]]]] = []
        for plan in plans:
            body, slices, views = plan.build(base), plan.slices(base), []
            for name in tensors:
                if name not in private:
                    path, _, leaf = name.rpartition(".")
                    module = body.get_submodule(path)
                    del module._parameters[leaf]
                    views.append((module, leaf, _key(name), slices.get(name, ())))
            self.bodies.append(body)
            self._views.append(views)

    def peer(self, i: int, x: Tensor) -> Any:
        x = self.view(i, x)
        try:
            for module, leaf, key, slices in self._views[i]:
                weight = self.weights[key]
                module.__dict__[leaf] = take(weight, _on(slices, weight.device))
            return self.bodies[i](x)
        finally:  # free the slices, and leave nothing for a copy of the module to carry along
            for module, leaf, _, _ in self._views[i]:
                module.__dict__.pop(leaf, None)

    def tensors(self, i: int) -> dict[str, Tensor]:
        state = dict(self.bodies[i].state_dict())
        slices = self.plans[i].slices(self._template[0])
        for key, weight in self.weights.items():
            name = key.replace("/", ".")
            state[name] = take(weight, _on(slices.get(name, ()), weight.device))
        return state

    def users(self) -> dict[str, int]:
        return {k: len(self) for k in self.trained() if k.startswith("weights.")}


def _key(path: str) -> str:
    return path.replace(".", "/")


def _on(slices: Iterable[tuple[int, Tensor]], device: torch.device) -> tuple[tuple[int, Tensor], ...]:
    return tuple((dim, index.to(device)) for dim, index in slices)


def private_names(model: nn.Module, head: str) -> set[str]:
    """Parameters that nested peers must not share: batch normalisation and the head's bias."""
    names = {f"{head}.bias"}
    for path, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            names |= {f"{path}.{k}" if path else k for k, _ in module.named_parameters(recurse=False)}
    return names


def reinitialise(model: nn.Module, seed: int) -> None:
    """Draws every layer's weights anew with its own ``reset_parameters``, from a seed of this model's own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in model.modules():
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if callable(reset):
                reset()
