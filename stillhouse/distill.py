"""One teacher into one student, by any sum of objectives on logits and features: the plain thing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse import objectives as O
from stillhouse import teachers
from stillhouse.comparisons import KNOWN, ON_LOGITS, Comparison, Objective, as_map
from stillhouse.errors import UserError
from stillhouse.evaluate import call, evaluating, logits_of
from stillhouse.system import Batch, Clock, Schedule, Signals, System, Teacher, Terms, Update, fold
from stillhouse.taps import tap


class Distill(System):
    """w·mean CE(z, y) + Σ_k w_k·mean O_k(teacher, student).

    Without `objectives` this is Hinton et al. (2015, arXiv 1503.02531): (1−α)·mean CE + α·mean T² KL(softmax(t/T) ‖
    softmax(z/T)). The teacher is detached, in eval mode and no part of this module. Where no objective has weight it is
    not called, and training is plain cross-entropy bit for bit.

    Args:
        student: the network that learns; gives logits (n, C).
        teacher: a `Teacher` that answers with the logits and the taps that the objectives name (see `taps_of`), or a
            `teachers.Sequence` of them; None only where nothing is asked of it. It is not asked once every objective is
            past its ``until``.
        objectives: `Objective` or their text, such as ``["kd:0.9?T=4", "feature:layer2:100"]``; None takes alpha and T.
        label: weight of the cross-entropy beside `objectives`.
        alpha, T: of the plain case.
        example: a batch for which the projectors of feature objectives are built; needed where there are such.
        seed: of the projectors' first weights.
        optimizer: builds the optimiser from the trainable parameters of student and projectors.
        lr: factor on the learning rate as a function of the clock.
        clip: largest gradient norm.
        label_smoothing: of the label term.
        read: what of a batch the student is given.

    Raises:
        UserError: a bare module as teacher, settings out of range, nothing to train, classes that differ, features
            that cannot be compared.

    Example:
        >>> system = Distill(nn.Linear(4, 3), teachers.Frozen(nn.Linear(4, 3)))
        >>> terms = system.learn({"input": torch.ones(2, 4), "label": torch.tensor([0, 2])}, Clock())
        >>> sorted(terms.terms)
        ['kd', 'label']
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher | teachers.Sequence | None,
        *,
        objectives: Sequence[Objective | str] | None = None,
        label: float = 1.0,
        alpha: float = 0.5,
        T: float = 4.0,
        example: Batch | None = None,
        seed: int = 0,
        optimizer: Callable[[Sequence[Tensor]], torch.optim.Optimizer] | None = None,
        lr: Schedule | None = None,
        clip: float | None = None,
        label_smoothing: float = 0.0,
        read: str = "input",
    ):
        super().__init__()
        if isinstance(teacher, nn.Module):
            raise UserError(f"Distill: the teacher is a bare {type(teacher).__name__}; give teachers.Frozen(model)")
        if objectives is None:
            if not 0 <= alpha <= 1 or T <= 0:
                raise UserError(f"Distill: needs 0 <= alpha <= 1 and T > 0, got alpha={alpha}, T={T}")
            objectives, label = [Objective("kd", alpha, options={"T": T})], 1 - alpha
        parsed = [Objective.parse(o) if isinstance(o, str) else o for o in objectives]
        self.objectives = [o for o in parsed if o.weight > 0]
        if any(o.level == "head" for o in self.objectives):
            raise UserError("Distill: simkd changes the student; take its objective from students.reuse_head")
        if label < 0 or not (label or self.objectives):
            raise UserError(f"Distill: needs label >= 0 and something to learn from, got label={label} alone")
        if not label and all(o.options.get("until", 1.0) < 1 for o in self.objectives):
            raise UserError(
                "Distill: without labels nothing is left to learn from behind the objectives' until; leave one on"
            )
        if teacher is None and self.objectives:
            raise UserError(f"Distill: {self.objectives[0]} needs a teacher; give one, or labels alone (alpha=0)")
        if not any(p.requires_grad for p in student.parameters()):
            raise UserError(
                "Distill: the student has no trainable parameter; if it is also the teacher, give "
                "Frozen(model, copy=True) before its parameters are frozen"
            )
        self.student, self.teacher, self.label = student, teacher, label
        self.label_smoothing, self._read = label_smoothing, read
        self._optimizer = optimizer or partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=5e-4)
        self._lr, self._clip = lr, clip
        self._taps = list(dict.fromkeys(p for o in self.objectives for p in o.taps[0]))
        self.comparisons = nn.ModuleDict()
        self.described: list[list[str]] = []
        if self._taps:
            if example is None:
                raise UserError("Distill: objectives on features need example=, a batch to build their projectors for")
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(fold("projectors", seed))
                self._prepare(example)

    def _prepare(self, example: Batch) -> None:
        """Builds every comparison of features for the shapes of one batch; also the check before the first step."""
        with torch.no_grad(), evaluating(self.student), tap(self.student, self._taps) as seen:
            call(self.student, example[self._read])
        said = self._ask(example, Clock())
        own = example[self._read]
        image = tuple(own.shape[2:]) if isinstance(own, Tensor) and own.dim() == 4 else None
        for k, objective in enumerate(self.objectives):
            if objective.level in ON_LOGITS:
                self.described.append([str(objective), "logits", "logits", "–"])
                continue
            try:
                student, teacher = self._features(objective, seen, said, example)
            except UserError as error:
                raise UserError(f"objective {objective}: {error}") from None
            margin = self._margin(objective, teacher[0].shape[1])
            try:
                comparison = Comparison(objective, student, teacher, image=image, margin=margin)
            except (RuntimeError, UserError) as error:
                shapes = [[tuple(f.shape) for f in fs] for fs in (student, teacher)]
                raise UserError(
                    f"objective {objective}: student {shapes[0]} and teacher {shapes[1]} cannot be compared: {error}"
                ) from None
            self.comparisons[str(k)] = comparison
            self.described.append(comparison.describe(student, teacher))

    def _margin(self, o: Objective, channels: int) -> Tensor | None:
        """Of ``overhaul`` without one: from the last batch norm of the tapped layer, as the authors take it."""
        model = getattr(self.teacher, "model", None)
        if o.name != "overhaul" or "margin" in o.options or model is None:
            return None
        inside = model.get_submodule(o.taps[1][0].removesuffix(":in")).modules()
        norms = [m for m in inside if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) and m.affine]
        return O.negative_mean(norms[-1]) if norms and norms[-1].num_features == channels else None

    def updates(self) -> Sequence[Update]:
        moving = [p for p in self.parameters() if p.requires_grad]
        return [Update("learn", moving, self._optimizer, lr=self._lr, clip=self._clip)]

    def _ask(self, batch: Batch, clock: Clock) -> Signals:
        assert self.teacher is not None
        return (self.teacher.at(clock) if isinstance(self.teacher, teachers.Sequence) else self.teacher)(batch)

    def learn(self, batch: Batch, clock: Clock) -> Terms:
        """Terms ``label`` and one per objective, already weighted; notes the accuracy on the batch."""
        with tap(self.student, self._taps) if self._taps else nullcontext() as seen:
            output = call(self.student, batch[self._read])
            z, taught = logits_of(output), self.taught(output)
        terms = {}
        if self.label:
            label = O.cross_entropy(z, batch["label"], self.label_smoothing).mean()
            terms["label"] = label if self.label == 1 else self.label * label
        said = None if all(o.over(clock) for o in self.objectives) else self._ask(batch, clock)
        for k, o in enumerate(self.objectives):
            name = o.name if o.name not in terms else f"{o.name} {k}"
            if said is None or o.over(clock):
                terms[name] = z.new_zeros(())
                continue
            terms[name] = o.at(clock) * self._compare(k, o, taught, seen, said, batch).mean()
        y = batch["label"].argmax(-1) if batch["label"].is_floating_point() else batch["label"]  # may be mixed
        correct = (z.detach().argmax(-1) == y).float().mean()
        return Terms(**terms).note(accuracy=correct)

    def taught(self, output: Any) -> Tensor:
        """The student's logits that the teacher's are compared with."""
        return logits_of(output)

    def _compare(self, k: int, o: Objective, z: Tensor, seen: Any, said: Signals, batch: Batch) -> Tensor:
        if o.level not in ON_LOGITS:
            return self.comparisons[str(k)](*self._features(o, seen, said, batch))
        _, fn, defaults = KNOWN[o.name]
        options = {**defaults, **{n: v for n, v in o.options.items() if n in defaults}}
        labels = [batch["label"]] if o.level == "labelled" else []
        return fn(said["logits"], z, *labels, **options)

    def _features(self, o: Objective, seen: Any, said: Signals, batch: Batch) -> tuple[list[Tensor], list[Tensor]]:
        """What an objective compares, of student and teacher; the teacher may read the batch with its own tokenizer."""
        own, how = batch[self._read], (o.options.get("token"), o.options.get("layers", 0))
        student = [as_map(seen[p], own, *how) for p in o.taps[0]]
        return student, [as_map(said[p], batch.get("teacher", own), *how) for p in o.taps[1]]

    def outcome(self) -> Any:
        """The student."""
        return self.student


class TokenDistill(Distill):
    """`Distill` of a vision transformer with a distillation token (DeiT, Touvron et al., ICML 2021, arXiv 2012.12877).

    Labels are for the class token's head, the teacher for the distillation token's; the hard variant is
    ``objectives=["pseudo:0.5"], label=0.5``. Afterwards the student answers with the mean of both heads.

    Args:
        student: timm's VisionTransformerDistilled, or a network with its ``set_distilled_training``.
        others: as for `Distill`.

    Raises:
        UserError: another student.
    """

    def __init__(self, student: nn.Module, teacher: Teacher | teachers.Sequence | None, **others: Any):
        if not hasattr(student, "set_distilled_training"):
            raise UserError(
                f"{type(student).__name__} has no distillation token; take a timm network such as "
                "timm:deit_tiny_distilled_patch16_224"
            )
        super().__init__(student, teacher, **others)

    def learn(self, batch: Batch, clock: Clock) -> Terms:
        self.student.set_distilled_training(True)  # type: ignore[operator]
        try:
            return super().learn(batch, clock)
        finally:
            self.student.set_distilled_training(False)  # type: ignore[operator]

    def taught(self, output: Any) -> Tensor:
        return output[1]
