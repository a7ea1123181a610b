"""Who teaches whom: the rules of online distillation over one peer set.

A rule turns the peers' logits z (m, n, c) into one label part and one teaching part, both summed over peers.
With a = α (after its ramp) and K[j→i] = T²·KL(softmax(z_j/T) ‖ softmax(z_i/T)), batch means:

==============  ================================================================================================
independent     Σ_i CE_i
wml             m·[(1−a) Σ_i ω_i CE_i  +  a Σ_j ω_j Σ_{i≠j} K[j→i]]               teachers detached
dml             (1−a) Σ_i CE_i  +  a/(m−1) Σ_{j≠i} K[j→i]                          teachers detached
cl-ilr          (1−a) Σ_i CE_i  +  a Σ_i K[mean of the others → i]                  target detached
kdcl-*          (1−a) Σ_i CE_i  +  a Σ_i K[one common target → i]                   target detached
one             (1−a) (Σ_i CE_i + CE_e)  +  a Σ_i K[gated ensemble e → i]           target detached
okddip          (1−a) Σ_i CE_i  +  a Σ_i K[attention mix → i]; the leader: mean → leader   NOT detached
sandwich        CE_widest  +  Σ_others soft cross-entropy to the widest (T = 1)    target detached
==============  ================================================================================================

α = 0.5 gives the published balance of dml, cl-ilr, one and okddip (label and teaching parts with equal weight) up to
the common factor ½. Sources: DML arXiv 1706.00384, CL-ILR and ONE (arXiv 1806.04606) NeurIPS 2018, KDCL CVPR 2020,
OKDDip arXiv 1912.00350, US-Nets ICCV 2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from stillhouse.errors import UserError, did_you_mean
from stillhouse.objectives import ensembles
from stillhouse.objectives.logits import cross_entropy, kl, mean_of_others, pairwise_kl, soft_cross_entropy, upcast
from stillhouse.system import Clock


@dataclass(frozen=True)
class Seen:
    """What a rule may look at in one step."""

    z: Tensor  # logits of the peers, (m, n, c)
    y: Tensor  # labels, (n,) or (m, n) when peers have labels of their own
    alpha: float  # weight of teaching against labels, after its ramp
    T: float  # temperature
    omega: Tensor  # importance of the peers, (m,), detached
    features: list[Tensor]  # input of each peer's head, (n, d_i); empty unless asked for
    trunk: Tensor | None  # output of the shared trunk, (n, …)

    @property
    def ce(self) -> Tensor:
        """Cross-entropy of each peer, (m,)."""
        return cross_entropy(self.z, self.y).mean(-1)

    def learn_from(self, target: Tensor, detach: bool = True) -> Tensor:
        """Σ_i K[target_i → i] for targets (n, c) or (m, n, c)."""
        return kl(target.expand_as(self.z), self.z, self.T, detach_teacher=detach).mean(-1).sum()


class Rule(nn.Module):
    """A teaching rule; `forward` gives the label and the teaching part.

    Attributes:
        wants: what of `Seen` it needs beyond the logits: ``"features"``, ``"trunk"``.
        held_out: whether it needs held-out data.
        averages: whether shared weights take the mean of the peers' gradients (else their sum).
    """

    wants: ClassVar[frozenset[str]] = frozenset()
    held_out: ClassVar[bool] = False
    averages: ClassVar[bool] = True

    def forward(self, s: Seen) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def choose(self, m: int, clock: Clock) -> list[int] | None:
        """The peers that take part in this step; None is all."""
        return None

    def weights(self, omega: Tensor) -> Tensor:
        """The ensemble's weights that go with this rule, (m,)."""
        return omega


class Independent(Rule):
    def forward(self, s: Seen) -> tuple[Tensor, Tensor]:
        return s.ce.sum(), s.z.new_zeros(())


