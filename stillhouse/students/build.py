"""From a base network and ratios to a peer set: find groups, score channels, fit budgets, build.

Kept apart from `peers` so that a set can also be built from plans that were made elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.evaluate import evaluating, logits_of
from stillhouse.students.chain import default_trunk, find_head, find_units, trunk_until
from stillhouse.students.peers import Nested, PeerSet, Separate, Tree
from stillhouse.students.plan import Plan
from stillhouse.students.prune import Budget, find_groups, fit_budget, score_groups

Share = Literal["tree", "nested", "none"]


def check_base(base: nn.Module, example: Tensor, classes: int) -> None:
    """One line when a network cannot take the data or has another number of classes."""
    try:
        with torch.no_grad(), evaluating(base):
            out = base(example)
    except Exception as error:
        raise UserError(
            f"{type(base).__name__} cannot take inputs of shape {tuple(example.shape[1:])}: "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from None
    z = logits_of(out)
    if z.dim() != 2 or z.shape[1] != classes:
        raise UserError(
            f"{type(base).__name__} gives outputs of shape {tuple(z.shape)} for {len(example)} inputs, but the data "
            f"have {classes} classes: expected ({len(example)}, {classes})"
        )
    if not torch.isfinite(z).all():
        raise UserError(f"{type(base).__name__} gives NaN or infinity before any training; mend its forward or weights")


def choose_trunks(base: nn.Module, example: Tensor, cuts: Sequence[str], peers: int) -> list[list[str]]:
    """For each peer the unit paths of its trunk.

    Args:
        base: the network.
        example: an input batch.
        cuts: the last shared module, none (about half of the multiply-accumulates), one for all, or one per peer.
        peers: how many.
    """
    units = find_units(base, example)
    if not cuts:
        return [default_trunk(units)] * peers
    each = list(cuts) * peers if len(cuts) == 1 else list(cuts)
    return [trunk_until(units, cut) for cut in each]


def plan_peers(
    base: nn.Module,
    example: Tensor,
    ratios: Sequence[float],
    *,
    trunks: Sequence[Sequence[str]] = (),
    loss: Callable[[nn.Module], Tensor] | None = None,
    score: Literal["snip", "l1", "bn"] = "snip",
    measure: Literal["macs", "params"] = "macs",
    scope: Literal["inside", "all"] = "inside",
    layer_bound: float = 0.9,
    round_to: int = 1,
) -> tuple[list[Plan], list[Budget], list[str]]:
    """One plan per ratio from one set of scores, so that smaller peers are nested in larger ones.

    With trunks a ratio refers to what lies behind the peer's trunk; the trunk itself stays whole.

    Returns:
        plans, budgets, and sentences about what cannot be pruned.
    """
    plans, budgets, left = [], [], []
    scored: dict[tuple[str, ...], tuple[list, list[Tensor]]] = {}
    for i, ratio in enumerate(ratios):
        trunk = tuple(trunks[i]) if trunks else ()
        if trunk not in scored:
            groups, why = find_groups(base, example, ignore=trunk, scope=scope)
            # That a trunk stays whole goes without saying.
            left += [w for w in why if w not in left and not any(w.startswith((f"{t}:", f"{t}.")) for t in trunk)]
            if not groups and any(ratios):
                raise UserError(f"nothing in {type(base).__name__} can be pruned: " + "; ".join(why[:3]))
            scored[trunk] = groups, score_groups(base, groups, score, loss) if groups else []
        plan, budget = fit_budget(
            base,
            example,
            *scored[trunk],
            ratio,
            measure=measure,
            layer_bound=layer_bound,
            round_to=round_to,
            whole=trunk,
        )
        plans.append(plan)
        budgets.append(budget)
    return plans, budgets, left


def build_peers(
    base: nn.Module,
    plans: Sequence[Plan],
    example: Tensor,
    *,
    share: Share = "tree",
    trunks: Sequence[Sequence[str]] = (),
    fresh: bool = False,
    seeds: Sequence[int] = (),
) -> PeerSet:
    """The peer set of a base: `Tree`, `Nested` or `Separate`.

    Args:
        base: the network the plans were made for; copied.
        plans: one per peer.
        example: an input batch.
        share: what the peers share.
        trunks: for ``tree``, the unit paths of each peer's trunk.
        fresh: peers start from seeds of their own.
        seeds: one per peer, for `fresh`.
    """
    head = find_head(base, example)
    peers: PeerSet
    if share == "tree":
        peers = Tree(base, plans, head, trunks=trunks, example=example, fresh=fresh, seeds=seeds)
    elif share == "nested":
        peers = Nested(base, plans, head)
    elif share == "none":
        peers = Separate(base, plans, head, fresh=fresh, seeds=seeds)
    else:
        raise UserError(f"share: expected tree, nested or none, got {share!r}")
    peers.rank = example.dim()
    return peers
