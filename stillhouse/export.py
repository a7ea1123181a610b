"""A model as files that live without the run: safetensors + plan.json, ONNX, torch.export; each checked."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillhouse import onnx_codes
from stillhouse.errors import UserError, did_you_mean, need
from stillhouse.evaluate import call, evaluating
from stillhouse.files import atomic_write, read_json, replacing, strict
from stillhouse.system import fold, map_tensors, walk

WEIGHTS, PLAN = "model.safetensors", "plan.json"
Runner = Callable[[Any], list[Tensor]]
Format = Literal["onnx", "onnx-packed", "torch-export", "safetensors"]
Batch = Literal["dynamic"] | int
SUFFIX = {"onnx": ".onnx", "onnx-packed": ".packed.onnx", "torch-export": ".pt2", "safetensors": ".safetensors"}


@dataclass(frozen=True)
class Parity:
    """What the check of an exported file found.

    Attributes:
        path: the file. format: one of `SUFFIX`.
        max_abs_diff: largest |file − model| over all outputs of all inputs tried.
        max_rel_diff: largest |file − model| / max(1, largest |output|), each output of each input by its own size.
        samples: how many random samples were tried.
        bytes: size of the file.
    """

    path: str
    format: str
    max_abs_diff: float
    max_rel_diff: float
    samples: int
    bytes: int

    def __str__(self) -> str:
        worst = f"{self.max_abs_diff:.2e}, relative {self.max_rel_diff:.2e}, on {self.samples} random samples"
        return f"{self.path} ({self.format}, {self.bytes} bytes): largest difference {worst}"


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as safetensors can hold it: CPU, contiguous, every entry with storage of its own.

    Tied weights are written once per name, so a student loads without knowing what is tied.

    Raises:
        UserError: an entry is not a tensor (extra state of a module) or has no data (meta device).
    """
    out: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"{name!r} in the state is a {type(value).__name__}, only tensors can be saved; move it out"
            )
        if value.is_meta:
            raise UserError(f"{name!r} is on the meta device and has no data; load the weights before saving")
        out[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
    return out


def save_student(
    folder: str | Path,
    model: nn.Module,
    *,
    plan_json: Mapping[str, Any],
    encode: Callable[[dict[str, Tensor]], Mapping[str, Tensor]] = dict,
) -> Path:
    """Write ``model.safetensors`` and ``plan.json`` into a folder, each whole or not at all.

    The weights carry the SHA-256 of the plan they were saved with: after a crash between the two files
    `read_tensors` says so instead of mixing two saves.

    Args:
        folder: made when missing; other files in it stay.
        model: the student; parameters and buffers are written as they are (dtype kept).
        plan_json: how to build the student's structure, strict JSON.
        encode: what is stored in place of the tensors (`Plan.encoded`: packed weights).

    Returns:
        The folder.

    Raises:
        UserError: no space, not writable, or a state entry that is no tensor.
    """
    return save_tensors(folder, encode(weights(model)), plan_json)


def save_tensors(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    facts: Mapping[str, Any],
    names: tuple[str, str] = (WEIGHTS, PLAN),
) -> Path:
    """Tensors and what they mean as a safetensors and a JSON file with these names, bound to each other by a hash.

    Raises:
        UserError: no space or not writable.
    """
    from safetensors.torch import save

    folder = Path(folder)
    text = json.dumps(strict(facts), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    raw = text.encode("utf-8", "backslashreplace")
    own = {k: t.detach().cpu().clone(memory_format=torch.contiguous_format) for k, t in tensors.items()}
    atomic_write(folder / names[0], canonical(save(own, {"format": "pt", "plan_sha256": _sha(raw)})))
    atomic_write(folder / names[1], raw)
    return folder


def canonical(raw: bytes) -> bytes:
    """The same safetensors file with its metadata in the order of the alphabet (the library's order is random)."""
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + raw[8 + size :]


def read_tensors(
    folder: str | Path, names: tuple[str, str] = (WEIGHTS, PLAN)
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts as `save_tensors` (or `save_student`) wrote them; nothing pickled is read.

    Returns:
        The tensors (on the CPU) and the facts.

    Raises:
        UserError: a file is missing or damaged, or the two are not of the same save; names the file.
    """
    data, meaning = (Path(folder) / name for name in names)
    facts = read_json(meaning)
    if not isinstance(facts, dict):
        raise UserError(f"{meaning} holds a {type(facts).__name__}, expected an object; export the student again")
    state, metadata = read_weights(data)
    expected = metadata.get("plan_sha256")
    if expected is not None and expected != _sha(meaning.read_bytes()):
        raise UserError(f"{names[1]} and {names[0]} in {folder} are not of the same save; export the student again")
    return state, facts


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        UserError: the file is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the folder or export the student again") from None
    except (SafetensorError, OSError, ValueError) as error:
        why = " ".join(str(error).split())[:160]
        raise UserError(f"{path} is damaged ({why}); restore it or export the student again") from None


def _sha(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()


def export(
    model: nn.Module,
    example: Any,
    to: Format,
    path: str | Path,
    *,
    tolerance: float = 1e-4,
    batch: Batch = "dynamic",
    structure: nn.Module | None = None,
) -> Parity:
    """Write the model in a format others can run, run the file, and compare it with the model.

    The file takes its place only when |file − model| ≤ tolerance · max(1, max |model|) for each output of each of
    several random inputs shaped like the example; otherwise it is kept beside as ``*.failed``. The bound grows with
    the outputs because float32 rounds relative to them: outputs of 10³ may differ by 10⁻³ with no digit wrong.

    Args:
        model: exported in eval mode on the CPU (one on another device is copied); stays as it is.
        example: one input with a batch dimension first (a mapping is passed by name, a tuple by position).
        to: ``onnx`` (torch's exporter, checked in onnxruntime), ``onnx-packed`` (the same, a quantised student's
            weights as integers of 8 or 4 bits: `onnx_codes`), ``torch-export`` (a ``.pt2`` program) or
            ``safetensors`` (weights only, reloaded into ``structure`` or a zeroed copy of the model).
        path: the file to write.
        tolerance: see above.
        batch: ``"dynamic"`` for any batch size, or one fixed size.
        structure: for ``safetensors``, a freshly built model of the same structure.

    Returns:
        The `Parity` found.

    Raises:
        UserError: unknown format, missing extra, a model that cannot be traced, or parity not met.

    Source: safetensors; torch.export and torch.onnx.export(dynamo=True) of PyTorch.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as d:
        ...     found = export(nn.Linear(4, 2), torch.zeros(1, 4), "safetensors", f"{d}/net.safetensors")
        >>> found.max_abs_diff
        0.0
    """
    writers: dict[str, Callable[..., Runner]] = {
        "onnx": _onnx, "onnx-packed": partial(_onnx, packed=True), "torch-export": _torch_export,
        "safetensors": _safetensors,
    }  # fmt: skip
    if to not in writers:
        raise UserError(f"unknown export format {to!r}; {did_you_mean(str(to), writers)}")
    if batch != "dynamic" and (not isinstance(batch, int) or batch < 1):
        raise UserError(f"batch must be 'dynamic' or a size >= 1, got {batch!r}")
    path, example = Path(path), map_tensors(example, lambda t: t.detach().cpu())
    model = model if all(t.device.type == "cpu" for t in _tensors(model)) else copy.deepcopy(model).cpu()
    sizes = [1, 3] if batch == "dynamic" else [batch, batch]
    with evaluating(model), replacing(path, SUFFIX[to]) as temp:
        run = writers[to](model, _resized(example, 2 if batch == "dynamic" else batch), temp, batch, structure)
        gap, relative = _compare(model, example, run, sizes)
        found = Parity(str(path), to, gap, relative, 2 * sum(sizes), temp.stat().st_size)
        if not relative <= tolerance:
            failed = path.with_name(path.name + ".failed")
            os.replace(temp, failed)
            raise UserError(
                f"{to} file differs from the model by {gap:.3g}, relative {relative:.3g}, allowed {tolerance:.3g}; "
                f"it is kept as {failed}; raise the tolerance or use another format"
            )
    return found


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _resized(example: Any, n: int) -> Any:
    """The example with batch size n: its samples repeated in turn."""
    return map_tensors(example, lambda t: t[torch.arange(n) % len(t)] if t.dim() else t)


def _random(example: Any, n: int, seed: int) -> Any:
    """A random input like the example: normal with its mean and deviation, or whole numbers in its range."""
    g = torch.Generator().manual_seed(seed)

    def draw(t: Tensor) -> Tensor:
        if not t.dim():
            return t
        shape = (n, *t.shape[1:])
        if t.is_floating_point():
            centre, wide = float(t.double().mean()), float(t.double().std(correction=0))
            return (torch.randn(shape, generator=g) * (wide or 1.0) + centre).to(t.dtype)
        return torch.randint(int(t.min()), int(t.max()) + 1, shape, generator=g).to(t.dtype)

    return map_tensors(example, draw)


@torch.no_grad()
def _compare(model: nn.Module, example: Any, run: Runner, sizes: list[int]) -> tuple[float, float]:
    """Largest difference between file and model over two random inputs of each size: absolute and relative."""
    worst, relative = 0.0, 0.0
    for index, n in enumerate(sizes * 2):
        inputs = _random(example, n, fold("parity", index))
        ours = list(walk(call(model, inputs)))
        try:
            theirs = run(inputs)
        except Exception as error:
            raise UserError(f"the exported file does not run on a batch of {n}: {_line(error)}") from error
        if [tuple(t.shape) for t in ours] != [tuple(t.shape) for t in theirs]:
            return math.inf, math.inf
        for a, b in zip(ours, theirs):
            if not a.numel():
                continue
            gap = (a.double() - b.double()).abs().max().item()
            if not math.isfinite(gap):
                return math.inf, math.inf
            worst = max(worst, gap)
            relative = max(relative, gap / max(1.0, a.double().abs().max().item()))
    return worst, relative


def _line(error: Exception) -> str:
    """The first line an error says, or its kind."""
    return next((s.strip()[:200] for s in str(error).splitlines() if s.strip()), type(error).__name__)


def _split(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments of the call."""
    if isinstance(example, Mapping):
        return (), dict(example)
    return (tuple(example), {}) if isinstance(example, tuple | list) else ((example,), {})


def _program(model: nn.Module, example: Any, batch: Batch) -> torch.export.ExportedProgram:
    args, named = _split(example)
    shapes = None
    if batch == "dynamic":
        axis = {0: torch.export.Dim.DYNAMIC}
        free = map_tensors((args, named), lambda t: axis if t.dim() else None)  # type: ignore[arg-type, return-value]
        shapes = free[1] if named else free[0]
    try:
        with torch.no_grad():
            return torch.export.export(model, args, named, dynamic_shapes=shapes)
    except Exception as error:  # torch.export raises many kinds; the user needs one line
        fix = "give batch=1 or another fixed size if the model fixes its batch" if shapes else "simplify its forward"
        raise UserError(f"{type(model).__name__} cannot be exported by torch.export: {_line(error)}; {fix}") from error


def check_packages(to: str) -> None:
    """Raises UserError where a package is missing that a format needs; for what exports after a long training."""
    try:
        if to.startswith("onnx"):
            import onnx  # noqa: F401
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
    except ImportError as error:
        raise need("export", error.name or "onnx") from None


def _onnx(
    model: nn.Module, example: Any, path: Path, batch: Batch, _: nn.Module | None, packed: bool = False
) -> Runner:
    check_packages("onnx")
    import onnx
    import onnxruntime

    if sum(t.numel() * t.element_size() for t in _tensors(model)) > 2_000_000_000:
        raise UserError("an ONNX file holds at most 2 GB of weights; use torch-export or safetensors")
    if any(t.dtype == torch.bfloat16 for t in _tensors(model)):
        raise UserError("onnxruntime does not run bfloat16 on the CPU; export model.float()")
    program = _program(model, example, batch)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            version = onnx_codes.opset(model) if packed else None
            written = torch.onnx.export(program, dynamo=True, verbose=False, opset_version=version)
        assert written is not None
        proto = written.model_proto
        if packed:
            onnx_codes.store(proto, model)
        path.write_bytes(proto.SerializeToString())
        onnx.checker.check_model(str(path), full_check=True)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = torch.get_num_threads(), 3
        options.add_session_config_entry(*onnx_codes.DECODE_AT_LOAD)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except (OSError, UserError):
        raise
    except Exception as error:  # exporter, checker and runtime each have their own kinds
        raise UserError(f"{type(model).__name__} has no valid ONNX form: {_line(error)}; use torch-export") from error
    names = [i.name for i in session.get_inputs()]

    def run(inputs: Any) -> list[Tensor]:
        given = inputs if isinstance(inputs, Mapping) else dict(zip(names, walk(inputs)))
        return [torch.as_tensor(o) for o in session.run(None, {n: given[n].numpy() for n in names})]

    return run


def _torch_export(model: nn.Module, example: Any, path: Path, batch: Batch, _: nn.Module | None) -> Runner:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(_program(model, example, batch), str(path))
        loaded = torch.export.load(str(path)).module()
    return lambda inputs: list(walk(call(loaded, inputs)))


def _safetensors(model: nn.Module, _: Any, path: Path, __: Batch, structure: nn.Module | None) -> Runner:
    from safetensors.torch import save

    path.write_bytes(save(weights(model), {"format": "pt"}))
    fresh = structure
    if fresh is None:
        fresh = copy.deepcopy(model)
        with torch.no_grad():
            for value in fresh.state_dict().values():
                value.zero_()
    state, _metadata = read_weights(path)
    try:
        fresh.load_state_dict(state)
    except RuntimeError as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"the given structure does not take these weights: {why}") from None
    fresh.eval()
    return lambda inputs: list(walk(call(fresh, inputs)))
