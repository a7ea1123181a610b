"""Environments by name or from the user's own code, and many of them whose state can be saved."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.errors import UserError, did_you_mean, need
from stillhouse.models import import_object

Make = Callable[[], Any]
"""Makes one gymnasium environment."""


@dataclass(frozen=True)
class Spaces:
    """What a policy sees and does.

    Attributes:
        shape: of one observation, as the network sees it.
        outputs: how many actions there are to choose from, or how many numbers an action has.
        discrete: which of the two.
        low, high: bounds of a continuous action, flattened; None where there is none.
        start: number of the first discrete action.
        action_shape: of a continuous action.
        one_hot: number of discrete observations, which are given to the network as one-hot vectors; 0 for arrays.

    Example:
        >>> Spaces((4,), 2).outputs
        2
    """

    shape: tuple[int, ...]
    outputs: int
    discrete: bool = True
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()
    start: int = 0
    action_shape: tuple[int, ...] = ()
    one_hot: int = 0

    def to_json(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Spaces:
        known: dict[str, Any] = {k: tuple(v) if isinstance(v, list | tuple) else v for k, v in value.items()}
        return Spaces(**known)

    @staticmethod
    def of(env: Any, name: str) -> Spaces:
        """The spaces of an environment.

        Raises:
            UserError: of kinds that no policy here can see or act in.
        """
        from gymnasium.spaces import Box, Discrete

        seen, done = getattr(env, "observation_space", None), getattr(env, "action_space", None)
        one_hot = int(seen.n) if isinstance(seen, Discrete) else 0
        shape: tuple[int, ...] = (one_hot,) if one_hot else tuple(seen.shape) if isinstance(seen, Box) else ()
        if not shape or 0 in shape:
            raise UserError(
                f"environment {name}: observations must be a Box or Discrete space, got {seen}; wrap it in "
                "gymnasium.wrappers.FlattenObservation"
            )
        if isinstance(done, Discrete):
            return Spaces(shape, int(done.n), start=int(done.start), one_hot=one_hot)
        if isinstance(done, Box) and np.issubdtype(done.dtype, np.floating):
            low, high = (_finite(bound.reshape(-1)) for bound in (done.low, done.high))
            return Spaces(shape, len(low), False, low, high, action_shape=tuple(done.shape), one_hot=one_hot)
        raise UserError(f"environment {name}: actions must be a Discrete or a float Box space, got {done}")

    def encode(self, observation: Any) -> np.ndarray:
        """One observation as the network sees it, float32."""
        if self.one_hot:
            return np.eye(self.one_hot, dtype=np.float32)[int(observation)]
        return np.asarray(observation, dtype=np.float32)

    def natives(self, actions: Tensor) -> list[Any]:
        """Actions (n,) or (n, outputs) as environments take them: whole numbers, or arrays inside the bounds."""
        if self.discrete:
            return [a + self.start for a in actions.tolist()]
        low, high = self.bounds
        return list(np.clip(actions.cpu().numpy(), low, high).reshape(-1, *self.action_shape))

    @property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Least and greatest continuous action, flat, infinite where there is no bound."""
        low = np.array([-np.inf if v is None else v for v in self.low], dtype=np.float32)
        return low, np.array([np.inf if v is None else v for v in self.high], dtype=np.float32)


def _finite(values: np.ndarray) -> tuple[float | None, ...]:
    return tuple(float(v) if np.isfinite(v) else None for v in values)


def find_environment(env: str | Make) -> tuple[str, Make, Spaces]:
    """An environment's name, how to make one of it, and its spaces; one is made, tried for a step and closed.

    Args:
        env: a name that gymnasium knows, ``package.module:function`` that returns an environment, or such a function.

    Raises:
        UserError: there is none of that name, it cannot be made, or it does not behave as its spaces say.

    Example:
        >>> find_environment("CartPole-v1")[2].shape
        (4,)
    """
    name, make = _maker(env)
    try:
        one = make()
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"environment {name} cannot be made: {type(error).__name__}: {_line(error)}") from None
    try:
        spaces = Spaces.of(one, name)
        _try(one, spaces, name)
    finally:
        with contextlib.suppress(Exception):
            one.close()
    return name, make, spaces


def _maker(env: str | Make) -> tuple[str, Make]:
    try:
        import gymnasium
    except ModuleNotFoundError:
        raise need("control", "gymnasium") from None
    if callable(env):
        return f"{env.__module__}:{getattr(env, '__qualname__', type(env).__qualname__)}", env
    if ":" in env:
        found = import_object(env, "--env")
        if not callable(found):
            raise UserError(f"--env {env} is a {type(found).__name__}, expected a function that returns an environment")
        return env, found

    def make() -> Any:
        try:
            return gymnasium.make(env, disable_env_checker=True)
        except (gymnasium.error.NameNotFound, gymnasium.error.NamespaceNotFound, gymnasium.error.VersionNotFound):
            raise UserError(f"no environment {env!r}; {did_you_mean(env, gymnasium.registry)}") from None

    return env, make


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]


def _try(env: Any, spaces: Spaces, name: str) -> None:
    """A reset and a step, as gymnasium has them since 0.26."""
    try:
        started = env.reset(seed=0)
    except Exception as error:
        raise UserError(f"environment {name}: reset(seed=0) raised {type(error).__name__}: {_line(error)}") from None
    if not isinstance(started, tuple) or len(started) != 2:
        raise UserError(f"environment {name}: reset must return (observation, info), got a {type(started).__name__}")
    _fits(started[0], spaces, name, "reset")
    zero = torch.zeros(1, dtype=torch.int64) if spaces.discrete else torch.zeros(1, spaces.outputs)
    try:
        moved = env.step(spaces.natives(zero)[0])
    except Exception as error:
        raise UserError(f"environment {name}: its first step raised {type(error).__name__}: {_line(error)}") from None
    if not isinstance(moved, tuple) or len(moved) != 5:
        got = f"{len(moved)} values" if isinstance(moved, tuple) else f"a {type(moved).__name__}"
        raise UserError(
            f"environment {name}: step must return (observation, reward, terminated, truncated, info), got {got}"
        )
    _fits(moved[0], spaces, name, "step")


