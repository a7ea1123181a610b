"""Settings of a Distiller run, and the objectives they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from stillhouse import plain
from stillhouse.comparisons import KNOWN, ON_LOGITS
from stillhouse.errors import UserError, did_you_mean
from stillhouse.recipes.distiller_mi_alpha.augment import stage
from stillhouse.recipes.distiller_mi_alpha.maps import MAPS, attention_of, layers_of

# The paper's names of losses, as objectives of `stillhouse.comparisons`: name, factor, options.
LOSSES: dict[str, tuple[str, float, str]] = {
    "mse": ("feature", 1.0, ""),
    "ce": ("softmax", 1.0, ""),
    "pkd": ("cosine", 2.0, "token=0"),  # ‖t/‖t‖ − s/‖s‖‖² of [CLS] = 2 (1 − cos)
    "gram": ("similarity", 1.0, ""),
}
OF_LAYERS = ("alpha", "critic", "layer_map", "features", "student_layers", "teacher_layers")


@dataclass(frozen=True)
class Config:
    """Settings of a Distiller run; every field is a flag."""

    prediction: Literal["ce", "mse", "none"] = "ce"  # of the logits: soft cross-entropy or squared difference
    temperature: float = 1.0  # divides both logits; no factor T²
    intermediate: str = "mi"  # of the layers: mi, mse, ce, cosine, pkd, cka, gram, any other of distill's, or none
    alpha: float = 0.9  # of mi: 1 low variance and capped at log(batch − 1), 0 low bias and high variance
    critic: Literal["mlp", "transformer"] = "mlp"  # of mi: reads the mean over positions, or the positions
    layer_map: Literal["skip", "last", "emd"] = "skip"  # evenly spread, the last ones, or all by optimal transport
    features: Literal["hidden", "attention"] = "hidden"  # outputs of layers, or of the attention blocks in them
    student_layers: tuple[str, ...] = ()  # module paths in order (default: found)
    teacher_layers: tuple[str, ...] = ()  # the same of the teacher
    prediction_weight: float = 1.0  # of the loss of the logits
    intermediate_weight: float = 1.0  # of the sum over pairs of layers
    pseudo: float = 0.0  # weight of the cross-entropy of the teacher's most likely class
    label: float = 0.0  # weight of the cross-entropy of the labels; the method has none
    mixup: float = 0.0  # a of Beta(a, a), for word vectors or images (0.4 published); 0 does not mix
    edits: tuple[str, ...] = ()  # text: words:P, contextual:P, package.module:function, one after the other
    language_model: str = ""  # text: the masked language model of edits contextual
    teacher_epochs: float = 0.0  # train the teacher first, for so many passes; 0 takes it as it comes
    epochs: float = 20.0  # passes over the training data
    batch: int = 32  # samples per step; a bound of mutual information contrasts within it
    optimizer: Literal["sgd", "adamw"] = "adamw"  # of student and critics alike
    lr: float = 5e-5  # learning rate at the top of its cosine
    lr_warmup: float = 0.1  # part of the run over which the learning rate rises
    weight_decay: float = 0.1  # of all trained weights
    clip: float = 1.0  # largest gradient norm

    def __post_init__(self) -> None:
        names = ("mi", "none", *LOSSES, *(k for k, v in KNOWN.items() if v[0] not in (*ON_LOGITS, "flow", "head")))
        if self.intermediate not in names:
            hint = did_you_mean(self.intermediate, names, limit=30)
            raise UserError(f"intermediate: no loss of layers {self.intermediate!r}; {hint}")
        if not (0 <= self.alpha <= 1 and self.temperature > 0):
            raise UserError(f"needs alpha in [0, 1] and temperature > 0, got {self.alpha} and {self.temperature}")
        for name in ("prediction_weight", "intermediate_weight", "pseudo", "label", "mixup"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name}: expected a number from 0, got {getattr(self, name)}")
        if self.batch < 3 and self.intermediate == "mi":
            raise UserError(f"batch: a bound of mutual information needs 3 samples or more, got {self.batch}")
        for text in self.edits:
            stage(text, self.language_model)
        self.plain(())

    @property
    def idle(self) -> dict[str, str]:
        """Settings that do nothing beside these, and why."""
        found = dict[str, str]()
        if self.intermediate == "none":
            found |= dict.fromkeys((*OF_LAYERS, "intermediate_weight"), "--intermediate none compares no layers")
        elif not self.intermediate_weight:
            found |= dict.fromkeys((*OF_LAYERS, "intermediate"), "--intermediate-weight 0 compares no layers")
        elif self.intermediate != "mi":
            found |= dict.fromkeys(("alpha", "critic"), f"it is of --intermediate mi, not {self.intermediate}")
        if self.prediction == "none":
            found |= dict.fromkeys(("temperature", "prediction_weight"), "--prediction none compares no logits")
        if not any(text.startswith("contextual") for text in self.edits):
            found["language_model"] = "it is of --edits contextual:P"
        return found

    def plain(self, objective: Sequence[str], **changes: Any) -> plain.Plain:
        """The same run as a plain distillation by these objectives."""
        return plain.Plain(
            objective=tuple(objective), label=self.label, epochs=self.epochs, batch=self.batch,
            optimizer=self.optimizer, lr=self.lr, lr_warmup=self.lr_warmup, weight_decay=self.weight_decay,
            clip=self.clip,
            **{"teacher_epochs": self.teacher_epochs, **changes},
        )  # fmt: skip

    def on_logits(self) -> list[str]:
        """The objectives on logits, as ``stillhouse distill --objective`` takes them.

        ``kd`` has T²·KL; its gradient divided by T² is that of the soft cross-entropy.
        """
        T, w, made = self.temperature, self.prediction_weight, list[str]()
        if self.prediction != "none":
            made.append(f"kd:{w / T**2!r}?T={T!r}" if self.prediction == "ce" else f"logit-mse:{w!r}?T={T!r}")
        return made + ([f"pseudo:{self.pseudo!r}"] if self.pseudo else [])

    def on_layers(self, student: nn.Module, teacher: nn.Module) -> tuple[list[str], tuple[int, int]]:
        """The objectives on pairs of layers, and how many layers of each are paired by ``emd``."""
        if self.intermediate == "none" or not self.intermediate_weight:
            return [], (0, 0)
        mine: list[str | None] = [None, *self.student_layers] if self.student_layers else layers_of(student)
        theirs: list[str | None] = [None, *self.teacher_layers] if self.teacher_layers else layers_of(teacher)
        if self.features == "attention":
            mine = [attention_of(student, p) for p in mine[1:] if p]
            theirs = [attention_of(teacher, p) for p in theirs[1:] if p]
        extra = self.features == "hidden"
        sizes = len(mine) - extra, len(theirs) - extra
        pairs = MAPS[self.layer_map](*sizes, self.features)
        name, factor, query = LOSSES.get(self.intermediate, (self.intermediate, 1.0, ""))
        if name == "mi":
            query = f"alpha={self.alpha!r}" + ("&layers=2" if self.critic == "transformer" else "")
        weight = f"{factor * self.intermediate_weight!r}" + (f"?{query}" if query else "")
        found = [f"{name}:{mine[i]}={theirs[j]}:{weight}" for i, j in pairs if mine[i] and theirs[j]]
        if not found:
            raise UserError(
                f"layer map {self.layer_map}: of {sizes[0]} and {sizes[1]} layers no pair is left to compare"
            )
        return found, sizes
