"""Which size a student or its teacher should have, by the law of capacity gap."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from stillhouse.errors import UserError
from stillhouse.recommend.law import CAVEAT, PUBLISHED, RULE, Law, read_law, short
from stillhouse.recommend.pipelines import Advice

UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}


def parse_size(text: str) -> float | None:
    """A number of parameters: ``7B``, ``6.7e9``, ``124M``, ``60_000`` or ``60,000``; else None, also of ``1,5B``.

    Example:
        >>> parse_size("7B"), parse_size("6.7e9"), parse_size("60_000"), parse_size("timm:resnet18")
        (7000000000.0, 6700000000.0, 60000.0, None)
    """
    whole = r"[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+(?:_[0-9]+)*"  # a comma stands between thousands, or is no such comma
    found = re.fullmatch(rf"((?:{whole})(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?|\.[0-9]+)\s*([kmbt]?)", text.strip().lower())
    return float(re.sub("[_,]", "", found[1])) * UNITS[found[2]] if found else None


def size_of(text: str, flag: str = "--teacher", counts: str = "all") -> float:
    """Parameters of what is named: a number, ``RUN/students/NAME``, ``hf:NAME`` or its folder, ``timm:NAME``, ….

    Models of transformers are built without memory for their weights.

    Args:
        text: see above. flag: for messages. counts: ``all``, or ``blocks`` without embeddings and head.

    Raises:
        UserError: no size and no model of this name, or a number that is not positive.
    """
    size = parse_size(text)
    if size is None:
        return float(_counted(_model(text, flag), counts, flag))
    if not size >= 1:
        raise UserError(f"{flag} {text}: expected a number of parameters, such as 7B, 350M or 6.7e9")
    return size


def _model(text: str, flag: str) -> Any:
    from stillhouse.models import ModelSpec
    from stillhouse.outcomes import load

    source, colon, name = text.partition(":")
    if (Path(text) / "plan.json").exists():
        return load(text)
    if source == "hf" and name:
        return _hub(name, flag)
    if source == "transformers" or not colon or not name or "/" in source:
        raise UserError(
            f"{flag} {text}: expected a size (7B, 350M, 6.7e9), RUN/students/NAME, hf:NAME or its folder, timm:NAME, "
            "torchvision:NAME, stillhouse:NAME or package.module:function"
        )
    return ModelSpec(text, *_task(source, name)).build()


def _task(source: str, name: str) -> tuple[int, tuple[int, ...]]:
    """Classes and input for which a library's model is counted: its published ones."""
    if source == "timm":
        import timm

        known = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
        if known is not None:
            return known.num_classes or 1000, tuple(known.input_size)
    return (10, (1, 28, 28)) if source == "stillhouse" else (1000, (3, 224, 224))


def _hub(name: str, flag: str) -> Any:
    import torch

    from stillhouse.models import import_library

    transformers = import_library("transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        named = (config.architectures or [""])[0]
        with torch.device("meta"):
            kind = getattr(transformers, named, None)
            return kind(config) if kind else transformers.AutoModel.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{flag} hf:{name} cannot be had: {' '.join(str(error).split())[:200]}") from None


def _counted(model: Any, counts: str, flag: str) -> int:
    from stillhouse.evaluate import count_params

    if counts == "all":
        return count_params(model)
    from stillhouse.students.decoders import counted

    try:
        return counted(model, "blocks")
    except UserError as error:
        raise UserError(f"{flag}: this law counts parameters without embeddings and head; {error}") from None


def advise_size(teacher: str | None, student: str | None, law_folder: str | Path | None = None) -> Advice:
    """The best student's size for a teacher, the best teacher's for a student; of both how far they are from the law.

    Args:
        teacher, student: sizes or names, see `size_of`; one of them or both.
        law_folder: a run of ``capacity_gap_law`` whose law is taken instead of the published one.

    Raises:
        UserError: neither is given, or what `size_of` and `read_law` refuse.
    """
    law = read_law(law_folder) if law_folder is not None else PUBLISHED
    if teacher is None and student is None:
        raise UserError("recommend: give run folders and --data, or --teacher SIZE, or --student-size SIZE")
    t = None if teacher is None else size_of(teacher, "--teacher", law.counts)
    s = None if student is None else size_of(student, "--student-size", law.counts)
    facts: dict[str, Any] = {"law": law.to_json(), "teacher": t, "student": s}
    if s is None:
        assert t is not None
        s = law.student(t)
        facts["recommended"] = {"student": s, "sparsity": 1 - s / t}
        title = f"Student for a teacher of {short(t)}: about {short(s)} parameters ({s / t:.2f} × the teacher)"
    elif t is None:
        t = law.teacher(s)
        facts["recommended"] = {"teacher": t, "sparsity": 1 - s / t}
        title = f"Teacher for a student of {short(s)}: about {short(t)} parameters ({t / s:.2f} × the student)"
    else:
        best = law.teacher(s)
        facts["recommended"] = {"teacher": best, "student": law.student(t), "ratio": t / s}
        side = "near" if 0.8 <= t / best <= 1.25 else "larger than" if t > best else "smaller than"
        title = (
            f"A teacher of {short(t)} is {t / s:.2f} × the student of {short(s)}, {side} the law's best teacher, "
            f"{short(best)}; for this teacher it would be a student of {short(law.student(t))}"
        )
    pair = (s, t) if student is None or teacher is None else (s, law.teacher(s))
    facts["extrapolated"] = law.beyond(*pair)
    return Advice(title, [], [*_basis(law, *pair), CAVEAT], facts)


def _basis(law: Law, student: float, teacher: float) -> list[str]:
    of = "all parameters" if law.counts == "all" else "parameters without embeddings and head"
    ends = f", a within {law.interval[0]:.3g} … {law.interval[1]:.3g}" if law.interval else ""
    offset = f"{'−' if law.b < 0 else '+'} {short(abs(law.b))}"
    notes = [f"By T* = {law.a:.4g} S {offset} ({law.source}; R² {law.r2:.4f}{ends}), S and T counted alike, in {of}."]
    if law is PUBLISHED:
        notes.append(
            "Fitted with teachers of 70M to 2.8B and students below 3B; checked once beyond, 7B → 3B. Our reading: the "
            f"published offset, −11.498 without a unit, is in millions. In practice T = {RULE} S."
        )
    if beyond := law.beyond(student, teacher):
        notes.append(f"Extrapolated: {beyond}.")
    return notes
