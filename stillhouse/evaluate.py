"""How good, how big, how fast: accuracy, NLL, calibration, agreement, size, MACs, latency, spread, Pareto."""

from __future__ import annotations

import math
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.system import map_tensors, walk


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode; afterwards every module has the mode it had (a frozen BN stays frozen).

    Example:
        >>> net = nn.Sequential(nn.Dropout()).train()
        >>> with evaluating(net):
        ...     net.training
        False
        >>> net.training
        True
    """
    before = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, mode in before:
            module.training = mode


def call(model: nn.Module, example: Any) -> Any:
    """The model's answer to one input: a mapping is passed by name, a tuple or list by position."""
    if isinstance(example, Mapping):
        return model(**example)
    if isinstance(example, tuple | list):
        return model(*example)
    return model(example)


def logits_of(output: Any) -> Tensor:
    """The logits (n, c) in what a model returned.

    Args:
        output: a tensor; a mapping or ModelOutput with ``logits``; a tuple or list whose first item is a 2-D
            tensor (auxiliary heads and features behind it are left out).

    Returns:
        The tensor itself, attached as it was.

    Raises:
        UserError: nothing of the kind; says what came.

    Example:
        >>> logits_of({"logits": torch.zeros(2, 3), "loss": None}).shape
        torch.Size([2, 3])
    """
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    if isinstance(output, tuple | list) and output and isinstance(output[0], Tensor) and output[0].dim() == 2:
        return output[0]
    raise UserError(
        f"the model must return logits (n, classes), a mapping with 'logits' or a tuple that starts so; "
        f"it returned {_what(output)}; wrap it in a module that returns the logits"
    )


