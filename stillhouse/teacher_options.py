"""Flags of systems that learn from trained classifiers, and how these are opened by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from stillhouse.errors import UserError
from stillhouse.options import ClassifierOptions

if TYPE_CHECKING:
    from torch import nn

    from stillhouse.data import Data
    from stillhouse.models import ModelSpec
    from stillhouse.students.plan import Plan

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class TeacherOptions(ClassifierOptions):
    """Images or sentences, a student and its teachers."""

    model: Annotated[str | None, tyro.conf.arg(aliases=["--student"])] = None  # the student; its --help names the forms
    teacher: tuple[str, ...] = ()  # RUN/students/NAME, or by name as --model; several are averaged
    teacher_weights: tuple[Path, ...] = ()  # .safetensors with a state dict, one per teacher
    teacher_size: int | None = None  # side of the square images the teacher reads (default: the student's)

    def load_data(self, default: str, *, given: Any = None, teacher: str | None = None) -> Data:
        """The data, with the ids of the teachers' tokenizer where it is another than the student's."""
        return super().load_data(default, given=given, teacher=teacher or self.teacher_tokenizer)

    @property
    def teacher_tokenizer(self) -> str | None:
        """Name or folder of the tokenizer that the first teacher comes with, if any."""
        for name in self.teacher[:1]:
            if name.startswith("hf:"):
                return name.removeprefix("hf:")
            if (Path(name) / "tokenizer.json").exists():
                return name
        return None

    def teachers(self, data: Data, *, fresh: bool = False) -> tuple[list[nn.Module], dict[str, Any]]:
        """The networks named by ``--teacher``, and how their input differs from the student's.

        Args:
            data: what they are to classify.
            fresh: they are trained first, so published weights are not asked for.

        Returns:
            The models, and ``normalize`` and ``resize`` for `teachers.Frozen`.

        Raises:
            UserError: weights that do not fit, cannot be had, or are for other classes.
        """
        from stillhouse.models import ModelSpec
        from stillhouse.outcomes import load
        from stillhouse.system import fold

        if self.teacher_weights and len(self.teacher_weights) != len(self.teacher):
            raise UserError(
                f"--teacher-weights: expected one file per teacher ({len(self.teacher)}), got "
                f"{len(self.teacher_weights)}"
            )
        found, look = [], dict[str, Any]()
        text = hasattr(data.train, "tokenizer")
        for k, name in enumerate(self.teacher):
            source, seed = name.partition(":")[0], fold(self.seed, "teacher", k)
            if (Path(name) / "plan.json").exists():
                found.append(load(name))
                continue
            if text and source == "hf":
                found.append(self._hub_teacher(name, data))
                continue
            stem = self.stem if source == "torchvision" else "keep"
            spec = self.text(name, data) if text else ModelSpec(name, len(data.classes), tuple(data.shape), stem)
            if self.teacher_weights:
                found.append(filled(spec.build(), self.teacher_weights[k]))
            elif fresh or text or source not in ("stillhouse", "torchvision", "timm"):
                found.append(spec.build(seed=seed))
            else:
                classes, look = published(name, data)
                if classes != len(data.classes):
                    raise UserError(
                        f"--teacher {name}: its published weights are for {classes or 'no'} classes, {data.name} has "
                        f"{len(data.classes)}; give --teacher-weights FILE, or --teacher-epochs N to train it first"
                    )
                found.append(spec.build(pretrained=True))
        return found, look | ({"resize": self.teacher_size} if self.teacher_size else {})

    def _hub_teacher(self, name: str, data: Data) -> nn.Module:
        from stillhouse.text.classifiers import hub_classifier, labels_in_order

        _, model = hub_classifier(name.removeprefix("hf:"), len(data.classes), self.length)
        labels_in_order(model, data.classes, f"teacher {name}")
        return model


@dataclass(frozen=True)
class TrainedOptions(ClassifierOptions):
    """Images or sentences, and a trained network, which is changed and teaches itself."""

    weights: Path | None = None  # .safetensors with the state dict of --model, which may also be RUN/students/NAME

    def trained(self, data: Data, default: str, *, fresh: bool = False) -> tuple[ModelSpec, nn.Module, Plan | None]:
        """The network named by ``--model``: of another run, with published weights, from a file, or still untrained.

        Args:
            data: what it is to classify.
            default: the name where none is given; of sentences it is ``bert``.
            fresh: it is trained first, so it may come without weights.

        Returns:
            How to build it, the network, and how it differs from that where it is a student of another run.

        Raises:
            UserError: it has no trained weights, or was made from a live network.
        """
        from stillhouse.outcomes import continued

        name = self.model or default
        if student := continued(name):
            return student
        spec = self.spec(data, name, "bert")
        if not (self.pretrained or self.weights or fresh):
            raise UserError(
                f"--model {name} has no trained weights, which are needed to start from; give --pretrained, --weights "
                "FILE, a folder RUN/students/NAME, or --teacher-epochs N to train it first"
            )
        network = self.network(spec, self.seed) or spec.build(seed=self.seed)
        return spec, filled(network, self.weights) if self.weights else network, None


def published(name: str, data: Data) -> tuple[int, dict[str, Any]]:
    """Classes of a library's published weights (0: there are none), and the normalisation and size they expect."""
    source, _, short = name.partition(":")
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mean, std = IMAGENET
    if source == "timm":
        import timm

        known = timm.get_pretrained_cfg(short)
        if known is None or not known.has_weights:
            return 0, {}
        classes, mean, std = known.num_classes, known.mean, known.std
    elif source == "torchvision":
        from torchvision.models import get_model_weights

        classes = len(get_model_weights(short).DEFAULT.meta["categories"])
    else:
        return 0, {}
    own_mean, own_std = (getattr(data.train, k, None) for k in ("mean", "std"))
    if own_mean is None or own_std is None or (tuple(own_mean), tuple(own_std)) == (tuple(mean), tuple(std)):
        return classes, {}
    return classes, {"normalize": (own_mean, own_std, mean, std)}


def filled(model: nn.Module, path: Path) -> nn.Module:
    """The model with the weights of a safetensors file."""
    from stillhouse.export import read_weights

    tensors, _ = read_weights(path)
    own: dict[str, Any] = model.state_dict()
    # Batch norms count their batches since PyTorch 0.4.1; older files lack the counters, which evaluation never reads.
    tensors = {k: v for k, v in own.items() if k.endswith("num_batches_tracked") and k not in tensors} | tensors
    for name in [*own, *tensors]:
        if name not in own or name not in tensors or own[name].shape != tensors[name].shape:
            shapes = [tuple(d[name].shape) if name in d else "nothing" for d in (own, tensors)]
            raise UserError(
                f"{path} does not fit {type(model).__name__}: at {name!r} it needs {shapes[0]}, has {shapes[1]}"
            )
    model.load_state_dict(tensors)
    return model
