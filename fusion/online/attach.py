"""The hooks around an optimizer's step, and what they keep: task vectors, windows, readings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fusion._method import Region
from fusion._params import depths, layer_of
from fusion._say import nearest
from fusion.merge._draw import Draw
from fusion.merge._x import Outputs, Sum
from fusion.online._reduce import added_up, statistics
from fusion.online._sparse import Sparse
from fusion.online.layouts import Piece, layout
from fusion.online.settings import OnlineMerge, Readable

CHUNK = 1 << 18  # elements merged at once: what is alive beside the weights stays small
SPARSE = 0.5  # density below which 8 bytes a kept entry are fewer than 4 an entry
MASKED = 1  # the task vector is the second of the two that are merged


class Handle:
    """An attached online merge: its state, its readings, and the way to end it."""

    def __init__(
        self,
        merge: OnlineMerge,
        optimizer: torch.optim.Optimizer,
        named: list[tuple[str, Tensor]],
        task_vectors: Mapping[str, Tensor | Readable],
    ) -> None:
        self.merge, self.optimizer = merge, optimizer
        self.method, self.params = merge.checked()
        self.idle = merge.idle
        self.layout = layout(optimizer, named)
        self.depths = depths(name for name, _ in named)
        self.steps: dict[str, int] = {}  # key of the layout -> optimizer steps seen
        self.snapshots: dict[str, list[Tensor]] = {}  # key -> its pieces at the start of the window
        self.watch = False  # measure the next merge
        self.readings: dict[str, float] = {}  # of the last merge that was watched
        self.measured = _Measured(-1, 1)  # DeepSpeed steps group by group: those of one step are measured together
        self.vectors = self._vectors(task_vectors)
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]

    def detach(self) -> None:
        """Takes the hooks off; the weights stay as they are."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def state_dict(self) -> dict[str, Any]:
        """Of this rank: steps seen, and within a window the weights at its start. Task vectors are not in it."""
        steps = {key: self.steps.get(key, 0) for key, _ in self.layout.held.values()}  # all: loaders fill in these
        return {"steps": steps, "snapshots": {k: [t.clone() for t in v] for k, v in self.snapshots.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where `state_dict` was taken; ValueError when it is of another sharding, or not whole."""
        for key, steps in state["steps"].items():
            inside = steps % self.merge.every and not self.idle
            if inside and self._pieces(key) and key not in state["snapshots"]:
                raise ValueError(
                    f"the state of online merging was saved after {steps} steps, in a window of {self.merge.every}, "
                    f"without the weights at its start ({key}); go on from a multiple of {self.merge.every}"
                )
        for key, pieces in state["snapshots"].items():
            here = [piece.flat.numel() for piece in self._pieces(key)]
            if [t.numel() for t in pieces] != here:
                raise ValueError(
                    f"the state of online merging is of another sharding ({key} has pieces of {here} elements here); "
                    f"inside a window of {self.merge.every} steps a run goes on with as many ranks as it had"
                )
        self.steps = dict(state["steps"])
        self.snapshots = {
            key: [t.to(piece.flat.device, copy=True) for t, piece in zip(pieces, self._pieces(key), strict=True)]
            for key, pieces in state["snapshots"].items()
        }

    def _pieces(self, key: str) -> tuple[Piece, ...]:
        return next((pieces for one, pieces in self.layout.held.values() if one == key), ())

    def _vectors(self, given: Mapping[str, Tensor | Readable]) -> dict[str, Tensor | Sparse]:
        """The task vector under each piece, (n,) in its own dtype, or sparse."""
        found: dict[str, Tensor | Sparse] = {}
        moved = not self.layout.pieces
        for piece in self.layout.pieces:
            if piece.name not in given:
                raise ValueError(
                    f"there is no task vector for '{piece.name}'{nearest(piece.name, given)}; every trained parameter "
                    f"needs one"
                )
            vector = given[piece.name]
            if tuple(vector.shape) != piece.shape:
                raise ValueError(
                    f"'{piece.name}' is {piece.shape} in the model and {tuple(vector.shape)} in the task vector; a "
                    f"resized vocabulary needs a base and a reference of that size (step retokenize)"
                )
            stop = piece.start + piece.flat.numel()
            if isinstance(vector, Tensor):
                own = vector.detach().reshape(-1)[piece.start : stop].to(piece.flat.device)
            else:
                own = vector.read(piece.start, stop, piece.flat).to(piece.flat.device)
            moved = moved or bool(own.count_nonzero())
            found[piece.name] = self._placed(self._masked(piece, own))
        if not added_up({"moved": torch.tensor(int(moved))})["moved"]:
            raise ValueError("the task vector is zero everywhere: reference and base are the same model")
        return found

    def _masked(self, piece: Piece, vector: Tensor) -> Tensor | Sparse:
        """The task vector with the mask that the authors' code draws once; sparse where that is smaller."""
        if self.merge.semantics != "code" or self.method.word != "dare":
            return vector
        resolved = self.method.resolve(self.params, piece.name, layer_of(piece.name, self.depths))["density"]
        p = float(resolved[MASKED] if isinstance(resolved, list) else resolved)
        keep = Draw(self.merge.seed, piece.name, piece.start, len(vector), 0, str(vector.device)).uniform(MASKED) < p
        masked = (vector.float() / p).clamp_(-1, 1).mul_(keep)
        return Sparse.of(masked) if p < SPARSE else masked

    def _placed(self, vector: Tensor | Sparse) -> Tensor | Sparse:
        """In the host's pinned memory, if asked for; sparse ones are small, and stay where the weights are."""
        if not self.merge.pinned or isinstance(vector, Sparse) or vector.device.type == "cpu":
            return vector
        return torch.empty_like(vector, device="cpu", pin_memory=True).copy_(vector)

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self.idle:
            return
        for key, pieces in self._stepped(optimizer):
            if key not in self.snapshots:
                self.snapshots[key] = [piece.flat.clone() for piece in pieces]

    @torch.no_grad()
    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        due = []
        for key, pieces in self._stepped(optimizer):
            self.steps[key] = self.steps.get(key, 0) + 1
            if self.steps[key] % self.merge.every == 0 and not self.idle:
                due.append((key, pieces, self.snapshots.pop(key)))
        if due:
            self._merge(due)

    @torch.no_grad()
    def merged(self, key: str, update: Tensor) -> Tensor:
        """merge([update, task vector]) of a whole tensor, in its shape: for steps that no optimizer makes."""
        (piece,) = self._pieces(key)
        flat = update.flatten().clone()
        self.steps[key] = self.steps.get(key, 0) + 1
        self._merge([(key, (replace(piece, flat=flat),), [torch.zeros_like(flat)])])
        return flat.view(update.shape)

    def _stepped(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, tuple[Piece, ...]]]:
        """What this call steps on: DeepSpeed steps group by group, the other groups being left out or empty."""
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                yield self.layout.of(tensor)

    def _merge(self, due: list[tuple[str, tuple[Piece, ...], list[Tensor]]]) -> None:
        """old + merge([update, task vector]) in place of old + update, for all that one call stepped on."""
        number = self.steps[due[0][0]] // self.merge.every
        work = [
            (piece, old, partial(self._regions, piece, old, step=number))
            for _, pieces, olds in due
            for piece, old in zip(pieces, olds, strict=True)
        ]
        split = list(dict.fromkeys(name for key, _, _ in due for name in self.layout.split.get(key, ())))
        params = {name: self._concrete(name) for name in [*(piece.name for piece, _, _ in work), *split]}
        parts = [(piece.name, regions) for piece, _, regions in work]
        weights, device = self._weights(), self.layout.device
        stats = statistics(self.method, parts, split, params, weights, device=device, based=True)
        if self.watch:
            self.measured, self.watch = _Measured(number, self.layout.copies), False
        measured = self.measured if self.measured.number == number else None
        for piece, old, regions in work:
            place = 0
            for region in regions(stats[piece.name]):
                outputs = self.method.call(region, params[piece.name])
                merged = outputs.tensor
                here = slice(place, place + len(merged))
                torch.add(old[here], merged, out=piece.flat[here])
                if measured is not None:
                    measured.add(region, outputs)
                place += len(merged)
        if measured is not None:
            self.readings = measured.readings()

    def _regions(self, piece: Piece, old: Tensor, stats: Mapping[str, Tensor], *, step: int) -> Iterator[Region]:
        """[update, task vector], chunk by chunk; one chunk's memory serves the next."""
        vector, weights = self.vectors[piece.name], self._weights(piece.flat.device)
        room = torch.empty(3 * min(CHUNK, len(old)), device=piece.flat.device)
        for first in range(0, len(old), CHUNK):
            here = slice(first, first + CHUNK)
            count = len(old[here])
            both, base = room[: 2 * count].view(2, count), room[2 * count : 3 * count].zero_()
            torch.sub(piece.flat[here], old[here], out=both[0])
            if isinstance(vector, Sparse):
                vector.into(first, both[1])
            else:
                both[1].copy_(vector[here].to(both.device, non_blocking=True))  # cast there: half the bytes to send
            yield Region(
                both,
                base,
                weights,
                piece.name,
                piece.shape,
                layer=layer_of(piece.name, self.depths),
                start=piece.start + first,
                stats=stats,
                seed=self.merge.seed,
                step=step,
            )

    def _weights(self, device: str | torch.device = "cpu") -> Tensor:
        return torch.tensor([1 - self.merge.alpha, self.merge.alpha], dtype=torch.float32, device=device)

    def _concrete(self, name: str) -> dict[str, Any]:
        """The method's parameters for one tensor."""
        params = self.method.resolve(self.params, name, layer_of(name, self.depths))
        if self.merge.semantics == "code" and self.method.word == "dare":
            of_update = params["density"][0] if isinstance(params["density"], list) else params["density"]
            params["density"] = [float(of_update), 1.0]  # the task vector is masked already
        return params


class _Measured:
    """What a merge did to its update, over this rank's pieces."""

    def __init__(self, number: int, copies: int) -> None:
        self.number, self.copies = number, copies  # of which merge; ranks that each hold all weights
        self.kept = self.moved = self.conflicts = self.entries = 0
        self.squares = torch.zeros(3, dtype=torch.float64)

    def add(self, region: Region, outputs: Outputs) -> None:
        update, vector = region.stacked
        self.entries += update.numel()
        self.moved += int(update.count_nonzero())
        kept = outputs.extras.get("kept")
        if isinstance(kept, Sum):  # of each of the two: the task vector fills entries that the update has lost
            self.kept += int(kept.value[0])
        else:
            self.kept += int(((outputs.tensor != 0) & (update != 0)).sum())
        self.conflicts += int((update * vector < 0).sum())
        self.squares += torch.stack([x.double().square().sum() for x in (update, vector, outputs.tensor)]).cpu()

    def readings(self) -> dict[str, float]:
        found = added_up(
            {
                "counts": torch.tensor([self.kept, self.moved, self.conflicts, self.entries], dtype=torch.float64),
                "squares": self.squares,
            }
        )
        kept, moved, conflicts, entries = found["counts"].tolist()
        update, vector, merged = (found["squares"] / self.copies).sqrt().tolist()
        return {
            "update_kept": kept / max(moved, 1),
            "sign_conflicts": conflicts / max(entries, 1),
            "update_norm": update,
            "task_vector_norm": vector,
            "merged_norm": merged,
        }
