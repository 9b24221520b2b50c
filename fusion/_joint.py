"""Statistics that no rank has alone: of tensors that ranks share, and of the whole model. They meet in files."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from fusion._regions import Work
from fusion._stream import Stream
from fusion.merge._x import Max, Min, Reading, Running, Sum, joined, values

KINDS: dict[str, type[Sum] | type[Max] | type[Min]] = {"Sum": Sum, "Max": Max, "Min": Min}
Found = dict[tuple[str, int], dict[str, Reading]]  # (tensor, start of the range) -> its readings
WHOLE = ""  # stands for the model, of which counts are added up at once: they are large, and any order will do


class Joint:
    """One rank's part in finding statistics together."""

    def __init__(
        self,
        stream: Stream,
        directory: Path,
        rank: int,
        world: int,
        chunk: int,
        wait: Callable[[Callable[[], bool], str], None],
        model_scope: bool,
    ) -> None:
        self.stream, self.directory, self.rank, self.world, self.wait = stream, directory, rank, world, wait
        self.tag, self.model_scope = f"{world}-{chunk}", model_scope
        self.lock = threading.Lock()

    def settle(self, works: Sequence[Work], rounds: int) -> None:
        """Every pass over these works; leaves in each what its map needs, and whether its models agree.

        rounds: most passes that a tensor needs, the same on every rank; some of a rank's own may need fewer.
        """
        recipe = self.stream.recipe
        method = recipe.method
        stats: dict[str, Mapping[str, Tensor]] = {}
        for index in range(rounds) if rounds else (-1,):
            found = self._met(index, works)
            equal: dict[str, bool] = {}
            parts: dict[str, list[dict[str, Reading]]] = {}
            for (name, _), readings in sorted(found.items(), key=lambda item: item[0]):
                if name != WHOLE:
                    equal[name] = equal.get(name, True) and bool(readings["equal"].value)
                parts.setdefault(name, []).append({key: one for key, one in readings.items() if key != "equal"})
            tensors = {name: joined(own) for name, own in parts.items()}
            if self.model_scope:
                everything = Running()
                for number, name in enumerate(sorted(tensors)):
                    everything.add(number, tensors[name])
                tensors = {WHOLE: everything.readings()}
            params = {WHOLE if self.model_scope else work.task.name: work.params for work in works}
            for name, concrete in params.items():
                if 0 <= index < method.needed(concrete):
                    together = {**stats.get(name, {}), **values(tensors[name])}
                    stats[name] = method.settle(together, concrete, recipe.weights)
            for work in works:
                work.equal = equal[work.task.name]
                work.stats = stats.get(WHOLE if self.model_scope else work.task.name, {})

    def _met(self, index: int, works: Sequence[Work]) -> Found:
        """What all ranks found in pass `index`."""
        own: Found = {}
        folded = Running()

        def take(work: Work, running: Running) -> None:
            import torch

            readings = running.readings()
            with self.lock:
                if self.model_scope:
                    wide = {name: one for name, one in readings.items() if _folds(one)}
                    folded.add(0, wide)
                    readings = {name: one for name, one in readings.items() if name not in wide}
                own[work.task.name, work.start] = {**readings, "equal": Min(torch.tensor(int(bool(work.equal))))}

        file = self.directory / f"stats-{self.tag}-{index}-{self.rank}.safetensors"
        if self.world == 1 or not file.exists():  # a run that was killed may have found it
            self.stream.collect(works, index, take)
            if self.model_scope:
                own[WHOLE, 0] = folded.readings()
            if self.world == 1:
                return own
            _save(own, file)
        files = [file.with_name(f"stats-{self.tag}-{index}-{rank}.safetensors") for rank in range(self.world)]
        self.wait(lambda: all(one.exists() for one in files), f"statistics of pass {index + 1} from the other ranks")
        together: Found = {}
        for one in files:
            for key, readings in _load(one).items():
                together[key] = joined([together[key], readings]) if key in together else readings
        return together


def _folds(reading: Reading) -> bool:
    return not (isinstance(reading, Sum) and reading.value.is_floating_point())


def _save(found: Found, file: Path) -> None:
    """Whole or not at all; an empty range counts, too."""
    from safetensors.torch import save_file

    flat = {
        f"{type(one).__name__} {start} {key} {name}": one.value.contiguous().clone()
        for (name, start), readings in found.items()
        for key, one in readings.items()
    }
    temporary = file.with_suffix(".new")
    save_file(flat, temporary)
    temporary.rename(file)


def _load(file: Path) -> Found:
    from safetensors.torch import load_file

    found: Found = {}
    for label, value in load_file(file).items():
        kind, start, key, name = label.split(" ", 3)
        found.setdefault((name, int(start)), {})[key] = KINDS[kind](value)
    return found
