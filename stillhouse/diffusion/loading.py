"""The user's teacher: a folder saved by diffusers, or what a function of theirs returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse.diffusion.denoiser import Condition, Denoiser
from stillhouse.errors import UserError
from stillhouse.files import read_json
from stillhouse.models import import_library, import_object
from stillhouse.progress import without_bars
from stillhouse.system import map_tensors


@dataclass
class Loaded:
    """A frozen teacher with what surrounds it.

    Attributes:
        name: as it was asked for.
        denoiser: the teacher.
        shape: of one sample x_0 (of latents, where there is a VAE).
        encode: prompts → conditions of as many samples; None for a network without conditions.
        decode: x_0 (n, …) → pictures (n, 1 or 3, h, w) in [0, 1].
        notes: what the user should know.
    """

    name: str
    denoiser: Denoiser
    shape: tuple[int, ...]
    encode: Callable[[Sequence[str]], Condition] | None
    decode: Callable[[Tensor], Tensor]
    notes: list[str]

    def conditions(self, prompts: Sequence[str]) -> Condition:
        """The prompts as this teacher takes them; None where it takes none.

        Raises:
            UserError: no prompts, or one that this teacher does not know.
        """
        if self.encode is None:
            if any(prompts):
                raise UserError(f"{self.name} takes no conditions, but prompts were given: {', '.join(prompts)[:80]}")
            return None
        if not prompts or not all(p.strip() for p in prompts):
            raise UserError(f"the list of prompts is empty or has an empty prompt; give --prompts, {self.wants}")
        return self.encode(list(prompts))

    @property
    def wants(self) -> str:
        """What a prompt is for this teacher."""
        return "class numbers, such as 0 1 2" if self.denoiser.passes == "class_labels" else "texts in quotes"


def load_teacher(name: str, *, prediction: str | None = None, null_class: int | None = None) -> Loaded:
    """The teacher named by ``--model``.

    Args:
        name: a folder saved by ``save_pretrained``: a whole pipeline (``model_index.json``), ``unet`` or
            ``transformer`` beside ``scheduler``, or one network and one scheduler in the same folder; ``hf:NAME``, a
            pipeline of the hub; or ``package.module:function``, which returns a `Denoiser` or (network, scheduler),
            and may return a mapping after them: ``shape``, ``null``, ``encode``, ``decode`` (see `Loaded`).
        prediction: what the network predicts, to be checked against the scheduler.
        null_class: the class label that stands for "no class".

    Only safetensors and JSON are read from folders.

    Raises:
        UserError: nothing there, no denoiser, or a scheduler that contradicts `prediction`.
    """
    extras: dict[str, Any] = {}
    if name.startswith("hf:") or Path(name).is_dir():
        network, scheduler, extras = _from_folder(name)
    elif ":" in name:
        network, scheduler, extras = _from_function(name)
    else:
        raise UserError(
            f"--model {name}: there is no such folder; give one saved by save_pretrained, hf:NAME, or "
            "package.module:function that returns (network, scheduler)"
        )
    config = getattr(network, "config", None) or {}
    if null_class is None:
        null_class = config.get("num_embeds_ada_norm")  # DiT: the row behind the last class
    null = extras.get("null", null_class)
    if isinstance(network, Denoiser):
        made = network.freeze()
    else:
        made = Denoiser.of(network, scheduler, prediction=prediction, null=null)
    shape = tuple(extras.get("shape") or _shape(config, name))
    encode = extras.get("encode") or _classes(made, config, name)
    loaded = Loaded(name, made, shape, encode, extras.get("decode") or plain, [])
    loaded.notes += [doubt] if (doubt := suspicion(loaded)) else []
    return loaded


def plain(x: Tensor) -> Tensor:
    """Pixels in [−1, 1] as pictures in [0, 1]; of more than three channels the first three."""
    x = x if x.dim() == 4 else x.flatten(1)[:, None, None]
    return ((x if x.shape[1] in (1, 3) else x[:, :3] if x.shape[1] > 3 else x[:, :1]) + 1).div(2).clamp(0, 1)


def suspicion(loaded: Loaded) -> str | None:
    """What speaks against the kind of prediction its scheduler names, or None.

    From pure noise a network that predicts ε must give about its input back, one that predicts x_0 or v must not.
    """
    made = loaded.denoiser
    if made.prediction not in ("epsilon", "sample", "v_prediction"):
        return None
    x = torch.randn(4, *loaded.shape, generator=torch.Generator().manual_seed(0))
    condition: Condition = None
    if loaded.encode is not None:
        if made.null is None and made.passes != "class_labels":
            return None  # no condition is known that surely fits
        nothing = 0 if made.null is None else made.null
        nothing = nothing if isinstance(nothing, Mapping) else torch.as_tensor(nothing)
        condition = map_tensors(nothing, lambda v: v.expand(4, *v.shape))
    made.check(x, condition)
    with torch.no_grad():
        said = made.predict(x, torch.full((4,), int(made.process.at(1.0))), condition)
    alike = float((said * x).sum() / (x * x).sum())
    if (alike > 0.5) == (made.prediction == "epsilon"):
        return None
    return (
        f"the scheduler says prediction_type {made.prediction}, but at pure noise the network gives {alike:.2f} times "
        "its input back (epsilon: near 1; others: near 0); is it trained, and is this its scheduler?"
    )


def _shape(config: Mapping[str, Any], name: str) -> tuple[int, ...]:
    size, channels = config.get("sample_size"), config.get("in_channels")
    if size is None or channels is None:
        raise UserError(
            f"--model {name}: its config has no sample_size and in_channels; return {{'shape': (c, h, w)}} too"
        )
    return (int(channels), *((int(size), int(size)) if isinstance(size, int) else map(int, size)))


def _classes(made: Denoiser, config: Mapping[str, Any], name: str) -> Callable[[Sequence[str]], Condition] | None:
    """Prompts as class numbers, for a network that has classes."""
    count = config.get("num_class_embeds") or config.get("num_embeds_ada_norm")
    if made.passes == "encoder_hidden_states":

        def refuse(prompts: Sequence[str]) -> Tensor:  # not before prompts are asked for: embeddings may be at hand
            raise UserError(
                f"--model {name}: it is conditioned on text, so encode is needed: give the whole pipeline's folder"
            )

        return refuse
    if not count:
        return None

    def encode(prompts: Sequence[str]) -> Tensor:
        for p in prompts:
            if not p.strip().isdigit() or not 0 <= int(p) < count or int(p) == made.null:
                raise UserError(
                    f"--model {name} knows classes 0 to {count - 1 - (made.null == count - 1)}, got prompt {p!r}"
                )
        return torch.tensor([int(p) for p in prompts])

    return encode


def _from_function(name: str) -> tuple[Any, Any, dict[str, Any]]:
    function = import_object(name, "--model")
    try:
        found = function()
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        raise UserError(f"--model {name} raised {type(error).__name__}: {said}") from None
    if isinstance(found, Loaded):
        found = (found.denoiser, None, {"shape": found.shape, "encode": found.encode, "decode": found.decode})
    items = list(found) if isinstance(found, tuple | list) else [found]
    extras = items.pop() if items and isinstance(items[-1], Mapping) and not callable(items[-1]) else {}
    if len(items) == 1 and isinstance(items[0], Denoiser):
        return items[0], None, dict(extras)
    if len(items) != 2 or not callable(items[0]):
        what = ", ".join(type(i).__name__ for i in items)
        raise UserError(f"--model {name} must return (network, scheduler) or a Denoiser, got {what or 'nothing'}")
    return items[0], items[1], dict(extras)


def _from_folder(name: str) -> tuple[Any, Any, dict[str, Any]]:
    diffusers = import_library("diffusers")
    folder = Path(name)
    if name.startswith("hf:") or (folder / "model_index.json").exists():
        return _from_pipeline(name.removeprefix("hf:"))
    networks = [p for p in (folder / "unet", folder / "transformer", folder) if (p / "config.json").exists()]
    schedulers = [p for p in (folder / "scheduler", folder) if (p / "scheduler_config.json").exists()]
    if not networks or not schedulers:
        lacks = "config.json of a network" if not networks else "scheduler_config.json"
        raise UserError(f"--model {name}: the folder has no {lacks}; save network and scheduler with save_pretrained")
    made = []
    for path, file in ((networks[0], "config.json"), (schedulers[0], "scheduler_config.json")):
        kind = str(read_json(path / file).get("_class_name", ""))
        cls = getattr(diffusers, kind, None)
        if cls is None:
            raise UserError(f"{path / file}: diffusers has no class {kind!r}; expected the folder of save_pretrained")
        options = {"use_safetensors": True} if file == "config.json" else {}
        try:
            made.append(cls.from_pretrained(str(path), local_files_only=True, **options))
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"--model {name}: {kind} could not be read: {' '.join(str(error).split())[:200]}") from None
    return made[0], made[1], {}


def _from_pipeline(name: str) -> tuple[Any, Any, dict[str, Any]]:
    diffusers = import_library("diffusers")
    try:
        with without_bars(diffusers, import_library("transformers")):
            pipe = diffusers.DiffusionPipeline.from_pretrained(name, use_safetensors=True, safety_checker=None)
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise UserError(
            f"--model {name}: the pipeline could not be read: {' '.join(str(error).split())[:200]}"
        ) from None
    network = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    if network is None:
        raise UserError(f"--model {name}: {type(pipe).__name__} has neither unet nor transformer")
    extras: dict[str, Any] = {}
    if getattr(pipe, "text_encoder", None) is not None:
        known = hasattr(pipe, "encode_prompt") and getattr(pipe, "text_encoder_2", None) is None

        @torch.no_grad()
        def encode(prompts: Sequence[str]) -> Tensor:
            if not known:  # said when prompts are asked for: who has embeddings needs none
                raise UserError(
                    f"--model {name}: prompts of {type(pipe).__name__} are not known here; use package.module:function"
                )
            return pipe.encode_prompt(list(prompts), "cpu", 1, False)[0].float()

        extras |= {"encode": encode, **({"null": encode([""])[0]} if known else {})}
    if (vae := getattr(pipe, "vae", None)) is not None:

        @torch.no_grad()
        def decode(x: Tensor) -> Tensor:
            shift = getattr(vae.config, "shift_factor", None) or 0.0
            return plain(vae.decode(x.to(vae.dtype) / vae.config.scaling_factor + shift).sample.float())

        extras["decode"] = decode
    return network, pipe.scheduler, extras
