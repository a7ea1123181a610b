"""LoRA as a second voice of one network: the fake score shares every weight of its teacher but its adapters."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.diffusion.denoiser import Condition, Denoiser
from stillhouse.errors import UserError, did_you_mean, need
from stillhouse.evaluate import evaluating

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


class Adapted(Denoiser):
    """The teacher's network with low-rank adapters, W + (α/r) B A, and a camera if wanted: a trainable fake score.

    The network is built a second time around the SAME weight tensors, so that teacher and fake cost one copy, and the
    user's network is not touched: no adapter has to be switched off for the teacher, and none can be left on. B starts
    at zero: at first the fake says what the teacher says, bit for bit (checked). Only the adapters (and the camera's
    layers) are `weights`; the base is not a part of the System, so it is neither trained nor saved, and stays in eval.

    Args:
        teacher: a denoiser whose network is a torch.nn.Module; its weights are frozen here.
        rank, alpha: r and α; alpha None takes r.
        targets: which layers: "attention" (linear layers of attention), "convolutions", "linear", or endings of module
            names ("to_q", "conv1"); empty takes attention and convolutions, or all linear layers where there are none.
        camera: k > 0: a camera of k numbers is embedded and added to the time embedding.
        seed: of A.

    Raises:
        UserError: a target that matches nothing, or a camera for a network without ``time_embedding``.

    Source: LoRA arXiv 2106.09685; as a fake score arXiv 2305.16213.
    """

    network: nn.Module

    def __init__(
        self,
        teacher: Denoiser,
        *,
        rank: int = 4,
        alpha: float | None = None,
        targets: Sequence[str] = (),
        camera: int = 0,
        seed: int = 0,
    ):
        if not isinstance(teacher.network, nn.Module):
            raise UserError(f"LoRA needs a torch.nn.Module, got {type(teacher.network).__name__}; train a network")
        if rank < 1:
            raise UserError(f"the rank of LoRA must be at least 1, got {rank}")
        teacher.freeze()
        twin = second_tree(teacher.network)
        super().__init__(twin, teacher.process, teacher.prediction, null=teacher.null)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            adapters_ = add_lora(twin, rank, rank if alpha is None else alpha, targets)
            self.embedding = CameraEmbedding(camera, twin) if camera else None
        self.weights = nn.ModuleDict({"lora": nn.ParameterList(adapters_)})
        if self.embedding is not None:
            self.weights["camera"] = self.embedding
        twin.eval()

    def predict(self, x_t: Tensor, t: Tensor, condition: Condition = None, *, camera: Tensor | None = None) -> Tensor:
        if camera is None or self.embedding is None:
            return super().predict(x_t, t, condition)
        with self.embedding.added(self.network, camera):
            return super().predict(x_t, t, condition)


class CameraEmbedding(nn.Module):
    """Two layers, k → d → d, whose answer is added to a network's time embedding; the last starts at zero (ours)."""

    def __init__(self, k: int, network: nn.Module):
        super().__init__()
        time = getattr(network, "time_embedding", None)
        last = [m for m in time.modules() if isinstance(m, nn.Linear)] if isinstance(time, nn.Module) else []
        if not last:
            raise UserError(f"a camera needs a network with time_embedding (a UNet); {type(network).__name__} has none")
        width = last[-1].out_features
        self.layers = nn.Sequential(nn.Linear(k, width), nn.SiLU(), nn.Linear(width, width))
        nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]
        nn.init.zeros_(self.layers[-1].bias)  # type: ignore[arg-type]

    def forward(self, camera: Tensor) -> Tensor:
        return self.layers(camera)

    @contextmanager
    def added(self, network: Any, camera: Tensor) -> Iterator[None]:
        """While this is open, `network` is told the camera (n, k)."""
        said = self(camera)
        hook = network.time_embedding.register_forward_hook(lambda module, args, out: out + said.to(out.dtype))
        try:
            yield
        finally:
            hook.remove()


def second_tree(network: nn.Module) -> nn.Module:
    """The same network built again around the same tensors: changing its modules leaves the first one as it is.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2))
        >>> twin = second_tree(net)
        >>> twin[0] is net[0], twin[0].weight is net[0].weight
        (False, True)
    """
    shared = {id(t): t for t in [*network.parameters(), *network.buffers()]}
    return copy.deepcopy(network, shared)


def add_lora(network: nn.Module, rank: int, alpha: float, targets: Sequence[str] = ()) -> list[nn.Parameter]:
    """Puts adapters into a network, in place, and gives their parameters; all others are frozen.

    Raises:
        UserError: a target that matches nothing.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError:
        raise need("diffusion", "peft") from None
    names = choose(network, targets)
    network.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=names, lora_dropout=0.0)  # type: ignore[arg-type]
    inject_adapter_in_model(config, network)
    return [p for p in network.parameters() if p.requires_grad]


def choose(network: nn.Module, targets: Sequence[str] = ()) -> list[str]:
    """Full names of the layers that get adapters; see `Adapted`.

    Example:
        >>> choose(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
        ['0']
    """
    layers = {n: m for n, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    kinds = {
        "attention": [n for n, m in layers.items() if isinstance(m, nn.Linear) and _ends(n, ATTENTION)],
        "convolutions": [n for n, m in layers.items() if isinstance(m, nn.Conv2d)],
        "linear": [n for n, m in layers.items() if isinstance(m, nn.Linear)],
    }
    if not targets:
        found = kinds["attention"] + kinds["convolutions"] or kinds["linear"]
        if not found:
            raise UserError(f"{type(network).__name__} has no linear layers or convolutions to put LoRA on")
        return found
    chosen: list[str] = []
    for target in targets:
        mine = kinds.get(target, [n for n in layers if _ends(n, (target,))])
        if not mine:
            endings = (n.rpartition(".")[2] for n in layers if not n.rpartition(".")[2].isdigit())
            known = did_you_mean(target, [*(kind for kind, some in kinds.items() if some), *endings])
            raise UserError(f"LoRA target {target!r} matches no layer of {type(network).__name__}; {known}")
        chosen += [n for n in mine if n not in chosen]
    return chosen


def _ends(name: str, endings: Sequence[str]) -> bool:
    return any(name == e or name.endswith(f".{e}") for e in endings)


@contextmanager
def adapters(network: nn.Module, on: bool) -> Iterator[nn.Module]:
    """While this is open, the adapters of a network are on or off; afterwards each is as it was.

    With ``on=False`` a network with LoRA is its base, bit for bit.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [(m, not m.disable_adapters) for m in network.modules() if isinstance(m, BaseTunerLayer)]
    for m, _ in layers:
        m.enable_adapters(on)
    try:
        yield network
    finally:
        for m, was in layers:
            m.enable_adapters(was)


def check_twin(teacher: Denoiser, fake: Adapted, x: Tensor, condition: Condition = None) -> None:
    """Refuses a fake that does not start as its teacher: bit for bit with adapters off, to rounding with them on.

    Raises:
        UserError: they differ (a network that is not a function of its inputs and weights alone).
    """
    t = torch.as_tensor([fake.process.at(0.5)], device=x.device).expand(len(x))
    with torch.no_grad(), evaluating(fake.network):
        first, second = teacher.predict(x, t, condition), fake.predict(x, t, condition)
        with adapters(fake.network, on=False):
            off = fake.predict(x, t, condition)
    if not torch.equal(first, off) or not torch.allclose(first, second, atol=1e-5):
        raise UserError(
            f"{type(teacher.network).__name__} with its adapters off differs from itself by "
            f"{float((first - off).abs().max()):.2g}; it must be a function of its inputs and weights alone"
        )
