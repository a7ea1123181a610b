"""Flags of systems that learn from trained classifiers, and how these are opened by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import tyro

from stillhouse.errors import UserError
from stillhouse.options import ClassifierOptions

if TYPE_CHECKING:
    from torch import nn

    from stillhouse.data import Data
    from stillhouse.models import ModelSpec
    from stillhouse.students.plan import Plan

UNTRAINED = ("stillhouse", "torchvision", "timm", "transformers", "stillhouse.text.classifiers")  # as they are built
STUDENT = (
    "the student: timm:NAME, torchvision:NAME, stillhouse:NAME or package.module:function; of text: bag, bert, hf:NAME "
    "or package.module:function"
)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class TeacherOptions(ClassifierOptions):
    """Images or sentences, a student and its teachers."""

    BRINGS: ClassVar[tuple[str, ...]] = ("model", "data", "teacher")

    model: Annotated[str | None, tyro.conf.arg(aliases=["--student"], help=STUDENT)] = None
    teacher: tuple[str, ...] = ()  # RUN/students/NAME, or by name as --model; several are averaged
    teacher_weights: tuple[Path, ...] = ()  # .safetensors with a state dict, one per teacher
    teacher_size: int | None = None  # side of the square images the teacher reads (default: the student's)
    teacher_mean: tuple[float, ...] = ()  # per channel, of the images in 0…1 the teacher was trained on; with its std
    teacher_std: tuple[float, ...] = ()  # (default: those of its published weights, or the student's)

    def load_data(self, default: str, *, given: Any = None, teacher: str | None = None) -> Data:
        """The data, with the ids of the teachers' tokenizer where it is another than the student's."""
        return super().load_data(default, given=given, teacher=teacher or self.teacher_tokenizer)

    @property
    def teacher_tokenizer(self) -> str | None:
        """Name or folder of the tokenizer that the first teacher comes with, if any."""
        return _tokenizer(self.teacher[0]) if self.teacher else None

    def idle(self, config: Any) -> Mapping[str, str]:
        """Beside a Config's own: what is said of a teacher where there is none."""
        alone = "no --teacher is given"
        flags = ("teacher_weights", "teacher_size", "teacher_mean", "teacher_std")
        return {**super().idle(config), **({} if self.teacher else dict.fromkeys(flags, alone))}

    def teachers(self, data: Data, *, fresh: bool = False) -> tuple[list[nn.Module], dict[str, Any]]:
        """The networks named by ``--teacher``, and how their input differs from the student's.

        Args:
            data: what they are to classify.
            fresh: they are trained first, so published weights are not asked for.

        Returns:
            The models, and ``normalize`` and ``resize`` for `teachers.Frozen`.

        Raises:
            UserError: weights that do not fit, cannot be had, or are for other classes; teachers whose inputs differ.
        """
        found, looks = self.each_teacher(data, fresh=fresh)
        if any(look != looks[0] for look in looks):
            raise UserError(
                f"the inputs of the teachers {', '.join(self.teacher)} are normalised differently; only stillhouse "
                "distill takes several such, here give --teacher-mean and --teacher-std, or one of them"
            )
        return found, looks[0] if looks else {}

    def each_teacher(self, data: Data, *, fresh: bool = False) -> tuple[list[nn.Module], list[dict[str, Any]]]:
        """As `teachers`, with ``normalize`` and ``resize`` of every teacher for itself."""
        if self.teacher_weights and len(self.teacher_weights) != len(self.teacher):
            raise UserError(
                f"--teacher-weights: expected one file per teacher ({len(self.teacher)}), got "
                f"{len(self.teacher_weights)}"
            )
        own = self._look(data)
        if fresh and own:
            raise UserError(
                "--teacher-size, --teacher-mean, --teacher-std: a teacher that is trained first (--teacher-epochs) "
                "reads the data; drop one"
            )
        if len({_tokenizer(name) for name in self.teacher}) > 1:
            self._same_tokenizers(self.teacher)
        both = [self._opened(k, data, fresh) for k in range(len(self.teacher))]
        return [model for model, _ in both], [look | own for _, look in both]

    def _look(self, data: Data) -> dict[str, Any]:
        """What the flags say about a teacher's input."""
        sizes: dict[str, Any] = {} if self.teacher_size is None else {"resize": self.teacher_size}
        if self.teacher_size is not None and self.teacher_size < 1:
            raise UserError(f"--teacher-size: expected a number of pixels, got {self.teacher_size}")
        if not (self.teacher_mean or self.teacher_std):
            return sizes
        channels = data.shape[0]
        if len(self.teacher_mean) != channels or len(self.teacher_std) != channels or min(self.teacher_std) <= 0:
            raise UserError(
                f"--teacher-mean and --teacher-std: expected {channels} numbers each, the latter positive, got "
                f"{self.teacher_mean} and {self.teacher_std}"
            )
        mean, std = (getattr(data.train, k, None) for k in ("mean", "std"))
        if mean is None or std is None:
            raise UserError(f"--teacher-mean: {data.name} does not say how it is normalised; wrap the teacher instead")
        return {**sizes, "normalize": (mean, std, self.teacher_mean, self.teacher_std)}

    def _opened(self, k: int, data: Data, fresh: bool) -> tuple[nn.Module, dict[str, Any]]:
        """The k-th teacher, and how its published weights want their input."""
        from stillhouse.models import ModelSpec
        from stillhouse.outcomes import load
        from stillhouse.system import fold

        name, text = self.teacher[k], hasattr(data.train, "tokenizer")
        source, seed = name.partition(":")[0], fold(self.seed, "teacher", k)
        if (Path(name) / "plan.json").exists():
            if self.teacher_weights:
                raise UserError(f"--teacher-weights: {name} comes with its own weights; drop the flag")
            return load(name), {}
        if text and source == "hf":
            return self._hub_teacher(name, data, fresh), {}
        if not text and ":" not in name:
            raise UserError(
                f"--teacher {name}: there is no {Path(name) / 'plan.json'}; expected RUN/students/NAME, timm:NAME, "
                "torchvision:NAME, stillhouse:NAME or package.module:function"
            )
        stem = self.stem if source == "torchvision" else "keep"
        shape = (data.shape[0], *[self.teacher_size] * 2) if self.teacher_size else tuple(data.shape)
        spec = self.text(name, data) if text else ModelSpec(name, len(data.classes), shape, stem)
        if self.teacher_weights:
            return filled(spec.build(), self.teacher_weights[k]), {}
        if fresh or (source not in ("stillhouse", "torchvision", "timm") and ":" in name):
            return spec.build(seed=seed), {}
        classes, look = published(name, data)
        if classes != len(data.classes):
            raise UserError(
                f"--teacher {name}: its published weights are for {classes or 'no'} classes, {data.name} has "
                f"{len(data.classes)}; give --teacher-weights FILE, or --teacher-epochs N to train it first"
            )
        return spec.build(pretrained=True), look

    def _hub_teacher(self, name: str, data: Data, fresh: bool) -> nn.Module:
        from stillhouse.text.classifiers import hub_classifier, labels_in_order

        if self.teacher_weights:
            raise UserError(f"--teacher-weights: {name} comes with its own weights; drop the flag")
        try:
            _, model = hub_classifier(name.removeprefix("hf:"), len(data.classes), self.length, trained=not fresh)
        except UserError as error:
            raise UserError(f"--teacher {name}: {error}; --teacher-epochs N trains one first") from None
        labels_in_order(model, data.classes, f"teacher {name}")
        return model

    def _same_tokenizers(self, teachers: Sequence[str]) -> None:
        """Refuses teachers of sentences that read other ids: there is one tokenizer for all."""
        from stillhouse.text.sentences import tokenizer_by_name

        names = [_tokenizer(name) for name in teachers]
        words = [None if name is None else tokenizer_by_name(name).get_vocab() for name in names]
        for name, its in zip(teachers, words, strict=True):
            if its != words[0]:
                raise UserError(
                    f"--teacher {name}: its tokenizer is another than that of {teachers[0]}; take one of them"
                )


