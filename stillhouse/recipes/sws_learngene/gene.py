"""The learngene: a network with one block per stage, and the networks of other depths that start from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from stillhouse.models import ModelSpec, replace_head
from stillhouse.outcomes import Member
from stillhouse.students.blocks import alike_blocks
from stillhouse.students.cutting import bare_copy
from stillhouse.students.edits import Depth
from stillhouse.students.plan import Plan
from stillhouse.students.sharing import even_stages, share_by_stage, spread, starts


@dataclass
class Gene:
    """The learned blocks with what stands before and behind them.

    Attributes:
        network: with one block per stage; nothing in it is shared any more.
        path: of its list of blocks.
        plan: how it differs from its base. spec: how that base is built; None for a live module's.
        classes: names of its outputs.
    """

    network: nn.Module
    path: str
    plan: Plan
    spec: ModelSpec | None
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(list(self.network.get_submodule(self.path).children()))

    def expand(self, source: Sequence[int]) -> nn.Module:
        """A network whose block j is a copy of learned block ``source[j]``; stem, norm and head are copies too."""
        return Depth(self.path, tuple(source)).apply(bare_copy(self.network)).requires_grad_(True)

    def member(self, depth: int, importance: float) -> Member:
        """The network of `depth` layers, as it starts."""
        source = spread(depth, len(self))
        plan = self.plan.then(Depth(self.path, source))
        return Member(f"d{depth:02d}", self.expand(source), plan, importance, self.spec)

    def for_classes(self, classes: Sequence[str], seed: int) -> Gene:
        """The same blocks with a fresh head where the classes are others; the same gene where they are not."""
        if tuple(classes) == self.classes:
            return self
        network = bare_copy(self.network)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = [m for m in network.modules() if isinstance(m, nn.Linear)][-1]
            if head.out_features == len(classes):
                head.reset_parameters()
            replace_head(network, len(classes))
        spec = self.spec
        if spec is not None:
            names = {
                "id2label": {str(k): c for k, c in enumerate(classes)},
                "label2id": {c: k for k, c in enumerate(classes)},
            }
            options = {**spec.options, **names} if spec.name.startswith("transformers:") else spec.options
            spec = replace(spec, classes=len(classes), options=options)
        plan = self.plan if spec is None else replace(Plan.identity(spec.build()), edits=self.plan.edits)
        return Gene(network, self.path, plan, spec, tuple(classes))


def shared(
    base: nn.Module, path: str, depth: int, stages: Sequence[int], genes: int
) -> tuple[nn.Module, str, tuple[int, ...]]:
    """The auxiliary network: `base` with `depth` layers in stages, all layers of a stage sharing one block.

    Args:
        base: is copied. path: of its list of blocks; empty finds it.
        depth: layers; 0 takes those of the base, another number spreads them. stages: their sizes; empty takes
            `genes` even ones.

    Returns:
        The network, the path of its blocks, the sizes of the stages.

    Raises:
        UserError: no list of alike blocks; stages that do not add up.
    """
    path, blocks = alike_blocks(base, path)
    depth = depth or len(blocks)
    sizes = tuple(stages) or even_stages(depth, min(genes, depth))
    network = Depth(path, spread(depth, len(blocks))).apply(bare_copy(base)).requires_grad_(True)
    share_by_stage(list(network.get_submodule(path).children()), sizes)
    return network, path, sizes


def learned(
    auxiliary: nn.Module,
    base: nn.Module,
    path: str,
    stages: Sequence[int],
    spec: ModelSpec | None,
    classes: Sequence[str],
) -> Gene:
    """The gene of a trained auxiliary network: the block of every stage once."""
    own, depth = len(list(base.get_submodule(path).children())), sum(stages)
    source = spread(depth, own)
    network = Depth(path, starts(stages)).apply(bare_copy(auxiliary))
    set_drop_path(network, path, 0.0)
    plan = Plan.identity(base).then(Depth(path, tuple(source[i] for i in starts(stages))))
    return Gene(network.cpu().eval(), path, plan, spec, tuple(classes))


def set_drop_path(network: nn.Module, path: str, most: float) -> int:
    """Stochastic depth in the residual branches of timm's blocks, in place: 0 at the first layer, `most` at the last.

    Returns:
        How many branches have it; blocks of other libraries have none.
    """
    from timm.layers import DropPath

    blocks, found = list(network.get_submodule(path).children()), 0
    for j, block in enumerate(blocks):
        rate = most * j / max(1, len(blocks) - 1)
        for name, _ in [n for n in block.named_children() if n[0].startswith("drop_path")]:
            found += 1
            setattr(block, name, DropPath(rate) if rate else nn.Identity())
    return found