class WML(Rule):
    """Equations (1) and (2) of Weighted Mutual Learning: peer j's importance multiplies what it learns and teaches."""

    held_out = True

    def __init__(self, detach: bool = True):
        super().__init__()
        self.detach = detach

    def per_peer(
        self, z: Tensor, y: Tensor, alpha: float, T: float, teacher: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The two parts of L_a, each (m,): (1−α) CE_j and α Σ_{i≠j} K[j→i], with j as the teacher."""
        teach = pairwise_kl(z, T, detach=self.detach, teacher=teacher if self.detach else None).mean(-1)
        return (1 - alpha) * cross_entropy(z, y).mean(-1), alpha * teach.sum(1)

    def forward(self, s: Seen) -> tuple[Tensor, Tensor]:
        label, teach = self.per_peer(s.z, s.y, s.alpha, s.T)
        return len(s.z) * (s.omega * label).sum(), len(s.z) * (s.omega * teach).sum()


class DML(Rule):
    def forward(self, s: Seen) -> tuple[Tensor, Tensor]:
        teach = pairwise_kl(s.z, s.T).mean(-1).sum() / max(1, len(s.z) - 1)
        return (1 - s.alpha) * s.ce.sum(), s.alpha * teach


class CLILR(Rule):
    def forward(self, s: Seen) -> tuple[Tensor, Tensor]:
        return (1 - s.alpha) * s.ce.sum(), s.alpha * s.learn_from(mean_of_others(s.z))


class KDCL(Rule):
    """One common target from all peers; ``general`` weighs them by the inverse covariance of held-out errors."""

    VARIANTS = ("mean", "naive", "linear", "minlogit", "general")

    def __init__(self, variant: str, m: int):
        super().__init__()
        self.variant = variant
        self.held_out = variant == "general"  # type: ignore[misc]
        self.register_buffer("general", torch.full((m,), 1.0 / m))
        self.general: Tensor

    def target(self, z: Tensor, y: Tensor) -> Tensor:
        z, y = z.detach(), y if y.dim() == 1 else y[0]
        if self.variant == "general":
            return torch.tensordot(self.general.to(z.dtype), z, dims=1)
        if self.variant == "mean":
            return ensembles.kdcl_mean(z)
        by_label = {
            "naive": ensembles.kdcl_naive,
            "linear": ensembles.kdcl_linear,
            "minlogit": ensembles.kdcl_minlogit,
        }
        return by_label[self.variant](z, y)

    def refresh(self, z: Tensor, y: Tensor) -> None:
        """New ``general`` weights from logits (m, n, c) and labels on held-out data."""
        self.general.copy_(ensembles.general_weights(ensembles.error_covariance(z, y)))

    def forward(self, s: Seen) -> tuple[Tensor, Tensor]:
        return (1 - s.alpha) * s.ce.sum(), s.alpha * s.learn_from(self.target(s.z, s.y))

    def weights(self, omega: Tensor) -> Tensor:
        return self.general if self.variant == "general" else omega


class ONE(Rule):
    """A gate on the trunk's features mixes the branches, sample by sample, into the teacher of all."""

    wants = frozenset({"trunk"})

    def __init__(self, m: int, channels: int):
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(channels, m), nn.BatchNorm1d(m), nn.ReLU())

    def mix(self, s: Seen) -> Tensor:
        """Weights of the branches, (n, m); rows sum to one."""
        assert s.trunk is not None
        h = s.trunk.flatten(2).mean(-1) if s.trunk.dim() > 2 else s.trunk
        return torch.softmax(self.gate(upcast(h)), -1)

    def forward(self, s: Seen) -> tuple[Tensor, Tensor]:
        ensemble = torch.einsum("nm,mnc->nc", self.mix(s), upcast(s.z))
        y = s.y if s.y.dim() == 1 else s.y[0]
        label = s.ce.sum() + cross_entropy(ensemble, y).mean()
        return (1 - s.alpha) * label, s.alpha * s.learn_from(ensemble)