def _tokenizer(teacher: str) -> str | None:
    """Name or folder of the tokenizer that a teacher comes with, if any."""
    if teacher.startswith("hf:"):
        return teacher.removeprefix("hf:")
    return teacher if (Path(teacher) / "tokenizer.json").exists() else None


@dataclass(frozen=True)
class TrainedOptions(ClassifierOptions):
    """Images or sentences, and a trained network, which is changed and teaches itself."""

    BRINGS: ClassVar[tuple[str, ...]] = ("model", "data", "weights", "pretrained")

    weights: Path | None = None  # .safetensors with the state dict of --model, which may also be RUN/students/NAME

    def idle(self, config: Any) -> Mapping[str, str]:
        """Beside a Config's own: seeds of claims that are not made, weights of a network that has its own."""
        found = dict(super().idle(config))
        if self.own:
            found["seeds"] = "the arms over seeds are those of the built-in experiment"
        if (Path(self.model or "") / "plan.json").exists():
            found |= dict.fromkeys(("weights", "pretrained"), f"--model {self.model} has its own weights")
        return found

    def trained(self, data: Data, default: str, *, fresh: bool = False) -> tuple[ModelSpec, nn.Module, Plan | None]:
        """The network named by ``--model``: of another run, a user's own, with published weights, from a file.

        Args:
            data: what it is to classify.
            default: the name where none is given; of sentences it is ``bert``.
            fresh: it is trained first, so it may come without weights.

        Returns:
            How to build it, the network, and how it differs from that where it is a student of another run.

        Raises:
            UserError: it has no trained weights, or for other classes, or was made from a live network.
        """
        from stillhouse.outcomes import continued
        from stillhouse.students.plan import unpacked
        from stillhouse.text.classifiers import hub_classifier, labels_in_order

        name = self.model or default
        if student := continued(name):
            spec, network, plan = student
            return spec, *unpacked(network, plan)
        spec = self.spec(data, name, "bert")
        source = spec.name.partition(":")[0]
        if source in UNTRAINED and not (self.pretrained or self.weights or fresh):
            raise UserError(
                f"--model {name} has no trained weights, which are needed to start from; give --pretrained, --weights "
                "FILE, a folder RUN/students/NAME, or --teacher-epochs N to train it first"
            )
        if self.pretrained and not (self.weights or fresh):  # its head, too, must be trained
            if name.startswith("hf:"):
                _, network = hub_classifier(name.removeprefix("hf:"), len(data.classes), self.length, trained=True)
                labels_in_order(network, data.classes, f"network {name}")
                return spec, network, None
            if source in ("timm", "torchvision") and (classes := published(name, data)[0]) != len(data.classes):
                raise UserError(
                    f"--model {name}: its published weights are for {classes or 'no'} classes, {data.name} has "
                    f"{len(data.classes)}; give --weights FILE, or also --teacher-epochs N to train it on them first"
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
