"""The last student as a file that others run; ONNX with 8-bit weights and activations."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.data import Data, Samples
from stillhouse.engine import Run
from stillhouse.errors import UserError, need
from stillhouse.evaluate import classification, predict
from stillhouse.export import SUFFIX, export
from stillhouse.files import replacing
from stillhouse.outcomes import Member
from stillhouse.recipes.pipeline.config import Step
from stillhouse.system import fold, walk


def exported(run: Run, member: Member, step: Step, data: Data) -> str:
    """Writes the student to ``exports/`` and checks it there; says what was found."""

    def make() -> str:
        path = run.folder / "exports" / f"{member.name}{SUFFIX.get(step.value, '.int8.onnx')}"
        path.parent.mkdir(parents=True, exist_ok=True)
        x = data.train.take(np.arange(2))["input"]
        if step.value == "onnx-int8":
            return int8(member.model, data, path, run.seed)
        found = export(member.model, x, step.value, path)  # type: ignore[arg-type]
        return f"{path.name}, {found.bytes:,} bytes, relative difference {found.max_rel_diff:.1e}"

    said = run.memo(f"{member.name}-{step.value}", make) if run.main else ""
    run.barrier()
    return said


def int8(model: nn.Module, data: Data, path: Path, seed: int = 0, calibrate: int = 256) -> str:
    """ONNX with int8 weights, per output channel, and int8 activations, calibrated on training samples.

    A weight that is already symmetric int8 per output channel keeps its values: the scale is max|w|/127 in both.

    Args:
        model: exported as ONNX first, with its parity check.
        data: calibration from its training part; accuracy on its test part, by onnxruntime.
        path: the file to write. seed: chooses the samples. calibrate: how many.

    Returns:
        Bytes, agreement, accuracy and latency beside the float32 file's, for people.

    Raises:
        UserError: onnxruntime is missing, or cannot quantise this network.
    """
    try:
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static
        from onnxruntime.quantization.calibrate import CalibrationDataReader
    except ImportError:
        raise need("export", "onnxruntime") from None

    class Reader(CalibrationDataReader):
        def __init__(self, names: list[str]):
            ids = np.random.default_rng(fold(seed, "calibrate")).permutation(len(data.train))[:calibrate]
            self.feeds = iter([fed(data.train.take(part)["input"], names) for part in np.array_split(ids, 8)])

        def get_next(self) -> Any:
            return next(self.feeds, None)

    before = logging.root.manager.disable
    with tempfile.TemporaryDirectory() as folder, replacing(path, ".onnx") as temp:
        plain = Path(folder) / "float.onnx"
        export(model, data.train.take(np.arange(2))["input"], "onnx", plain)
        one = session(plain)
        logging.disable(logging.WARNING)  # of its own advice, on the root logger
        try:
            quantize_static(
                str(plain), str(temp), Reader([i.name for i in one.get_inputs()]), quant_format=QuantFormat.QDQ,
                per_channel=True, weight_type=QuantType.QInt8,
            )  # fmt: skip
        except Exception as error:  # it raises many kinds; the user needs one line
            why = " ".join(str(error).split())[:200]
            raise UserError(f"onnxruntime cannot quantise {type(model).__name__}: {why}; use export:onnx") from error
        finally:
            logging.disable(before)
        two = session(temp)
        (z, _), (a, y), (b, _) = predict(model, data.test), answers(one, data.test), answers(two, data.test)
        same = float((z.argmax(1) == b.argmax(1)).double().mean())
        x = data.test.take(np.arange(1))["input"]
        sizes = f"{temp.stat().st_size:,} bytes (float32 {plain.stat().st_size:,})"
        speed = f"{milliseconds(two, x):.3f} ms (float32 {milliseconds(one, x):.3f})"
    right = [100 * classification(logits, y)["accuracy"] for logits in (b, a)]
    return (
        f"{path.name}, {sizes}, {speed} in onnxruntime, top-1 of PyTorch on {100 * same:.1f} % of the test samples, "
        f"accuracy {right[0]:.2f} % (float32 {right[1]:.2f} %)"
    )


def session(path: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def fed(x: Any, names: list[str]) -> dict[str, np.ndarray]:
    """An input as onnxruntime takes it."""
    given = x if isinstance(x, Mapping) else dict(zip(names, walk(x)))
    return {n: given[n].numpy() for n in names}


def answers(runner: Any, samples: Samples, size: int = 256) -> tuple[Tensor, Tensor]:
    """Logits (N, C) of a session on every sample, and the labels (N,)."""
    names = [i.name for i in runner.get_inputs()]

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(samples), size):
            batch = samples.take(np.arange(start, min(start + size, len(samples))))
            yield torch.as_tensor(runner.run(None, fed(batch["input"], names))[0]), batch["label"]

    logits, labels = zip(*batches(), strict=True)
    return torch.cat(logits), torch.cat(labels)


def milliseconds(runner: Any, x: Any, repeats: int = 50) -> float:
    """Median time of one call, one thread."""
    feed, times = fed(x, [i.name for i in runner.get_inputs()]), []
    for _ in range(repeats + 5):
        began = time.perf_counter()
        runner.run(None, feed)
        times.append(1e3 * (time.perf_counter() - began))
    return float(np.median(times[5:]))
