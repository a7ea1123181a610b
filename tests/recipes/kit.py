"""Small networks, peer sets and batches for the checks of the peer-set recipes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.models import CNN, ResNet
from stillhouse.recipes.wml.config import Config
from stillhouse.recipes.wml.mutual import Mutual
from stillhouse.recipes.wml.rules import make_rule
from stillhouse.students.build import build_peers, choose_trunks, plan_peers
from stillhouse.students.peers import PeerSet, Tree
from stillhouse.system import Clock, fold

SHARES = ("tree", "nested", "none")
SHAPE, CLASSES = (2, 8, 8), 3
RATIOS = (0.0, 0.4, 0.7)


def images(n: int = 5, seed: int = 0, copies: int = 0) -> dict[str, Tensor]:
    """A batch of float64 images with labels, `copies` views of each when asked for."""
    g = torch.Generator().manual_seed(fold("images", seed))
    shape = (n, copies, *SHAPE) if copies else (n, *SHAPE)
    x = torch.randn(*shape, generator=g, dtype=torch.float64)
    return {"input": x, "label": torch.arange(n) % CLASSES, "id": torch.arange(n)}


def shake(model: nn.Module, seed: int = 0, size: float = 0.3) -> None:
    """Moves every parameter and running statistic, each by noise of its own, so that no two are alike by chance."""
    with torch.no_grad():
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if t.is_floating_point() and not name.startswith("omega"):
                g = torch.Generator().manual_seed(fold("shake", seed, name))
                noise = size * torch.rand(t.shape, generator=g, dtype=t.dtype)
                t.copy_(t * (1 + noise) if t.dim() != 1 else t + noise)


def base_network(kind: str = "resnet", seed: int = 0) -> nn.Module:
    """A residual or a plain network with batch normalisation, in float64, with statistics that are not 0 and 1."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ResNet(SHAPE, CLASSES, 8, 4) if kind == "resnet" else CNN(SHAPE, CLASSES, (4, 6, 8))
    model.double()
    shake(model, seed)
    return model.train()


def peer_set(
    share: str,
    ratios: tuple[float, ...] = RATIOS,
    *,
    cut: tuple[str, ...] = ("layer1",),
    base: nn.Module | None = None,
    seed: int = 0,
    moved: bool = True,
    example: Tensor | None = None,
    fresh: bool = False,
) -> PeerSet:
    """Peers of `base`, their weights moved apart as training would."""
    base = base_network() if base is None else base
    x = images(2)["input"] if example is None else example
    trunks = choose_trunks(base, x, cut, len(ratios)) if share == "tree" else []
    plans, _, _ = plan_peers(base, x[:1], ratios, trunks=trunks, score="l1")
    seeds = list(range(len(ratios)))
    peers = build_peers(base, plans, x, share=share, trunks=trunks, fresh=fresh, seeds=seeds)  # type: ignore[arg-type]
    if moved:
        shake(peers, seed + 1, 0.1)
    return peers.train()


def learner(share: str, rule: str = "wml", peers: PeerSet | None = None, **settings: Any) -> Mutual:
    """A System over `peers`, in float64, with uneven importance."""
    peers = peer_set(share) if peers is None else peers
    m = len(peers)
    cfg = Config(
        **{"ratios": tuple(k / 10 for k in range(m)), "share": share, "rule": rule, "temperature": 2.0, **settings}
    )
    widths, channels = sizes(peers)
    made = Mutual(peers, cfg, make_rule(rule, share, m, widths, channels, cfg.detach)).double().train()
    if m == 3:
        made.omega.data = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    return made


def sizes(peers: PeerSet) -> tuple[list[int], int]:
    was, x = peers.training, torch.zeros(2, *SHAPE, dtype=torch.float64)
    with torch.no_grad():
        peers.eval()
        if isinstance(peers, Tree):
            _, features, trunk = peers.boundary(x)
            channels = trunk.shape[1]
        else:
            features, channels = peers.with_features(x)[1], 0
    peers.train(was)
    return [f.shape[1] for f in features], channels


def gradients(system: Mutual, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the Update 'mutual' gives each parameter, as the engine computes it."""
    from stillhouse.system import Terms

    params = {**{f"peers.{k}": p for k, p in system.peers.trained().items()},
              **{f"rule.{k}": p for k, p in system.rule.named_parameters()}}  # fmt: skip
    system.zero_grad(set_to_none=True)
    result = system.mutual({"train": batch}, Clock())
    if isinstance(result, Terms):
        result.total.backward(inputs=list(params.values()))
        return {k: torch.zeros_like(p) if p.grad is None else p.grad.clone() for k, p in params.items()}
    found = zip(params.items(), result.grads, strict=True)
    return {k: torch.zeros_like(p) if g is None else g.clone() for (k, p), g in found}


def state(system: nn.Module) -> dict[str, bytes]:
    return {k: v.detach().cpu().contiguous().numpy().tobytes() for k, v in system.state_dict().items()}
