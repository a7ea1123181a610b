"""AdamS: Adam that pulls masked weights to zero by a growing share of its own momentum."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from stillhouse.errors import UserError


class AdamS(torch.optim.Optimizer):
    """Adam, and for weights with a mask m a decay that takes the momentum's place as training goes on.

    With a_t = t/T, and g the gradient at step t = 0 … T − 1::

        μ_t = β₁ μ_{t−1} + (1 − β₁) g                       the raw gradient alone
        μ̃_t = μ_t where m = 1,  (1 − a_t) μ_t + a_t λ sign(θ) where m = 0
        v_t = β₂ v_{t−1} + (1 − β₂) μ̃_t²                    of μ̃, also where m = 1
        θ  ← θ − γ_t (μ̃_t / (1 − β₁^{t+1})) / (√(v_t / (1 − β₂^{t+1})) + ε)

    Since v is made of a momentum that starts at zero, the first step is γ/(1 − β₁) for every weight with a mask.
    Weights without one take Adam's step, v of g². There is no other weight decay.

    Args:
        params: tensors, or groups of them, of float32 or float64: λ is lost in half precision.
        masks: weight → its mask, bool of the weight's shape. They are read, never written, and whoever owns them (a
            buffer of the model) changes them in place and saves them.
        steps: T; part of the state, another one at a resume is refused.
        lr, betas, eps: as in Adam. decay: λ.

    Raises:
        UserError: a mask that is not of its weight's shape, dtype or device or whose weight is not among `params`
            (where weights were flattened or sharded, for instance); half precision; settings out of range; a
            state of another T.

    Source: CAST (arXiv 2509.25996).

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([[1.0, -1.0]]))
        >>> optimizer = AdamS([w], {w: torch.tensor([[True, False]])}, steps=10, lr=0.01)
        >>> w.grad = torch.ones_like(w)
        >>> optimizer.step()
        >>> w.tolist()[0][0]  # ten times the learning rate
        0.8999999761581421
    """

    def __init__(
        self,
        params: Iterable[Any],
        masks: Mapping[Tensor, Tensor],
        *,
        steps: int,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        decay: float = 4e-7,
    ):
        if not (lr >= 0 and decay >= 0 and eps >= 0 and steps >= 1 and all(0 <= b < 1 for b in betas)):
            raise UserError(
                f"AdamS needs lr, decay, eps >= 0, steps >= 1 and betas in [0, 1), got lr={lr}, decay={decay}, "
                f"eps={eps}, steps={steps}, betas={betas}"
            )
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "decay": decay})
        self.masks, self.steps = dict(masks), steps
        self._check()

    def _check(self) -> None:
        every = [p for group in self.param_groups for p in group["params"]]
        known = set(map(id, every))
        for p, mask in self.masks.items():
            if id(p) not in known:
                raise UserError(
                    f"AdamS: the mask of a weight {tuple(p.shape)} belongs to none of the parameters; weights must not "
                    "be flattened or sharded behind their masks"
                )
            if mask.shape != p.shape or mask.dtype != torch.bool or mask.device != p.device:
                raise UserError(
                    f"AdamS: a weight {tuple(p.shape)} on {p.device} needs a bool mask like it, got {mask.dtype} "
                    f"{tuple(mask.shape)} on {mask.device}"
                )
        if any(p.dtype not in (torch.float32, torch.float64) for p in every):
            raise UserError("AdamS needs weights in float32 or float64; use --precision bf16 for the arithmetic alone")

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; a parameter without a gradient stays as it is, and so does its own count of steps."""
        if closure is not None:
            with torch.enable_grad():
                closure = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, group)
        return closure

    def _move(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            state.update(step=0, steps=self.steps, mean=torch.zeros_like(p), square=torch.zeros_like(p))
        (b1, b2), t, mean, square = group["betas"], state["step"], state["mean"], state["square"]
        g = p.grad
        assert g is not None
        mean.lerp_(g, 1 - b1)
        moved, seen = mean, g
        if p in self.masks:
            a = t / self.steps
            pulled = mean * (1 - a) + p.sign() * (a * group["decay"])
            moved = seen = torch.where(self.masks[p], mean, pulled)
        square.mul_(b2).addcmul_(seen, seen, value=1 - b2)
        scale = (square / (1 - b2 ** (t + 1))).sqrt_().add_(group["eps"])
        p.addcdiv_(moved, scale, value=-group["lr"] / (1 - b1 ** (t + 1)))
        state["step"] = t + 1

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for state in state_dict["state"].values():
            if state["steps"] != self.steps:
                raise UserError(
                    f"this state of AdamS is of a training of {state['steps']} steps, not {self.steps}: the decay's "
                    "share a_t = t/T would jump; resume with the same number of steps"
                )
        super().load_state_dict(state_dict)
