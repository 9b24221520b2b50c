"""What online merging leaves in a trainer's checkpoint: one file a rank, with steps seen and what a window gathered."""

from __future__ import annotations

import json
from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

if TYPE_CHECKING:
    from fusion.online.attach import Handle
    from fusion.online.final import Final

STATE = "online_merge"


def _file(folder: Path, rank: int, world: int) -> Path:
    return folder / f"{STATE}-{rank}-of-{world}.safetensors"


def save(folder: Path, rank: int, world: int, handle: Handle, final: Final | None) -> None:
    """Steps seen, the weights at the start of a window and the moving averages, of one rank."""
    state = handle.state_dict()
    parts = {"snapshot": state["snapshots"], "average": {} if final is None else final.averages}
    tensors = {
        f"{part}/{key}/{i}": tensor.cpu()
        for part, by_key in parts.items()
        for key, pieces in by_key.items()
        for i, tensor in enumerate(pieces)
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, _file(folder, rank, world), metadata={"steps": json.dumps(state["steps"])})


def load(folder: Path, rank: int, world: int, handle: Handle, final: Final | None) -> None:
    """Puts back what `save` left.

    Outside of a window, and without averages, that is a number of steps, and a run may go on with more or fewer ranks.
    """
    file = _file(folder, rank, world)
    if not file.is_file():
        steps = _steps_alone(folder)
        _refuse_new(folder, final, ())
        handle.load_state_dict({"steps": {key: steps for key, _ in handle.layout.held.values()}, "snapshots": {}})
        return
    found: dict[str, dict[str, list[Tensor]]] = {"snapshot": {}, "average": {}}
    with safe_open(file, "pt") as stored:
        steps = json.loads(stored.metadata()["steps"])
        for name in sorted(stored.keys(), key=lambda n: (n.rpartition("/")[0], int(n.rpartition("/")[2]))):
            part, _, key = name.rpartition("/")[0].partition("/")
            found[part].setdefault(key, []).append(stored.get_tensor(name))
    _refuse_new(file, final, found["average"])
    handle.load_state_dict({"steps": steps, "snapshots": found["snapshot"]})
    for key, averages in found["average"].items():
        if final is None or key not in final.averages:
            raise ValueError(f"{file} has a moving average of {key}, and this run keeps none; ask for ema again")
        for mine, theirs in zip(final.averages[key], averages, strict=True):
            mine.copy_(theirs)


def _refuse_new(where: Path, final: Final | None, saved: Container[str]) -> None:
    """ValueError when this run keeps a moving average that the checkpoint has not: it would miss the steps so far."""
    for key, averages in () if final is None else final.averages.items():
        if averages and key not in saved:
            raise ValueError(
                f"{where} has no moving average of {key}: it was saved without ema, and an average of the steps from "
                f"here on alone would pass for one of all; leave ema out, or begin again without a checkpoint"
            )


def _steps_alone(folder: Path) -> int:
    """The steps that any rank's file tells of; ValueError when there is none, or when they hold more than that."""
    files = sorted(folder.glob(f"{STATE}-*.safetensors"))
    if not files:
        raise ValueError(f"{folder} has no {STATE}-*.safetensors: it was saved without online merging")
    seen = 0
    for file in files:
        with safe_open(file, "pt") as stored:
            if list(stored.keys()):
                raise ValueError(
                    f"{folder} was saved by {file.stem.rpartition('-')[2]} processes, inside a window of steps or with "
                    f"a moving average: go on with as many processes"
                )
            seen = max([seen, *json.loads(stored.metadata()["steps"]).values()])
    return seen
