"""Self-distillation over generations: fresh students of one structure, each taught by those before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.engine import fit
from stillhouse.evaluate import classification, predict
from stillhouse.run import Run
from stillhouse.system import Clock, Source, System


class Best(nn.Module):
    """The weights that judged best so far: state of a System, so that a resumed run still has them.

    Of equal scores the first is kept. The copy is in eval mode and has no trainable parameter.

    Args:
        model: the network that is trained.

    Example:
        >>> net = nn.Linear(1, 1)
        >>> best = Best(net)
        >>> best.offer(net, 0.5), best.offer(net, 0.4)
        (True, False)
    """

    score: Tensor

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = deepcopy(model).requires_grad_(False)
        self.register_buffer("score", torch.tensor(-torch.inf))  # float32: processes share buffers in it
        self.eval()

    def train(self, mode: bool = True) -> Best:
        """Stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def offer(self, model: nn.Module, score: float) -> bool:
        """Keeps the model's weights if `score` is higher than any before; says whether it did."""
        if not torch.tensor(score) > self.score.cpu():
            return False
        self.score.fill_(score)
        self.model.load_state_dict(model.state_dict())
        return True


class Learner(System):
    """A System with one ``student``; `best` is set by `generations` where checkpoints are chosen."""

    def __init__(self, student: nn.Module):
        super().__init__()
        self.student = student
        self.best: Best | None = None

    def outcome(self) -> nn.Module:
        """The student, with the weights of its best checkpoint where one was chosen."""
        if self.best is not None:
            self.student.load_state_dict(self.best.model.state_dict())
        return self.student


Make = Callable[[int, Sequence[nn.Module]], Learner]


def generations(
    run: Run,
    make: Make,
    source: Source,
    count: int,
    *,
    epochs: float,
    settings: Any = None,
    validation: Any = None,
    score: Callable[[Tensor, Tensor], float] | None = None,
    name: str = "generation",
) -> list[nn.Module]:
    """Trains `count` students one after the other, each a stage of the run.

    Args:
        run: folder, seed, device.
        make: ``make(g, before) -> Learner``: the System of generation g, with a student of its own; `before` has the
            networks of the generations 0 … g−1, trained, in eval mode. Make teachers of them with ``Frozen``.
        source: batches, the same for all.
        count: generations.
        epochs: of each. settings: kept with each stage.
        validation: samples on which, after every epoch, the checkpoint is chosen; never the test part. None takes the
            last weights.
        score: ``score(logits, labels)``, higher is better; accuracy by default.
        name: of the stages: generation0, generation1, …

    Returns:
        The networks, on the CPU, in eval mode.

    Source: Furlanello et al. 2018 (arXiv 1805.04770); Zhang & Sabuncu 2020 (arXiv 2006.05065).
    """
    done: list[nn.Module] = []
    for g in range(count):
        system = make(g, done)
        if validation is not None:
            system.best = Best(system.student)

        def judge(learner: Learner, clock: Clock) -> dict[str, float]:
            z, y = predict(learner.student, validation, device=run.device)
            value = score(z, y) if score else classification(z, y)["accuracy"]
            assert learner.best is not None
            learner.best.offer(learner.student, value)
            return {"validation": value}

        evaluate = judge if validation is not None else None
        fit(run, f"{name}{g}", system, source, epochs=epochs, settings=settings, evaluate=evaluate)
        done.append(system.outcome().eval())
    return [network.cpu() for network in done]
