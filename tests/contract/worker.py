"""What the contract table runs in processes of their own.

worker.py joint OUT       the JOINT rows, as one of several processes (RANK, WORLD_SIZE, … say which)
worker.py load OUT DIR…   stillhouse.load of every student folder; its logits on a fixed input
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)


def joint(out: Path) -> None:
    from rows import JOINT

    from stillhouse.files import write_json
    from stillhouse.run import Run

    run = Run(out / "rank", device="cpu")  # before the rows: it makes the process group
    assert run.world == 2, run.world
    for row in JOINT:
        family = row.make(out / "shared" / row.name)
        family.save(out / f"rank{run.rank}" / row.name)
        write_json(out / f"rank{run.rank}" / row.name / "omega.json", [m.importance for m in family])
    run.close()


def load(out: Path, folders: list[str]) -> None:
    from safetensors.torch import save_file

    import stillhouse
    from stillhouse.files import read_json

    answers = {}
    for folder in folders:
        shape = read_json(Path(folder) / "plan.json")["shape"]
        with torch.no_grad():
            answers[folder] = stillhouse.load(folder)(fixed_input(shape))
    save_file(answers, out)


def fixed_input(shape: list[int]) -> torch.Tensor:
    return torch.randn(5, *shape, generator=torch.Generator().manual_seed(7))


if __name__ == "__main__":
    if sys.argv[1] == "joint":
        joint(Path(sys.argv[2]))
    else:
        load(Path(sys.argv[2]), sys.argv[3:])
