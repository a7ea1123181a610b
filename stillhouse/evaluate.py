"""How good, how big, how fast: accuracy, NLL, calibration, agreement, fidelity, size, MACs, latency, spread."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.errors import UserError
from stillhouse.machine import environment as environment
from stillhouse.score import pareto as pareto
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
        output: a tensor; a mapping or ModelOutput with ``logits``, or with ``logits_per_image`` (of an image-text
            model: the texts are the classes); a tuple or list whose first item is a 2-D tensor (auxiliary heads and
            features behind it are left out).

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
    for name in ("logits", "logits_per_image"):
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
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
    model: nn.Module, samples: Any, *, batch_size: int = 512, device: str | torch.device = "cpu", read: str = "input"
) -> tuple[Tensor, Tensor]:
    """Logits of the model on every sample, in order and without augmentation.

    Args:
        model: is moved to ``device``; runs in eval mode, every module's mode is restored.
        samples: has ``__len__``, ``labels`` and ``take(ids, view=None) -> {"input", "label", "id"}``.
        batch_size: samples per forward pass.
        device: where to run.
        read: what of a batch the model is given.

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
            inputs = map_tensors(batch[read], lambda t: t.to(device, non_blocking=True))
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


def fidelity(teacher: Tensor, student: Tensor) -> dict[str, float]:
    """How closely a student says what its teacher says; two students of one accuracy can differ in it.

    ``teacher_agreement``: fraction of samples with equal top-1; ``teacher_kl``: mean KL(softmax(t) ‖ softmax(z)), nats.

    Args:
        teacher, student: logits (N, C) on the same samples in the same order; computed in float64.

    Example:
        >>> fidelity(torch.zeros(2, 3), torch.zeros(2, 3))
        {'teacher_agreement': 1.0, 'teacher_kl': 0.0}
    """
    t, z = (x.detach().double().cpu() for x in _same([teacher, student]))
    kl = nn.functional.kl_div(z.log_softmax(1), t.log_softmax(1), reduction="none", log_target=True).sum(1)
    same = t.argmax(1) == z.argmax(1)
    return {"teacher_agreement": same.double().mean().item(), "teacher_kl": kl.mean().item()}


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


def count_bytes(model: nn.Module) -> int:
    """Bytes that the model's weights take: what sizes are compared in where some weights are quantised.

    Parameters and persistent buffers (where quantised weights often lie), tied ones once, at the bits they are held in.
    Running statistics of normalisation layers do not count; zeros do, until the network is sliced.

    Example:
        >>> count_bytes(nn.Sequential(nn.Linear(10, 4), nn.BatchNorm1d(4)))
        208
    """
    kept: dict[str, Any] = {**model.state_dict(keep_vars=True), **dict(model.named_parameters())}
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    held: dict[Any, int] = {}
    for name, value in kept.items():
        if isinstance(value, Tensor) and not name.endswith(statistics):
            for t in _held(value):
                where = id(t) if t.is_meta else (t.device, t.data_ptr())
                held[where] = max(held.get(where, 0), t.numel() * t.element_size())
    return sum(held.values())


def _held(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors in a tensor: packed subclasses hold several."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _held(getattr(tensor, name))
    else:
        yield tensor


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
