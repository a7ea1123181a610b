"""Checkpoints of one stage: a single safetensors file with the facts as JSON in its header, and the log beside it.

A checkpoint is written to a temporary name, fsynced and renamed; the one before it is kept as ``previous``. So at
any moment, also in the middle of a write or on a full disk, a whole good checkpoint lies under its own name.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillhouse.errors import UserError
from stillhouse.files import atomic_write

VERSION = 1


class Checkpoints:
    """The checkpoints and the log of one stage folder.

    Args:
        folder: the stage's folder.
        main: whether this process may change files; the others only read.
    """

    def __init__(self, folder: Path, main: bool = True):
        self.folder, self.main = folder, main
        self.last, self.previous = folder / "checkpoint.safetensors", folder / "previous.safetensors"
        self.log = folder / "log.jsonl"

    def write(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], rows: list[dict[str, Any]]) -> None:
        """Appends `rows` to the log, then replaces the checkpoint; raises UserError when the disk is full."""
        from safetensors.torch import save

        self.folder.mkdir(parents=True, exist_ok=True)
        # Copies, because tensors that share memory cannot be stored side by side.
        copies = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in tensors.items()}
        header = {"version": str(VERSION), "facts": json.dumps(facts)}
        header["crc32"] = str(checksum(copies, header["version"] + header["facts"]))
        try:
            with open(self.log, "a") as log:
                log.writelines(json.dumps(row) + "\n" for row in rows)
                log.flush()
                os.fsync(log.fileno())
            if self.last.exists():  # a second name for the good one, then the new one takes its place
                spare = self.folder / "previous.tmp"
                spare.unlink(missing_ok=True)
                try:
                    os.link(self.last, spare)
                except OSError:  # a file system without hard links
                    shutil.copyfile(self.last, spare)
                os.replace(spare, self.previous)
            atomic_write(self.last, save(copies, header))
        except (OSError, UserError) as error:
            raise UserError(f"cannot save step {facts['step']}: {error}; {self.describe()}") from None

    def read(self, identity: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The newest checkpoint, or None when there is none; refuses a damaged or a foreign one."""
        path = self.last if self.last.exists() else self.previous
        if self.main:
            self.sweep()
        if not path.exists():
            if self.main:
                self.log.unlink(missing_ok=True)
            return None
        tensors, facts = self.open(path)
        if facts["identity"] != dict(identity):
            raise UserError(
                f"{path} was saved under other settings: {difference(facts['identity'], identity)}; "
                "resume with the same ones, or use another folder"
            )
        if self.main:
            self.trim(int(facts["step"]))
        return tensors, facts

    def sweep(self) -> None:
        """Removes what a kill in the middle of a write left behind."""
        for stray in [*self.folder.glob(".*.safetensors"), *self.folder.glob(".*.jsonl"), *self.folder.glob("*.tmp")]:
            stray.unlink(missing_ok=True)

    def open(self, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a mapping)
            if int(header["version"]) > VERSION:
                raise UserError(
                    f"{path} was written by a newer Stillhouse (format {header['version']}); pip install -U stillhouse"
                )
            if int(header["crc32"]) != checksum(tensors, header["version"] + header["facts"]):
                raise ValueError("its checksum does not match")
            return tensors, json.loads(header["facts"])
        except UserError:
            raise
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            hint = "no earlier one is left"
            if path == self.last and self.previous.exists():
                hint = f"the one before it is good: remove {path.name} to go on from {self.previous}"
                try:
                    step = self.open(self.previous)[1]["step"]
                    hint += f" (step {step})"
                except UserError:
                    hint = f"and so is {self.previous.name}"
            raise UserError(f"checkpoint {path} is damaged ({str(error)[:120]}); {hint}") from None

    def trim(self, step: int) -> None:
        """Drops log rows of steps that the checkpoint does not know; they will be made again."""
        if not self.log.exists():
            return
        kept = []
        for line in self.log.read_text().splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # a line cut by a kill
                break
            if row["step"] < step:
                kept.append(line + "\n")
        atomic_write(self.log, "".join(kept).encode())

    def describe(self) -> str:
        for path in (self.last, self.previous):
            if path.exists():
                try:
                    return f"the last good checkpoint is {path} (step {self.open(path)[1]['step']})"
                except UserError:
                    continue
        return "there is no checkpoint yet"


def checksum(tensors: Mapping[str, Tensor], text: str = "") -> int:
    """CRC-32 over a text and names, kinds and bytes: catches flipped bits, which the file format itself does not."""
    crc = zlib.crc32(text.encode())
    for name in sorted(tensors):
        crc = zlib.crc32(f"{name}{tensors[name].dtype}{tuple(tensors[name].shape)}".encode(), crc)
        flat = tensors[name].contiguous().reshape(-1)
        crc = zlib.crc32(flat.view(torch.uint8).numpy().data, crc) if flat.numel() else crc
    return crc


def difference(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What differs, in words: ``steps 100 → 200, settings.alpha 0.5 → 0.3``."""
    keys = sorted(k for k in {*saved, *now} if saved.get(k) != now.get(k))
    shown = [f"{k.removeprefix('settings.')} {_short(saved.get(k))} → {_short(now.get(k))}" for k in keys]
    return ", ".join(shown[:6]) + (f" and {len(shown) - 6} more" if len(shown) > 6 else "")


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "…"


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimiser's state as tensors by ``index/key`` and JSON scalars; learning rates come from schedules."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}/{key}"] = value
            else:
                scalars[f"{index}/{key}"] = value
    return tensors, scalars


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for path, value in {**scalars, **tensors}.items():
        index, key = path.split("/", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
