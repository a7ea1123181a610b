"""Kill a run at random moments, in the middle of a checkpoint and on a full disk; resume it; compare every byte.

    python benchmarks/reliability.py --kills 20 --inside 5 --signals 3 --out runs/reliability

Each trial is one process, forked from this one (so that the imports are paid once), running the ordinary command.
What must be the same as in the run that nobody disturbed: every file of every student, the plans, and every row of
every stage's log. Prints one JSON object; exit code 1 when any trial differs.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

FLAGS = ["--data", "digits", "--limit", "192", "--model", "stillhouse:cnn", "--ratios", "0", "0.5", "--batch", "32",
         "--epochs", "8", "--merge-epochs", "2", "--warmup", "0", "--outer-every", "2", "--optimizer", "adamw",
         "--lr", "0.003", "--log-every", "1", "--checkpoint-every", "2", "--device", "cpu", "--quiet"]  # fmt: skip


class Command:
    """A ``stillhouse`` command in a forked process; what it prints goes to a file."""

    def __init__(self, argv: list[str], out: Path):
        self.out = out
        self.began = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                with open(out, "w") as file:
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
                signal.signal(signal.SIGINT, signal.default_int_handler)
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                from stillhouse.cli import invoke

                code = invoke(argv)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def running(self) -> bool:
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def kill(self, number: int = signal.SIGKILL) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def wait(self) -> int:
        """The exit code, or minus the signal."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    @property
    def said(self) -> str:
        return self.out.read_text()


def fingerprint(folder: Path) -> str:
    """A hash of everything that must not depend on interruptions."""
    h = hashlib.sha256()
    files = [*folder.glob("students/*/*"), *folder.glob("stages/*/log.jsonl"), folder / "plans.json"]
    for path in sorted(files):
        h.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return h.hexdigest()


class Trials:
    def __init__(self, out: Path):
        self.out, self.count = out, 0
        folder = out / "whole"
        whole = Command(["run", "wml", *FLAGS, "--out", str(folder)], out / "whole.txt")
        if whole.wait() != 0:
            raise SystemExit(whole.said)
        self.seconds = time.monotonic() - whole.began
        self.expected = fingerprint(folder)

    def start(self, folder: Path) -> Command:
        """Begins the run, or goes on with it when it has begun."""
        self.count += 1
        begun = (folder / "run.json").exists()
        argv = ["resume", str(folder)] if begun else ["run", "wml", *FLAGS, "--out", str(folder)]
        return Command(argv, self.out / f"{self.count}.txt")

    def ends_the_same(self, folder: Path) -> str:
        """ "same", or what is wrong, after resuming to the end."""
        last = self.start(folder)
        code = last.wait()
        if code != 0:
            return f"resume ended with {code}: {last.said[-300:]}"
        return "same" if fingerprint(folder) == self.expected else "other bytes"

    def random_moments(self, number: int) -> list[dict]:
        """SIGKILL at a random moment; every third time another one while it resumes."""
        rows = []
        for i in range(number):
            draw, folder = random.Random(f"moment {i}"), self.out / f"kill{i}"
            moments = [draw.uniform(0, self.seconds) for _ in range(2 if i % 3 == 2 else 1)]
            reached = []
            for moment in moments:
                child = self.start(folder)
                while child.running() and time.monotonic() - child.began < moment:
                    time.sleep(0.002)
                child.kill()
                child.wait()
                reached.append(where(folder))
            rows.append({"killed after s": [round(m, 2) for m in moments], "at": reached,
                         "end": self.ends_the_same(folder)})  # fmt: skip
        return rows

    def inside_a_checkpoint(self, number: int) -> list[dict]:
        """SIGKILL as soon as the temporary file of some checkpoint appears."""
        rows = []
        for i in range(number):
            draw, folder = random.Random(f"inside {i}"), self.out / f"inside{i}"
            stage, child = folder / "stages" / "mutual", self.start(folder)
            at_least = draw.uniform(0.3, 0.7) * self.seconds
            seen: list[str] = []
            while child.running() and not seen:
                if time.monotonic() - child.began > at_least:
                    with contextlib.suppress(FileNotFoundError):
                        seen = [n for n in os.listdir(stage) if n.startswith(".") or n.endswith(".tmp")]
            child.kill()
            child.wait()
            left = [n for n in os.listdir(stage) if n.startswith(".") or n.endswith(".tmp")]
            end = self.ends_the_same(folder)
            strays = [n for n in os.listdir(stage) if n.startswith(".") or n.endswith(".tmp")]
            rows.append({"half-written file left": bool(left), "swept": not strays, "end": end})
        return rows

    def asked_to_stop(self, number: int) -> list[dict]:
        """Ctrl-C and SIGTERM in turn: exit code 130 and the way to go on."""
        rows = []
        for i in range(number):
            draw, folder = random.Random(f"signal {i}"), self.out / f"signal{i}"
            which = (signal.SIGINT, signal.SIGTERM)[i % 2]
            child = self.start(folder)
            while child.running() and not (folder / "stages").exists():
                time.sleep(0.005)
            time.sleep(draw.uniform(0, 0.3) * self.seconds)
            child.kill(which)
            code = child.wait()
            lines = child.said.splitlines()
            told = len(lines) == 1 and f"go on with: stillhouse resume {folder}" in lines[0]
            rows.append({"signal": which.name, "exit": code, "told how to go on": told, "at": where(folder),
                         "end": self.ends_the_same(folder)})  # fmt: skip
        return rows

    def full_disk(self) -> list[dict]:
        """A small file system that fills up while the run trains."""
        with small_disk(self.out / "disk") as disk:
            if disk is None:
                return []
            folder, filler = disk / "run", disk / "filler"
            child = self.start(folder)
            while child.running() and not (folder / "stages/mutual/previous.safetensors").exists():
                time.sleep(0.002)
            with open(filler, "wb", buffering=0) as file:
                while child.running():
                    try:
                        file.write(b"\0" * 4096)
                    except OSError:
                        time.sleep(0.001)
            code, lines = child.wait(), child.said.splitlines()
            one = len(lines) == 1 and lines[0].startswith("stillhouse: error:") and "space" in lines[0].lower()
            kept = "the last good checkpoint is" in child.said
            filler.unlink()
            row = {"exit": code, "one line": one, "names the last good checkpoint": kept, "said": child.said.strip(),
                   "at": where(folder), "end": self.ends_the_same(folder)}  # fmt: skip
        return [row]