def _fits(observation: Any, spaces: Spaces, name: str, where: str) -> None:
    shape = spaces.encode(observation).shape
    if shape != spaces.shape:
        raise UserError(
            f"environment {name}: {where} gave an observation of shape {shape}, its space says {spaces.shape}"
        )


class Environments:
    """n environments, each of which is reset by a seed of its own.

    The state of an environment is its last reset's seed and the actions since: they are what is saved, and what is
    played again when it is loaded. Then its observation must be the saved one. That works for every environment that
    is deterministic under its seed, without knowing what it holds.

    Args:
        name: for errors. make: makes one. spaces: of each. n: how many.
    """

    def __init__(self, name: str, make: Make, spaces: Spaces, n: int):
        self.name, self.make, self.spaces, self.n = name, make, spaces, n
        self.envs: list[Any] = []
        self.saved: Mapping[str, Tensor] | None = None
        self.seeds, self.episodes = [-1] * n, [0] * n
        self.actions: list[list[Any]] = [[] for _ in range(n)]
        self.obs = np.zeros((n, *spaces.shape), dtype=np.float32)
        self.totals = np.zeros(n)

    def wake(self, seed: Callable[[int, int], int]) -> None:
        """Makes the environments where there are none yet, and brings them where they were or resets them.

        Args:
            seed: ``seed(environment, episode)`` of a reset.
        """
        if not self.envs:
            self.envs = [self.make() for _ in range(self.n)]
        if self.saved is not None:
            self._replay(self.saved)
            self.saved = None
        for i in range(self.n):
            if self.seeds[i] < 0:
                self.reset(i, seed(i, 0))

    def reset(self, i: int, seed: int) -> None:
        observation, _ = self.envs[i].reset(seed=seed)
        self.seeds[i], self.actions[i], self.totals[i] = seed, [], 0.0
        self.obs[i] = self.spaces.encode(observation)

    def step(self, actions: Tensor, seed: Callable[[int, int], int]) -> tuple[np.ndarray, ...]:
        """One step of each; those that end are reset.

        Args:
            actions: (n,) or (n, outputs).
            seed: as for `wake`.

        Returns:
            next observations (n, …) from before any reset, rewards (n,), terminated (n,), ended (n,: terminated or
            truncated), and the return of the episodes that ended (n,), NaN for the others.
        """
        following = np.empty_like(self.obs)
        rewards, returns = np.empty(self.n, dtype=np.float32), np.full(self.n, np.nan, dtype=np.float32)
        terminated, ended = np.zeros(self.n, dtype=bool), np.zeros(self.n, dtype=bool)
        encode = self.spaces.encode
        for i, (env, action) in enumerate(zip(self.envs, self.spaces.natives(actions), strict=True)):
            observation, reward, over, cut, _ = env.step(action)
            self.actions[i].append(action)
            self.totals[i] += reward
            following[i] = encode(observation)
            rewards[i], terminated[i], ended[i] = reward, over, over or cut
        self.obs[:] = following
        for i in np.flatnonzero(ended).tolist():
            returns[i] = self.totals[i]
            self.episodes[i] += 1
            self.reset(i, seed(i, self.episodes[i]))
        return following, rewards, terminated, ended, returns

    def close(self) -> None:
        for env in self.envs:
            env.close()
        self.envs = []

    def state_dict(self) -> dict[str, Tensor]:
        """Seeds, episodes, actions since the reset (one after the other), observations and returns so far."""
        if self.saved is not None:  # loaded, and not woken since
            return dict(self.saved)
        flat = np.array([a for one in self.actions for a in one], np.int64 if self.spaces.discrete else np.float32)
        width = 1 if self.spaces.discrete else self.spaces.outputs
        return {
            "seeds": torch.tensor(self.seeds),
            "episodes": torch.tensor(self.episodes),
            "lengths": torch.tensor([len(one) for one in self.actions]),
            "actions": torch.from_numpy(flat.reshape(-1, width)),
            "obs": torch.from_numpy(self.obs.copy()),
            "totals": torch.from_numpy(self.totals.copy()),
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.saved = dict(state)

    def _replay(self, state: Mapping[str, Tensor]) -> None:
        self.episodes = state["episodes"].tolist()
        parts = torch.split(state["actions"], state["lengths"].tolist())
        for i, (seed, part) in enumerate(zip(state["seeds"].tolist(), parts, strict=True)):
            if seed < 0:
                continue
            self.reset(i, seed)
            native = part.numpy().reshape(-1, *self.spaces.action_shape)
            self.actions[i] = [int(a) for a in part[:, 0]] if self.spaces.discrete else list(native)
            for action in self.actions[i]:
                self.obs[i] = self.spaces.encode(self.envs[i].step(action)[0])
        if not np.array_equal(self.obs, state["obs"].numpy(), equal_nan=True):
            raise UserError(
                f"environment {self.name} is not deterministic under its reset seed: the same actions lead elsewhere, "
                "so the run cannot be resumed; draw from self.np_random only, and keep nothing between episodes"
            )
        self.totals = state["totals"].numpy().copy()
