"""Where the rows of a new vocabulary come from; what a killed run had found by matching pursuit stays."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fusion._retokenize import Rows, Stored
from fusion._vocabulary import Vocabulary

if TYPE_CHECKING:
    import numpy as np

    from alignment.rows import Mix

ROWS = 256  # found by omp at once: what a kill costs


def new_rows(
    way: str,
    own: Stored,
    vocabulary: Vocabulary,
    stored: Callable[[str], Stored],
    k: int,
    folder: Path,
    bar: Callable[[int], None],
    device: str = "cpu",
) -> Rows:
    """How every row of the new vocabulary is made, missing ones by `way`: first_piece, omp, mean or zero.

    stored: the checkpoint of a model's name, asked for by omp alone.  folder: where omp keeps what it has found until
    all is done.  bar: hears of every n rows found by omp.
    """
    import numpy as np

    lacking = vocabulary.lacking
    nothing = np.zeros(0, np.int64)
    used = np.array([i for i, one in enumerate(vocabulary.mine.spelling) if one is not None], np.int64)
    if way == "first_piece":
        from alignment.rows import Mix, splits

        spelt = vocabulary.table.literal
        members = splits([spelt[index] for index in lacking], vocabulary.model)
        found = [n for n, ids in enumerate(members) if ids]
        mixed = (lacking[found], Mix.means([members[n] for n in found]))
        return Rows(vocabulary.kept, dict.fromkeys(("in", "out"), mixed), used, nothing)
    if way == "omp":
        sides = dict.fromkeys(own.tables.values())
        pursued = {side: _pursued(side, vocabulary, stored, k, folder, bar, device) for side in sides}
        return Rows(vocabulary.kept, pursued, used, nothing)
    return Rows(vocabulary.kept, {}, used, lacking if way == "zero" else nothing)


def _pursued(
    side: str,
    vocabulary: Vocabulary,
    stored: Callable[[str], Stored],
    k: int,
    folder: Path,
    bar: Callable[[int], None],
    device: str,
) -> tuple[np.ndarray, Mix]:
    """The missing tokens and their mixes, found where they come from among the tokens that both models have."""
    import numpy as np
    import torch

    from alignment.rows import Mix, omp

    ids: list[np.ndarray] = []
    parts: list[Mix] = []
    for name, tokens in vocabulary.donors().items():
        theirs, mine = vocabulary.shared(name)
        if not len(theirs):
            raise ValueError(f"{name} and the model share no token, so omp has nothing to combine; take first_piece")
        table = stored(name).table(side)
        wanted, atoms = (table[torch.from_numpy(rows)] for rows in (vocabulary.origin[tokens, 1], theirs))
        for start in range(0, len(tokens), ROWS):
            here = slice(start, start + ROWS)
            found = _kept(
                folder / f"{side}-{len(ids)}.safetensors", partial(omp, wanted[here], atoms, k, device=device)
            )
            bar(len(found.ids))
            ids.append(tokens[here])
            parts.append(Mix(torch.from_numpy(mine)[found.ids], found.weights))
    if not ids:
        return np.zeros(0, np.int64), Mix.means([])
    width = max(part.ids.shape[1] for part in parts)
    wide = [[torch.nn.functional.pad(one, (0, width - one.shape[1])) for one in (p.ids, p.weights)] for p in parts]
    order = np.argsort(np.concatenate(ids))
    at = torch.from_numpy(order)
    return np.concatenate(ids)[order], Mix(torch.cat([i for i, _ in wide])[at], torch.cat([w for _, w in wide])[at])


def _kept(file: Path, find: Callable[[], Mix]) -> Mix:
    """What `find` returns; what it returned before, where the file is there."""
    from safetensors.torch import load_file, save_file

    from alignment.rows import Mix

    if file.is_file():
        return Mix(**load_file(file))
    found = find()
    file.parent.mkdir(exist_ok=True)
    temporary = file.with_suffix(".new")
    save_file({"ids": found.ids, "weights": found.weights}, temporary)
    temporary.rename(file)
    return found
