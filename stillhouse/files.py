"""Files that are either whole or absent, strict JSON, and names that stay inside their folder."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from stillhouse.errors import UserError

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def inside(folder: str | Path, name: str) -> Path:
    """The path of ``name`` directly inside ``folder``; a name that could lead elsewhere is refused.

    Args:
        folder: the folder that must not be left.
        name: one plain file or folder name, as it came from a config, a checkpoint or a user.

    Raises:
        UserError: the name is empty, absolute, ``.``/``..``, or holds a separator, a NUL or a drive; or it
            names a symbolic link that points out of the folder.

    Example:
        >>> inside("runs", "p50").as_posix()
        'runs/p50'
    """
    bad = not name or name in (".", "..") or any(c in name for c in "/\\\0") or name[1:2] == ":"
    if bad:
        raise UserError(f"name {name!r} would leave {folder}; use one plain name without separators, '..' or a drive")
    path, root = Path(folder) / name, Path(folder).resolve()
    if path.is_symlink() and not path.resolve().is_relative_to(root):
        raise UserError(f"{path} is a link that leaves {folder}; replace it by a plain file or folder")
    return path


@contextmanager
def replacing(path: str | Path, suffix: str | None = None) -> Iterator[Path]:
    """Give a temporary path beside ``path``; on success it takes its place, on any error it is removed.

    The file is fsynced before the rename and the folder after it, so that a reader (also after a power cut)
    sees the old file or the new one and nothing between.

    Args:
        path: where the finished file shall be; missing folders are made.
        suffix: ending of the temporary name (some writers look at it); that of ``path`` by default.

    Raises:
        UserError: no space, no permission, or the place is a folder; the old file is untouched.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as d:
        ...     with replacing(Path(d) / "a.txt") as temp:
        ...         _ = temp.write_text("whole")
        ...     (Path(d) / "a.txt").read_text()
        'whole'
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"cannot write {path}: it is a folder; give a file name")
    temp = path.parent / f".{secrets.token_hex(8)}{path.suffix if suffix is None else suffix}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temp
        _sync(temp)
        os.replace(temp, path)
        _sync(path.parent)
    except OSError as error:
        raise _said(error, path) from error
    finally:
        with suppress(OSError):
            temp.unlink(missing_ok=True)


def _said(error: OSError, path: Path) -> UserError:
    if error.errno in _NO_SPACE:
        return UserError(f"no space left writing {path}; free some space and run again (the old file is kept)")
    why = error.strerror or str(error)
    return UserError(f"cannot write {path}: {why}; check the folder and its permissions")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write a whole file or nothing: temporary name in the same folder, fsync, rename, fsync of the folder.

    Args:
        path: the file; missing folders are made.
        data: its bytes (text is written as UTF-8).

    Raises:
        UserError: no space or not writable; the temporary file is gone and the old file unchanged.
    """
    raw = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
    with replacing(path) as temp, open(temp, "xb") as out:
        out.write(raw)
        out.flush()


def strict(value: Any, where: str = "") -> Any:
    """The value as strict JSON has it: numbers of numpy and torch become plain, NaN and infinity become None.

    Args:
        value: nested mappings, sequences, dataclasses, arrays, tensors, paths, strings and numbers.
        where: the name of the value, for the error.

    Raises:
        TypeError: something that has no JSON form; the message says where it sits.

    Example:
        >>> strict({"loss": float("nan"), "seeds": (0, 1)})
        {'loss': None, 'seeds': [0, 1]}
    """
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(k): strict(v, f"{where}.{k}" if where else str(k)) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        return [strict(v, f"{where}[{i}]") for i, v in enumerate(items)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "tolist"):
        return strict(value.tolist(), where)
    raise TypeError(f"{where or 'value'} of type {type(value).__name__} has no JSON form")


def write_json(path: str | Path, value: Any) -> None:
    """Write `strict` JSON (UTF-8, two spaces, keys in the given order), whole or not at all.

    Args:
        path: the file.
        value: see `strict`.

    Raises:
        UserError: not writable. TypeError: no JSON form.
    """
    text = json.dumps(strict(value), indent=2, ensure_ascii=False, allow_nan=False)
    atomic_write(path, text + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file that this library wrote.

    Args:
        path: the file.

    Returns:
        The parsed value.

    Raises:
        UserError: the file is missing, unreadable or damaged; the message names it and the place.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8")
        return json.loads(text, parse_constant=_refuse)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; check the path or run again to make it") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        why = " ".join(str(error).split())[:160]
        raise UserError(f"{path} is damaged (not JSON: {why}); restore it or run again to make it") from None


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")
