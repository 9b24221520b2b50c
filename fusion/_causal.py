"""Causal language models without their (B, T, V) logits: decoder and head apart, documents packed without leakage.

Convention: a model's logits at position p are prediction row p + 1; row t predicts token t from what precedes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# What families do to the head's output, by config.model_type: (field of the config, exponent of the factor).
LOGIT_SCALES = {
    "cohere": ("logit_scale", 1),
    "cohere2": ("logit_scale", 1),
    "falcon_h1": ("lm_head_multiplier", 1),
    "hyperclovax": ("logits_scaling", 1),
    "granite": ("logits_scaling", -1),
    "granitemoe": ("logits_scaling", -1),
    "granitemoehybrid": ("logits_scaling", -1),
    "granitemoeshared": ("logits_scaling", -1),
}
OPEN_ROWS = 64  # rows that `pack` still looks at, so that packing a data set is linear in its documents


class Piece(NamedTuple):
    """Tokens start:stop of document number `document`; stop - start is at most the row's length."""

    document: int
    start: int
    stop: int


@dataclass(frozen=True)
class Batch:
    """Rows ready for a forward pass.

    `inputs` go to the decoder or the model as they are; `places` says for each piece its row and its first column.
    """

    inputs: dict[str, Any]
    places: list[tuple[Piece, int, int]]


def split_head(model: PreTrainedModel) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """`(decoder, head)` with `head(decoder(**inputs).last_hidden_state)` equal to `model(**inputs).logits`, in float32.

    The head is a function hidden (..., d) -> logits (..., V) and includes the family's logit scale and final
    soft-capping. `check_head` tests the equality. Raises ValueError for a model without a decoder or a head of its own.
    """
    decoder, output = model.get_decoder(), model.get_output_embeddings()
    name = type(model).__name__
    if decoder is model or output is None:
        raise ValueError(
            f"{name} has no output head that stands apart from its decoder; a causal language model is needed"
        )
    config = model.config.get_text_config().to_dict()
    field, exponent = LOGIT_SCALES.get(config["model_type"], (None, 1))
    scale = 1.0 if field is None else float(config[field]) ** exponent
    cap = config.get("final_logit_softcapping")

    def head(hidden: Tensor) -> Tensor:
        logits = output(hidden).float()
        if scale != 1.0:
            logits = logits * scale
        return logits if cap is None else torch.tanh(logits / cap) * cap

    return decoder, head


@torch.no_grad()
def check_head(model: PreTrainedModel, inputs: dict[str, Any] | None = None) -> None:
    """Raise ValueError when the split head does not give the model's own logits on the first tokens of `inputs`.

    The two must agree within 1e-3 of the largest logit in float32 and within 3e-2 in half precision.
    """
    first = _first_row(model, inputs)
    with _evaluating(model):
        decoder, head = split_head(model)
        own = model(**first).logits.float()
        split = head(decoder(**first).last_hidden_state)
    name = type(model).__name__
    if own.shape != split.shape:
        raise ValueError(
            f"{name}: its head gives {tuple(split.shape)}, the model {tuple(own.shape)}; it can't be split"
        )
    finite = torch.isfinite(own)  # whoever uses the logits says what is wrong with those that are not
    if not finite.any():
        return
    bound = (1e-3 if _dtype(model) == torch.float32 else 3e-2) * own[finite].abs().max().item()
    worst = (own - split)[finite].abs().max().item()
    if not worst <= bound:
        raise ValueError(
            f"{name}: the output head applied to the decoder's hidden states differs from the model's logits by "
            f"{worst:.3g} (allowed {bound:.3g}); this family does something to its logits that fusion does not know"
        )


def pack(lengths: Sequence[int], max_length: int) -> list[list[Piece]]:
    """Rows of pieces, each row at most `max_length` tokens long: first fit in the given order, the same every time.

    No document is split unless it is longer than `max_length`; then it becomes consecutive windows. Empty ones vanish.
    """
    if max_length < 1:
        raise ValueError(f"rows of {max_length} tokens can't hold anything; max_length is at least 1")
    rows: list[list[Piece]] = []
    left: list[int] = []
    for document, length in enumerate(lengths):
        for piece in windows(document, length, max_length):
            need = piece.stop - piece.start
            open_rows = range(max(0, len(rows) - OPEN_ROWS), len(rows))
            row = next((r for r in open_rows if left[r] >= need), None)
            if row is None:
                row = len(rows)
                rows.append([])
                left.append(max_length)
            rows[row].append(piece)
            left[row] -= need
    return rows


