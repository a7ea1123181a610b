"""The lists of blocks that deep networks are made of: timm's ``blocks``, transformers' ``encoder.layer``, …"""

from __future__ import annotations

from torch import nn

from stillhouse.errors import UserError, did_you_mean


def _is_list(module: nn.Module) -> bool:
    """Whether a module holds nothing but composed modules of one class; a layer with a part of its own is none."""
    blocks = list(module.children())
    return (
        isinstance(module, nn.ModuleList | nn.Sequential)
        and bool(blocks)
        and len({type(b) for b in blocks}) == 1
        and not isinstance(blocks[0], nn.Linear | nn.Conv2d)
        and all(any(True for _ in b.children()) and any(True for _ in b.parameters()) for b in blocks)
    )


def block_lists(model: nn.Module) -> list[str]:
    """Paths of the lists of blocks, in the order of the network; of nested ones the innermost.

    A list of blocks is an ``nn.ModuleList`` or ``nn.Sequential`` of composed modules of one class.

    Example:
        >>> block = lambda: nn.TransformerEncoderLayer(4, 1, 8)
        >>> block_lists(nn.Sequential(nn.Linear(2, 4), nn.ModuleList([block(), block()])))
        ['1']
    """
    found = [path for path, module in model.named_modules() if path and _is_list(module)]
    return [p for p in found if not any(other.startswith(f"{p}.") for other in found)]


def block_paths(model: nn.Module) -> list[str]:
    """Paths of all blocks, in the order of the network.

    Raises:
        UserError: the network has no list of blocks.
    """
    paths = [f"{p}.{name}" for p in block_lists(model) for name, _ in model.get_submodule(p).named_children()]
    if not paths:
        raise UserError(f"{type(model).__name__} has no list of blocks of one class; name its parts yourself")
    return paths


def _shapes(block: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(n, tuple(t.shape)) for n, t in block.named_parameters()]


def alike_blocks(model: nn.Module, path: str = "") -> tuple[str, list[nn.Module]]:
    """The list of blocks whose parameters have the same names and shapes, with the most parameters of such lists.

    Args:
        path: of the list; empty finds it.

    Returns:
        Its path and the blocks.

    Raises:
        UserError: no such list, or its blocks differ.

    Example:
        >>> net = nn.ModuleDict({"layers": nn.ModuleList(nn.TransformerEncoderLayer(4, 1, 8) for _ in range(3))})
        >>> path, blocks = alike_blocks(net)
        >>> path, len(blocks)
        ('layers', 3)
    """
    if not path:
        sizes = {}
        for p in block_lists(model):
            blocks = list(model.get_submodule(p).children())
            if all(_shapes(b) == _shapes(blocks[0]) for b in blocks):
                sizes[p] = sum(t.numel() for b in blocks for t in b.parameters())
        if not sizes:
            raise UserError(f"{type(model).__name__} has no list of blocks with the same parameters; name it yourself")
        path = max(sizes, key=lambda p: sizes[p])
    try:
        module = model.get_submodule(path)
    except AttributeError:
        names = [n for n, _ in model.named_modules() if n]
        raise UserError(f"{type(model).__name__} has no module {path!r}; {did_you_mean(path, names)}") from None
    blocks = list(module.children())
    if not isinstance(module, nn.ModuleList | nn.Sequential) or not blocks:
        raise UserError(
            f"{path}: {type(module).__name__} is no list of blocks; {did_you_mean(path, block_lists(model))}"
        )
    for k, block in enumerate(blocks):
        if _shapes(block) != _shapes(blocks[0]):
            raise UserError(f"{path}: block {k} has other parameters than block 0; the blocks of a list must be alike")
    return path, blocks