def where(folder: Path) -> str:
    """How far a run has come, from its files."""
    if not (folder / "run.json").exists():
        return "before the run"
    for stage in ("merge", "mutual"):
        log = folder / "stages" / stage / "log.jsonl"
        if log.exists():
            return f"{stage}, {len(log.read_text().splitlines())} rows saved"
    return "before the first checkpoint"


@contextlib.contextmanager
def small_disk(place: Path) -> Iterator[Path | None]:
    """A tmpfs of 4 MB, where this is permitted."""
    place.mkdir(parents=True)
    try:
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", place], capture_output=True)
    except OSError:
        mounted = None
    if mounted is None or mounted.returncode != 0:
        yield None
        return
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def warm_up() -> None:
    """Imports what a run imports, and computes nothing: threads do not survive a fork."""
    import torch

    torch.set_num_threads(1)
    for name in ("sklearn.datasets", "torch_pruning", "timm", "torchvision", "tyro", "accelerate", "rich.console",
                 "matplotlib.figure", "stillhouse.recipes.wml.experiment"):  # fmt: skip
        with contextlib.suppress(ImportError):
            __import__(name)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs at random moments")
    parser.add_argument("--inside", type=int, default=5, help="SIGKILLs in the middle of a checkpoint")
    parser.add_argument("--signals", type=int, default=4, help="Ctrl-C and SIGTERM")
    parser.add_argument("--out", type=Path, default=Path("runs/reliability"))
    args = parser.parse_args()
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir(parents=True)
    warm_up()
    began = time.monotonic()
    trials = Trials(args.out)
    sections: dict[str, Callable[[], list[dict]]] = {
        "random moments": lambda: trials.random_moments(args.kills),
        "inside a checkpoint": lambda: trials.inside_a_checkpoint(args.inside),
        "asked to stop": lambda: trials.asked_to_stop(args.signals),
        "full disk": trials.full_disk,
    }
    found: dict[str, object] = {name: make() for name, make in sections.items()}
    ends = [row["end"] for rows in found.values() for row in rows]  # type: ignore[attr-defined]
    found |= {"seconds of one run": round(trials.seconds, 2), "seconds": round(time.monotonic() - began, 1),
              "trials": len(ends), "same": ends.count("same")}  # fmt: skip
    print(json.dumps(found, indent=1))
    return 0 if ends.count("same") == len(ends) else 1


if __name__ == "__main__":
    sys.exit(main())
