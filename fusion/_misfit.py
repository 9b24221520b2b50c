"""What keeps models from being merged, in sentences: tensors that one has and another lacks, shapes, dtypes, quantised
weights, heads that are tied in one model and not in another."""

from __future__ import annotations

from collections.abc import Sequence, Set
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fusion._files import json_of
from fusion.checkpoint import NAMES, Entry, Source

if TYPE_CHECKING:
    from fusion._tasks import Inputs

HEADS = ("lm_head.weight", "embed_out.weight")
EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "tok_embeddings.weight")
CUT = ("num_attention_heads", "n_head", "num_heads", "num_key_value_heads", "head_dim")
COMPUTE = (  # settings that change what the same weights compute
    *("model_type", "hidden_act", "hidden_activation", "activation_function", "rms_norm_eps", "layer_norm_eps"),
    *("rope_theta", "rope_scaling", "rope_parameters", "rotary_pct", "partial_rotary_factor", "rope_local_base_freq"),
    *("sliding_window", "query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
)
SCALES = ("_scale", "_scale_inv", ".scales", ".absmax", ".qzeros", ".SCB", ".g_idx", ".quant_map", "_zero_point")
CODES = (torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2)


def called(model: str) -> str:
    return f"'{model}'" if model else "the base"


def shown(entry: Entry) -> str:
    return " x ".join(map(str, entry.shape)) or "a scalar"


def some(names: Sequence[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + rest


def refuse_codes(who: str, source: Source) -> None:
    """ValueError for weights that are codes beside their scales, since an average of codes means nothing, and for
    complex ones."""
    for name, entry in source.entries.items():
        if entry.dtype.is_complex:
            raise ValueError(f"{name} of {who} holds complex numbers ({str(entry.dtype)[6:]}), which no method merges")
    method = (source.config.get("quantization_config") or {}).get("quant_method")
    scales = [name for name in source.entries if name.endswith(SCALES)]
    codes = [name for name, entry in source.entries.items() if entry.dtype in CODES and len(entry.shape) > 1]
    floats8 = [name for name in codes if source.entries[name].dtype.is_floating_point]
    if (codes and (scales or method)) or floats8:
        kind = NAMES[source.entries[codes[0]].dtype]
        beside = f" beside {scales[0]}" if scales else ""
        raise ValueError(
            f"{who} is quantised{f' ({method})' if method else ''}: {codes[0]} is {kind}{beside}, and codes can't be "
            f"averaged; take the original, or write it in bfloat16 first (transformers: model.dequantize())"
        )


def tied_heads(inputs: Inputs) -> Set[str]:
    """The target's heads that are left out, as every model says its head is its embedding and some store it all the
    same. ValueError where the head is the embedding in one model and not in another."""
    every = inputs.everyone
    heads = {head for source in every.values() for head in source.entries if _tail(head) in HEADS}
    left: set[str] = set()
    for head in sorted(heads):
        has = [model for model, source in every.items() if head in source.entries]
        partners = {model: _embedding(source) for model, source in every.items()}
        lacks = [model for model in every if model not in has and partners[model]]
        if not has or not lacks or any(not _says_tied(every[model]) for model in lacks):
            continue
        for model in sorted(has):
            if not _equal(every[model], head, partners[model]):
                raise ValueError(
                    f"{called(model)} has a head of its own ({head}), and {called(lacks[0])} uses its embedding "
                    f"(tie_word_embeddings): one of them has to be rewritten; untie the second (save lm_head.weight, "
                    f"tie_word_embeddings: false)"
                )
        left.add(head)
    return left


def _tail(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _says_tied(source: Source) -> bool:
    config = source.config.get("text_config") or source.config
    return bool(config.get("tie_word_embeddings", source.config.get("tie_word_embeddings", True)))


def _embedding(source: Source) -> str | None:
    return next((name for name in source.entries if _tail(name) in EMBEDDINGS), None)


def _equal(source: Source, one: str, other: str | None) -> bool:
    """Whether two tensors of a model hold the same bytes."""
    if other is None or source.entries[one].shape != source.entries[other].shape:
        return False
    entry, step = source.entries[one], 1 << 20
    if entry.dtype != source.entries[other].dtype:
        return False
    a, b = (torch.empty(min(step, entry.numel), dtype=entry.dtype) for _ in range(2))
    for start in range(0, entry.numel, step):
        stop = min(start + step, entry.numel)
        source.read(one, start, stop, a[: stop - start])
        source.read(other, start, stop, b[: stop - start])
        if not torch.equal(a[: stop - start].view(torch.uint8), b[: stop - start].view(torch.uint8)):
            return False
    return True


def refuse_gaps(inputs: Inputs, merging: Sequence[str], only: Sequence[str] | None, hidden: Set[str]) -> None:
    """ValueError when a model lacks tensors that are to be merged, or has some that the target has no place for."""
    target, known = called(inputs.target[0]), inputs.target[1].entries
    for model, source in inputs.models.items():
        missing = [name for name in merging if name not in source.entries]
        if missing:
            raise ValueError(
                f"{called(model)} lacks {len(missing)} of the {len(merging)} tensors to merge: {some(missing)}; say "
                f"with copy: (or only:) that they stay {target}'s, or with names: what it calls them"
            )
        extra = [
            name
            for name in source.entries
            if name not in known
            and name not in hidden
            and (only is None or any(fnmatchcase(name, glob) for glob in only))
        ]
        if extra:
            raise ValueError(
                f"{called(model)} has {len(extra)} tensors that {target} has no place for: {some(extra)}; only "
                f"models of one architecture can be merged (with names: a model says what its tensors are called in "
                f"{target}, with only: which ones count)"
            )


def refuse_shapes(inputs: Inputs, merging: Sequence[str]) -> None:
    """ValueError, with both shapes, when a tensor is not of one shape in all models."""
    first_name, first = inputs.target
    for name in merging:
        wanted = first.entries[name]
        for model, source in inputs.models.items():
            entry = source.entries[name]
            if entry.shape == wanted.shape:
                continue
            both = f"{shown(entry)} in {called(model)} and {shown(wanted)} in {called(first_name)}"
            if _tail(name) in (*EMBEDDINGS, *HEADS) and entry.shape[1:] == wanted.shape[1:]:
                raise ValueError(
                    f"{name} is {both}: their vocabularies have {entry.shape[0]} and {wanted.shape[0]} rows; bring "
                    f"them to one by a retokenize step first"
                )
            raise ValueError(f"{name} is {both}; only models of one architecture and size can be merged")


def refuse_vocabularies(inputs: Inputs, merging: Sequence[str]) -> None:
    """ValueError when rows of embeddings or heads that are to be merged stand for other tokens in another model.

    Some tokens may have other names (a template's, put in the place of reserved ones); more than one in a hundred not.
    """
    if not any(_tail(name) in (*EMBEDDINGS, *HEADS) for name in merging):
        return
    name, target = inputs.target
    mine = _tokenizer(target)
    if mine is None:
        return
    first: dict[int, str] = {}
    for model, source in inputs.models.items():
        other = _tokenizer(source)
        if other is None or mine.read_bytes() == other.read_bytes():
            continue
        first, second = first or _tokens(mine), _tokens(other)  # its own tokens are read once
        common = first.keys() & second.keys()
        odd = sorted(number for number in common if first[number] != second[number])
        if len(odd) > len(common) // 100:
            raise ValueError(
                f"{len(odd)} of {len(common)} tokens of {called(model)} and {called(name)} differ (row {odd[0]} is "
                f"{second[odd[0]]!r} and {first[odd[0]]!r}): bring them to one vocabulary by a retokenize step first"
            )


def _tokenizer(source: Source) -> Path | None:
    from fusion._composed import homes

    return next((file for home in homes(source) if (file := home / "tokenizer.json").is_file()), None)


def _tokens(file: Path) -> dict[int, str]:
    """Row -> token of a tokenizer.json."""
    content = json_of(file)
    words = content["model"].get("vocab", {})
    found = {number: entry[0] for number, entry in enumerate(words)} if isinstance(words, list) else {}
    found |= {} if isinstance(words, list) else {number: word for word, number in words.items()}
    return found | {added["id"]: added["content"] for added in content.get("added_tokens", ())}


def refuse_heads(inputs: Inputs) -> None:
    """ValueError when a model cuts its attention into other heads than the target: shapes may agree all the same."""
    name, target = inputs.target
    mine = target.config.get("text_config") or target.config
    for model, source in inputs.models.items():
        theirs = source.config.get("text_config") or source.config
        for key in CUT:
            ours, other = mine.get(key), theirs.get(key)
            if isinstance(ours, int) and isinstance(other, int) and ours != other:
                raise ValueError(
                    f"{called(model)} has {key} {other} and {called(name)} {ours}: their attention is cut into other "
                    f"heads, where rows of the same number do different things; only models of one architecture can "
                    f"be merged"
                )


def computing_otherwise(inputs: Inputs) -> list[str]:
    """A sentence for each setting by which a model's weights compute something else than under the target's, which the
    result has; of what both configurations name."""
    name, target = inputs.target
    mine = target.config.get("text_config") or target.config
    found = []
    for model, source in inputs.everyone.items():
        theirs = source.config.get("text_config") or source.config
        for key in COMPUTE:
            if key in mine and key in theirs and mine[key] != theirs[key]:
                found.append(
                    f"{called(model)} has {key} {theirs[key]} and {called(name)} {mine[key]}, which the result has: "
                    f"the weights of {called(model)} were trained for the other"
                )
    return found


def refuse_dtypes(inputs: Inputs, merging: Sequence[str], wanted: torch.dtype | None) -> None:
    """ValueError, with both dtypes, when a tensor is not of one dtype in all models: nothing is cast unasked, and whole
    numbers not at all."""
    everyone = inputs.everyone.items()
    for name in merging:
        found: dict[torch.dtype, str] = {}
        for model, source in everyone:
            found.setdefault(source.entries[name].stored, model)
        codes = [dtype for dtype in found if not dtype.is_floating_point]
        if codes and len(codes) < len(found):
            number = next(dtype for dtype in found if dtype.is_floating_point)
            raise ValueError(
                f"{name} is {str(codes[0])[6:]} in {called(found[codes[0]])} and {str(number)[6:]} in "
                f"{called(found[number])}; whole numbers are codes or counts, which can't be averaged: say with copy: "
                f"that it stays {called(inputs.target[0])}'s"
            )
        if wanted is None and len(found) > 1:
            (one, first), (other, second) = list(found.items())[:2]
            raise ValueError(
                f"{name} is {str(one)[6:]} in {called(first)} and {str(other)[6:]} in {called(second)}; say what the "
                f"result is to be (dtype: {str(one)[6:]}), the sums are float32 either way"
            )