def _what(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a tensor {tuple(output.shape)}"
    if isinstance(output, Mapping):
        return f"a mapping with keys {sorted(map(str, output))[:8]}"
    if isinstance(output, tuple | list):
        inner = ", ".join(_what(o) for o in output[:4])
        return f"a {type(output).__name__} of {len(output)} ({inner})"
    return f"a {type(output).__name__}"


@torch.no_grad()
def predict(
    model: nn.Module, samples: Any, *, batch_size: int = 512, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor]:
    """Logits of the model on every sample, in order and without augmentation.

    Args:
        model: is moved to ``device``; runs in eval mode, every module's mode is restored.
        samples: has ``__len__``, ``labels`` and ``take(ids, view=None) -> {"input", "label", "id"}``.
        batch_size: samples per forward pass.
        device: where to run.

    Returns:
        logits (N, C) float32 and labels (N,) int64, both on the CPU.

    Raises:
        UserError: no samples, or the model does not give one row of logits per sample.
    """
    if len(samples) == 0:
        raise UserError("predict needs at least one sample, got an empty set; check the data")
    logits, labels = [], []
    model.to(device)
    with evaluating(model):
        for start in range(0, len(samples), batch_size):
            batch = samples.take(np.arange(start, min(start + batch_size, len(samples))), view=None)
            inputs = map_tensors(batch["input"], lambda t: t.to(device, non_blocking=True))
            out = logits_of(call(model, inputs))
            if out.dim() != 2 or len(out) != len(batch["label"]):
                raise UserError(
                    f"logits must be (n, classes) with n={len(batch['label'])}, got {tuple(out.shape)} from "
                    f"{type(model).__name__}; give a classifier"
                )
            logits.append(out.float().cpu())
            labels.append(torch.as_tensor(batch["label"]).long().cpu())
    return torch.cat(logits), torch.cat(labels)


def classification(logits: Tensor, labels: Tensor, bins: int = 15) -> dict[str, float]:
    """Accuracy, negative log-likelihood, calibration error and Brier score of a classifier.

    With q = softmax(z), confidence max_c q_c and B equal-width bins of confidence (b−1)/B < conf ≤ b/B:
    ECE = Σ_b |b|/N · |accuracy_b − confidence_b|; NLL = mean −log q_y (nats);
    Brier = mean Σ_c (q_c − 1[c=y])².

    Args:
        logits: (N, C), unnormalised; computed in float64. labels: (N,) class indices.
        bins: number of bins.

    Returns:
        ``accuracy``, ``nll``, ``ece``, ``brier``. Where logits are NaN the last three are NaN and those rows
        count as wrong.

    Raises:
        UserError: empty, shapes that do not fit, labels out of range.

    Source: Guo et al., On Calibration of Modern Neural Networks, 2017; Brier, 1950.

    Example:
        >>> round(classification(torch.zeros(4, 2), torch.tensor([0, 0, 1, 1]))["nll"], 4)
        0.6931
    """
    z, y = logits.detach().double().cpu(), labels.detach().long().cpu()
    if z.dim() != 2 or y.shape != z.shape[:1] or z.numel() == 0:
        raise UserError(
            f"classification needs logits (N, C) and labels (N,) with N, C > 0, got "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if int(y.min()) < 0 or int(y.max()) >= z.shape[1]:
        raise UserError(
            f"labels must lie in 0..{z.shape[1] - 1} for {z.shape[1]} logits, got "
            f"{int(y.min())}..{int(y.max())}; check the number of classes of the model and of the data"
        )
    finite = ~z.isnan().any(1)
    right = (z.argmax(1) == y) & finite
    accuracy = right.double().mean().item()
    if not bool(finite.all()):
        return {"accuracy": accuracy, "nll": math.nan, "ece": math.nan, "brier": math.nan}
    log_q, q = z.log_softmax(1), z.softmax(1)
    confidence = q.max(1).values
    index = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = torch.zeros(bins, dtype=torch.float64).index_add_(0, index, right.double() - confidence)
    return {
        "accuracy": accuracy,
        "nll": -log_q.gather(1, y[:, None]).mean().item(),
        "ece": gap.abs().sum().item() / len(y),
        "brier": (q - nn.functional.one_hot(y, z.shape[1])).pow(2).sum(1).mean().item(),
    }


def agreement(logits: Sequence[Tensor]) -> Tensor:
    """How often two models name the same class: (M, M) fractions of equal top-1 among N samples.

    Args:
        logits: M tensors (N, C) on the same samples in the same order.
    """
    top = torch.stack([z.argmax(1) for z in _same(logits)])
    return (top[:, None] == top[None]).double().mean(2)


def diversity(logits: Sequence[Tensor]) -> float:
    """Mean over pairs of models and over samples of ‖softmax(z_i) − softmax(z_j)‖₂, in [0, √2].

    Args:
        logits: M tensors (N, C) on the same samples; for M = 1 the diversity is 0.

    Source: Chen et al., Online Knowledge Distillation with Diverse Peers (OKDDip), 2020.
    """
    q = [z.detach().double().softmax(1) for z in _same(logits)]
    pairs = [(a - b).norm(dim=1).mean() for i, a in enumerate(q) for b in q[:i]]
    return torch.stack(pairs).mean().item() if pairs else 0.0


def _same(logits: Sequence[Tensor]) -> Sequence[Tensor]:
    shapes = {tuple(z.shape) for z in logits}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise UserError(f"all models need logits (N, C) on the same samples, got shapes {sorted(shapes)}")
    return logits


def count_params(model: nn.Module) -> int:
    """Number of parameters; one that is used in several places counts once."""
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def count_macs(model: nn.Module, example: Any) -> int:
    """Multiply–accumulate operations of one sample through the model in eval mode.

    Counted by torch's FlopCounterMode (two FLOPs are one MAC): convolutions, matrix products and attention;
    element-wise work and recurrent kernels are not counted.

    Args:
        model: any module.
        example: an input with a batch dimension (a mapping is passed by name, a tuple by position); its first
            sample is used.

    Example:
        >>> count_macs(nn.Linear(10, 4), torch.zeros(1, 10))
        40
    """
    from torch.utils.flop_counter import FlopCounterMode

    one = map_tensors(example, lambda t: t[:1] if t.dim() else t)
    # The fused attention path of nn.MultiheadAttention is one opaque kernel that the counter cannot see.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluating(model), FlopCounterMode(display=False) as counter:
            call(model, one)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return counter.get_total_flops() // 2


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass. Times in milliseconds; ``threads`` is the CPU threads it ran with."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    threads: int
    batch: int
    repeats: int
    device: str


@torch.inference_mode()
def latency(model: nn.Module, example: Any, *, threads: int = 1, repeats: int = 30, warmup: int = 5) -> Latency:
    """Measured time of one forward pass in eval mode, with its spread.

    Args:
        model: measured where its parameters are. example: one input with a batch dimension, on that device.
        threads: CPU threads during the measurement; the old number is restored.
        repeats: timed passes. warmup: untimed passes before them.

    Returns:
        Median and 10th/90th percentile in ms. On CUDA each pass is timed by events after a synchronisation.

    Raises:
        UserError: no thread or no repeat.
    """
    if threads < 1 or repeats < 1:
        raise UserError(f"latency needs threads >= 1 and repeats >= 1, got threads={threads}, repeats={repeats}")
    tensors = list(walk(example))
    device = next((t.device for t in [*model.parameters(), *tensors]), torch.device("cpu"))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with evaluating(model):
            for _ in range(warmup):
                call(model, example)
            passes = [_timed(model, example, device) for _ in range(repeats)]
    finally:
        torch.set_num_threads(before)
    p10, median, p90 = (float(v) for v in np.percentile(passes, [10, 50, 90]))
    return Latency(median, p10, p90, threads, len(tensors[0]) if tensors else 1, repeats, str(device))


def _timed(model: nn.Module, example: Any, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call(model, example)
        end.record()
        torch.cuda.synchronize(device)
        return float(start.elapsed_time(end))
    begin = time.perf_counter()
    call(model, example)
    return (time.perf_counter() - begin) * 1e3


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, sample standard deviation (n−1), least, greatest and count of some measurements.

    Args:
        values: one number per seed. With one value the deviation is NaN: it cannot be known.

    Example:
        >>> spread([1.0, 3.0])["std"]
        1.4142135623730951
    """
    x = np.asarray(list(values), dtype=np.float64)
    if x.size == 0:
        raise UserError("spread needs at least one value, got none")
    std = float(x.std(ddof=1)) if x.size > 1 else math.nan
    return {
        "mean": float(x.mean()),
        "std": std,
        "min": float(x.min()),
        "max": float(x.max()),
        "n": int(x.size),
    }


def pareto(points: Sequence[tuple[float | None, float | None]]) -> list[bool]:
    """Which (cost, quality) points no other point beats: lower cost is better, higher quality is better.

    A point is beaten when another is at least as good in both and better in one; equal points stay together.
    Points with a missing or non-finite number are never on the front.

    Example:
        >>> pareto([(1, 0.5), (2, 0.9), (3, 0.8)])
        [True, True, False]
    """
    known = [
        (float(c), float(q)) if c is not None and q is not None and math.isfinite(c) and math.isfinite(q) else None
        for c, q in points
    ]
    others = [p for p in known if p is not None]
    return [p is not None and not any(c <= p[0] and q >= p[1] and (c, q) != p for c, q in others) for p in known]


def environment() -> dict[str, Any]:
    """What the numbers were measured on: versions, platform, processor, threads, devices."""
    from importlib import metadata

    def version(package: str) -> str:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            return "unknown"

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "stillhouse": version("stillhouse"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 0,
        "threads": torch.get_num_threads(),
        "devices": gpus or ["cpu"],
    }


def _cpu_name() -> str:
    if sys.platform == "linux":
        try:
            with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    if line.lower().startswith("model name"):
                        return line.split(":", 1)[1].strip()
        except OSError:
            pass
    return platform.processor() or platform.machine()
