"""Log-likelihoods of tokenized texts under a causal language model, every token scored once, in float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fusion._causal import split_head

HEAD_ROWS = 256  # positions whose logits are alive at one time


@dataclass(frozen=True)
class Window:
    """Tokens of one sequence that are read together, and the rows t (absolute) whose tokens are scored here."""

    sequence: int
    ids: np.ndarray  # (w,) int64
    rows: np.ndarray  # (n,) int64, indices into the sequence, each with its context in this window
    offset: int  # position in `ids` of row t is t - offset


def width_for(model: Any, window: int) -> int:
    """The window, or the longest input the model has positions for, whichever is shorter."""
    config = model.config.get_text_config()
    longest = config.max_position_embeddings if hasattr(config, "max_position_embeddings") else window
    return min(window, longest)


def windows(number: int, ids: np.ndarray, scored: np.ndarray, window: int, stride: int) -> list[Window]:
    """Windows over ids (T,): each scored row t > 0 is in one, window - stride tokens in or later.

    Every window opens with the sequence's own first token: many models are lost without their <bos>.
    """
    wanted = np.flatnonzero(scored)
    wanted = wanted[wanted > 0]
    if not len(wanted):
        return []
    total = int(wanted[-1]) + 1  # what follows (an end token) need not be read
    if total <= window:
        return [Window(number, ids[:total], wanted, 0)]
    found = []
    done = 1  # rows below are scored
    stop = window
    while done < total:
        stop = min(stop, total)
        start = max(1, stop - (window - 1))
        rows = done + np.flatnonzero(scored[done:stop])
        if len(rows):
            found.append(Window(number, np.concatenate([ids[:1], ids[start:stop]]), rows, start - 1))
        done = stop
        stop += stride
    return found


@torch.no_grad()
def nats(
    model: Any,
    sequences: Sequence[tuple[np.ndarray, np.ndarray]],  # (ids (T,) int64, scored (T,) bool) each
    *,
    window: int,
    stride: int,
    batch_tokens: int = 4096,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> np.ndarray:
    """(S,) float64: minus the log-likelihood of each sequence's scored tokens.

    A scored token in row 0 has no prediction and is charged log(V). Windows of like length share a batch, padded on the
    right, which a causal model can't see.
    """
    decoder, head = split_head(model)
    totals = np.zeros(len(sequences))
    pieces: list[Window] = []
    for number, (ids, scored) in enumerate(sequences):
        if len(scored) and scored[0]:
            totals[number] += math.log(model.config.get_text_config().vocab_size)
        pieces += windows(number, ids, scored, window, stride)
    pieces.sort(key=lambda piece: -len(piece.ids))
    for batch in progress(batches(pieces, batch_tokens)):
        width = len(batch[0].ids)
        inputs = np.zeros((len(batch), width), dtype=np.int64)
        for row, piece in enumerate(batch):
            inputs[row, : len(piece.ids)] = piece.ids
        hidden = decoder(input_ids=torch.from_numpy(inputs).to(model.device), attention_mask=None, use_cache=False)
        # Row t is predicted at position t - 1.
        lines = np.concatenate([np.full(len(piece.rows), row) for row, piece in enumerate(batch)])
        columns = np.concatenate([piece.rows - piece.offset - 1 for piece in batch])
        labels = torch.from_numpy(inputs[lines, columns + 1]).to(model.device)
        states = hidden.last_hidden_state[torch.from_numpy(lines), torch.from_numpy(columns)]  # (n, d)
        losses = []
        for state, label in zip(states.split(HEAD_ROWS), labels.split(HEAD_ROWS), strict=True):
            logits = head(state).float()
            losses.append(logits.logsumexp(-1) - logits.gather(-1, label[:, None])[:, 0])
        np.add.at(totals, np.array([batch[line].sequence for line in lines]), torch.cat(losses).double().cpu().numpy())
    return totals


def batches(pieces: list[Window], tokens: int) -> list[list[Window]]:
    """Consecutive windows, longest first, of at most `tokens` padded tokens together (one window at least)."""
    found: list[list[Window]] = []
    for piece in pieces:
        if not found or (len(found[-1]) + 1) * len(found[-1][0].ids) > tokens:
            found.append([])
        found[-1].append(piece)
    return found