def one_per_row(lengths: Sequence[int], max_length: int) -> list[list[Piece]]:
    """As `pack`, with every piece in a row of its own: for architectures that can't keep packed documents apart."""
    return [[piece] for n, length in enumerate(lengths) for piece in windows(n, length, max_length)]


def windows(document: int, length: int, max_length: int) -> list[Piece]:
    """The consecutive windows of at most `max_length` tokens of one document."""
    return [Piece(document, start, min(start + max_length, length)) for start in range(0, length, max_length)]


def batch(
    rows: Sequence[Sequence[Piece]],
    ids: Sequence[Any] | Mapping[int, Any],
    pad: int = 0,
    device: str | torch.device = "cpu",
) -> Batch:
    """Rows of pieces as the inputs of one forward pass; `ids[document]` are the tokens (T,) of a document.

    Documents in one row are kept apart by position ids that restart at 0: transformers builds a block-diagonal causal
    mask from them when there is no attention mask and no cache. Padding stands at the end, each pad a document of its
    own; where every row holds one piece, nothing has to be kept apart and causality alone protects it from its padding.
    """
    width = max(sum(piece.stop - piece.start for piece in row) for row in rows)
    input_ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    positions = torch.zeros((len(rows), width), dtype=torch.int64)
    places = []
    for r, row in enumerate(rows):
        column = 0
        for piece in row:
            length = piece.stop - piece.start
            input_ids[r, column : column + length] = torch.as_tensor(ids[piece.document][piece.start : piece.stop])
            positions[r, column : column + length] = torch.arange(length)
            places.append((piece, r, column))
            column += length
    inputs: dict[str, Any] = {"input_ids": input_ids.to(device), "attention_mask": None, "use_cache": False}
    if any(len(row) > 1 for row in rows):
        inputs["position_ids"] = positions.to(device)
    return Batch(inputs, places)


@torch.no_grad()
def check_packing(model: PreTrainedModel, lengths: Sequence[int] = (7, 12, 5)) -> str | None:
    """None when packed documents get the hidden states they get alone, else a sentence that says they can't be packed.

    Random tokens of the given lengths go through the decoder three times: alone, packed, and packed with an attention
    mask that lets them see each other. Packed and alone must agree within 1e-3 of the largest value in float32 (3e-2 in
    half precision) and within a twentieth of what the leak changes, so that a model which hardly attends is no excuse.
    """
    generator = torch.Generator().manual_seed(0)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    if vocabulary == 0:  # ZeRO-3 keeps the weights elsewhere; the config knows the size
        vocabulary = model.config.get_text_config().vocab_size
    ids = [torch.randint(vocabulary, (n,), generator=generator) for n in lengths]
    device = next(model.parameters()).device
    row = [Piece(n, 0, len(x)) for n, x in enumerate(ids)]
    with _evaluating(model):
        decoder = split_head(model)[0]
        packed_inputs = batch([row], ids, device=device).inputs
        alone = torch.cat([_hidden(decoder, batch([[piece]], ids, device=device).inputs) for piece in row], dim=1)
        packed = _hidden(decoder, packed_inputs)
        leaking = _hidden(decoder, packed_inputs | {"attention_mask": torch.ones_like(packed_inputs["input_ids"])})
    error, leak = (packed - alone).abs().max().item(), (leaking - alone).abs().max().item()
    bound = (1e-3 if _dtype(model) == torch.float32 else 3e-2) * alone.abs().max().item()
    if error <= bound and error <= max(leak / 20, 1e-6 * alone.abs().max().item()):
        return None
    return (
        f"{type(model).__name__} does not keep packed documents apart (hidden states differ by {error:.3g} from those "
        f"of a document alone; a full leak makes {leak:.3g}): one document per row is used instead"
    )


def _hidden(decoder: nn.Module, inputs: dict[str, Any]) -> Tensor:
    return decoder(**inputs).last_hidden_state.float()


def _dtype(model: PreTrainedModel) -> torch.dtype:
    return next(p.dtype for p in model.parameters() if p.is_floating_point())


def _first_row(model: PreTrainedModel, inputs: dict[str, Any] | None) -> dict[str, Any]:
    if inputs is None:
        ids = torch.arange(8, device=next(model.parameters()).device)[None] % model.config.get_text_config().vocab_size
        return {"input_ids": ids, "attention_mask": None, "use_cache": False}
    return {name: value[:1, :64] if isinstance(value, Tensor) else value for name, value in inputs.items()}


class _evaluating:
    """Within the block the model is in evaluation mode; after it each module is as it was."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.training = [module for module in model.modules() if module.training]
        self.model = model

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *error: object) -> None:
        for module in self.training:
            module.training = True
