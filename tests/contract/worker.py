"""What the contract table runs in processes of their own.

worker.py joint OUT       the JOINT rows, as one of several processes (RANK, WORLD_SIZE, … say which)
worker.py load OUT DIR…   stillhouse.load of every student folder; its answers to a fixed input
again OUT DIR…  stillhouse.load of every other outcome's folder, saved again under OUT/0, OUT/1, …
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from stillhouse.errors import Interrupted, NotFinite
from stillhouse.run import Run

TESTS = Path(__file__).parents[1]
sys.path[:0] = [str(TESTS / "contract"), str(TESTS / "recipes")]
torch.set_num_threads(1)


def joint(out: Path) -> None:
    from rows import JOINT

    from stillhouse.files import write_json

    run = Run(out / "rank", device="cpu")  # before the rows: it makes the process group
    assert run.world == 2, run.world
    for row in JOINT:
        outcome = row.make(out / "shared" / str(row))
        outcome.save(out / f"rank{run.rank}" / str(row))
        importance = [m.importance for m in getattr(outcome, "members", [])]
        write_json(out / f"rank{run.rank}" / str(row) / "importance.json", importance)
    for name, kind in (("stopped", "SIGTERM"), ("not finite", "NaN")):
        (out / f"rank{run.rank}" / name).write_text(trouble(run.child(name), kind))
    run.close()


def trouble(run: Run, kind: str) -> str:
    """What a process says when only the second one is told to stop, or only its data are bad, at step 4.

    The update is due at every third step: the processes must also agree where they have no gradient to share.
    """
    from functools import partial

    from stillhouse.engine import fit
    from stillhouse.system import Batch, Clock, System, Terms, Update

    class Line(System):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(2))

        def updates(self) -> list[Update]:
            every = 3 if kind == "SIGTERM" else 1
            return [Update("learn", [self.w], partial(torch.optim.SGD, lr=0.1), every=every)]

        def learn(self, batch: Batch, clock: Clock) -> Terms:
            return Terms(loss=(batch["input"] * self.w).mean())

    class Rows:
        steps_per_epoch, fingerprint = 4, "rows"

        def batch(self, clock: Clock) -> Batch:
            x = torch.ones(3, 2)
            if clock.rank == 1 and clock.step == 4:
                if kind == "SIGTERM":
                    os.kill(os.getpid(), signal.SIGTERM)
                else:
                    x[0] = torch.nan
            return {"input": x}

    run.checkpoint_every = 3
    try:
        fit(run, "s", Line(), Rows(), steps=20)
    except (Interrupted, NotFinite) as error:
        return str(error)
    return "it went on"


def load(out: Path, folders: list[str]) -> None:
    from safetensors.torch import save_file

    import stillhouse
    from stillhouse.files import read_json

    answers = {}
    for folder in folders:
        facts = read_json(Path(folder) / "plan.json")
        with torch.no_grad():
            answers |= answers_of(stillhouse.load(folder), facts, folder)
    save_file({k: v.contiguous() for k, v in answers.items()}, out)


def again(out: Path, folders: list[str]) -> None:
    import stillhouse

    for i, folder in enumerate(folders):
        stillhouse.load(folder).save(out / str(i))


def answers_of(model: torch.nn.Module, facts: Any, name: str) -> dict[str, torch.Tensor]:
    """Every tensor a model answers with to fixed values of the inputs that its plan.json describes."""
    from stillhouse.evaluate import call
    from stillhouse.outcomes import example_inputs
    from stillhouse.system import map_tensors, walk

    draws = torch.Generator().manual_seed(7)

    def draw(t: torch.Tensor) -> torch.Tensor:
        return torch.randn(t.shape, generator=draws, dtype=t.dtype) if t.is_floating_point() else t

    with torch.no_grad():
        said = call(model, map_tensors(example_inputs(facts, name), draw))
    return {f"{name}#{i}": t.clone() for i, t in enumerate(walk(said))}


if __name__ == "__main__":
    if sys.argv[1] == "joint":
        joint(Path(sys.argv[2]))
    else:
        {"load": load, "again": again}[sys.argv[1]](Path(sys.argv[2]), sys.argv[3:])