class OKDDip(Rule):
    """Auxiliary peers learn from attention mixes of one another; the leader (the last peer) from their mean.

    The targets are not detached: the attention's only gradient comes through them.
    """

    wants = frozenset({"features"})

    def __init__(self, widths: list[int], dim: int = 8):
        super().__init__()
        if len(widths) < 2:
            raise UserError("rule okddip needs at least 2 peers (auxiliary ones and a leader)")
        # Peers of different width cannot share one projection as in the paper: each has its own pair.
        self.query = nn.ModuleList(nn.Linear(w, dim, bias=False) for w in widths[:-1])
        self.key = nn.ModuleList(nn.Linear(w, dim, bias=False) for w in widths[:-1])

    def attention(self, features: list[Tensor]) -> Tensor:
        """a[n, i, j]: how much auxiliary peer i listens to j on sample n; rows sum to one."""
        q = torch.stack([f(upcast(h)) for f, h in zip(self.query, features, strict=False)], 1)
        k = torch.stack([f(upcast(h)) for f, h in zip(self.key, features, strict=False)], 1)
        return torch.softmax(q @ k.transpose(1, 2), -1)

    def forward(self, s: Seen) -> tuple[Tensor, Tensor]:
        aux = upcast(s.z[:-1])
        targets = torch.einsum("nij,jnc->inc", self.attention(s.features), aux)
        every = torch.cat([targets, aux.mean(0, keepdim=True)])
        return (1 - s.alpha) * s.ce.sum(), s.alpha * s.learn_from(every, detach=False)


class Sandwich(Rule):
    """US-Net training: the widest learns labels, every other width learns the widest (T = 1), gradients add up.

    A step trains the widest, the narrowest and two others at random.
    """

    averages = False

    def choose(self, m: int, clock: Clock) -> list[int] | None:
        if m <= 4:
            return None
        middle = 1 + torch.randperm(m - 2, generator=clock.generator("sandwich"))[:2]
        return [0, *sorted(middle.tolist()), m - 1]

    def forward(self, s: Seen) -> tuple[Tensor, Tensor]:
        widest, others = s.z[0], s.z[1:]
        y = s.y if s.y.dim() == 1 else s.y[0]
        soft = soft_cross_entropy(widest.expand_as(others), others).mean(-1).sum() if len(others) else s.z.new_zeros(())
        return cross_entropy(widest, y).mean(), soft


NAMES = ("wml", "independent", "dml", "cl-ilr", *(f"kdcl-{v}" for v in KDCL.VARIANTS), "one", "okddip", "sandwich")


def make_rule(name: str, share: str, m: int, widths: list[int], channels: int, detach: bool = True) -> Rule:
    """The rule called `name` for m peers.

    Args:
        name: one of `NAMES`; ``kdcl`` is ``kdcl-mean``.
        share: how the peers share (some rules need a trunk or nested widths).
        m: number of peers.
        widths: feature widths of the peers' heads.
        channels: channels of the trunk's output.
        detach: whether WML's teachers are detached.
    """
    name = "kdcl-mean" if name == "kdcl" else name
    if name not in NAMES:
        raise UserError(f"no rule {name!r}; {did_you_mean(name, NAMES)}")
    if m < 2 and name in ("cl-ilr", "one", "okddip"):
        raise UserError(f"rule {name} needs at least 2 peers, got {m}")
    if name in ("one", "cl-ilr") and share != "tree":
        raise UserError(f"rule {name} gates or averages branches of a shared trunk: use --share tree, got {share}")
    if name == "sandwich" and share != "nested":
        raise UserError(f"rule sandwich trains nested widths: use --share nested, got {share}")
    if name.startswith("kdcl-"):
        return KDCL(name.removeprefix("kdcl-"), m)
    if name == "wml":
        return WML(detach)
    if name == "one":
        return ONE(m, channels)
    if name == "okddip":
        return OKDDip(widths)
    return {"independent": Independent, "dml": DML, "cl-ilr": CLILR, "sandwich": Sandwich}[name]()
