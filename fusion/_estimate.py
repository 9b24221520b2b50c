"""Rough disk, memory and time of a plan's steps, from headers, configurations and file sizes: estimates."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion import _keys, _sharded, data, sources, words
from fusion._say import bytes_of, size
from fusion.plan import Plan, Planned, first_model
from fusion.recipe import DataRef, ModelRef, Recipe

BYTES_PER_TOKEN = 4.0  # of text, for tokenizers of some ten thousand entries
CORE = 4e10  # floating-point operations a second of one CPU core in training; SmolLM2-135M on two cores agrees
ACCELERATOR = 6e13  # of one data-centre accelerator in bfloat16 at an ordinary share of its peak
BASE = 6e8  # bytes of memory of a process with the libraries loaded
MERGING = 6e-9  # seconds of one core for each number that a merge reads, between linear's (2e-9) and della's
RUNS = {"zip": 2, "least_squares": 10}  # times that each network runs on all tokens: once, or for each input of a block
TRAINING = 16  # bytes a parameter in float32: weights, gradients, two moments


@dataclass(frozen=True)
class Need:
    """What a step needs: bytes of disk that stay, and that are free again after it, bytes of memory, seconds.

    None where nothing is known.
    """

    disk: float | None
    meanwhile: float
    memory: float | None
    seconds: float | None


def estimate(plan: Plan) -> list[Need]:
    """One need for each step, in order."""
    return [_need(planned, plan) for planned in plan.steps]


def refuse_full_disk(plan: Plan, steps: list[Planned]) -> None:
    """ValueError when the steps that are left would not fit where they are to be written."""
    needed = meanwhile = 0.0
    for planned in steps:
        need, held = _need(planned, plan), _held(planned)
        needed += max(0.0, (need.disk or 0) - held)
        meanwhile = max(meanwhile, need.meanwhile - max(0.0, held - (need.disk or 0)))
    needed += meanwhile
    folder = next(parent for parent in [plan.folder.absolute(), *plan.folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"{plan.recipe.path}: {len(steps)} steps will write about {size(needed)}, but {folder} has {size(free)} "
            "free; make room or give another --out"
        )


def _held(planned: Planned) -> int:
    """Bytes of disk that an earlier run of a step has taken already: it continues there."""
    partial = planned.directory.with_name(f"{planned.directory.name}.partial")
    return sum(file.stat().st_blocks * 512 for file in partial.rglob("*") if file.is_file())


def machine() -> str:
    """What the times are estimated for."""
    return "one accelerator" if _accelerated() else f"{os.cpu_count()} CPU cores"


def parameters(plan: Plan, name: str) -> float | None:
    """About how many numbers a model holds; outputs are as large as the model they started from."""
    by_name = {planned.name: planned for planned in plan.steps}
    while name in by_name:
        name = first_model(by_name[name].fields)
    ref = plan.recipe.models.get(name)
    return _of_ref(plan.recipe, ref) if ref is not None else None


def _of_ref(recipe: Recipe, ref: ModelRef) -> float | None:
    if ref.config is not None:
        return _of_config(ref.config, (ref.tokenizer or {}).get("vocab_size", 260))
    if ref.base is not None:  # an adapter, or the shards of its training
        return _of_ref(recipe, recipe.models[ref.base]) if ref.base in recipe.models else None
    if ref.hub is not None:
        snapshot = _keys.hub_folder("models", ref.hub) / "snapshots" / str(ref.revision or _keys.hub_revision(ref))
        return sources.header(snapshot).parameters if snapshot.is_dir() else None
    if isinstance(ref.path, str) and not ref.path.startswith("package:") and not ref.path.endswith(".gguf"):
        if _sharded.find(directory := _keys.model_directory(recipe, ref.name)) is not None:
            # float32 weights and two moments of each, with ZeRO
            return sum(file.stat().st_size for file in _sharded.files(directory)) / 12
        return sources.header(_keys.model_directory(recipe, ref.name)).parameters
    from fusion import _gguf

    packed = sum(file.stat().st_size for file in _gguf.locate(ref.name, ref.path or "", recipe.base))
    return packed / 0.7  # 4 to 8 bits a parameter


def _of_config(config: dict[str, Any], vocabulary: int) -> float:
    """A decoder's matrices: four of attention, two or three of the feed-forward layer, embeddings."""
    width = _first(config, ("hidden_size", "n_embd", "d_model"), 768)
    layers = _first(config, ("num_hidden_layers", "n_layer", "num_layers"), 12)
    inner = _first(config, ("intermediate_size", "n_inner", "ffn_dim"), 4 * width)
    heads = _first(config, ("vocab_size",), vocabulary) * width * (1 if config.get("tie_word_embeddings", True) else 2)
    return layers * (4 * width * width + (2 if "n_embd" in config else 3) * width * inner) + heads


def _first(config: dict[str, Any], names: tuple[str, ...], otherwise: float) -> float:
    return next((float(config[name]) for name in names if config.get(name)), float(otherwise))


def text_bytes(recipe: Recipe, name: str) -> float | None:
    """About how many bytes of text a data entry holds after its split; None for what is not on this machine."""
    ref = recipe.data[name]
    if ref.mix:
        parts = [text_bytes(recipe, part) for part in ref.mix]
        return None if None in parts else sum(part or 0 for part in parts)
    if ref.path is None:
        return None
    files = data.files(ref, recipe.base)
    total = sum(file.stat().st_size for file in files)
    count = max(1, round(total / _document_bytes(ref, files[0])))
    return total * len(range(count)[data.parse_split(ref.split, count, ref.place)]) / count


def _document_bytes(ref: DataRef, file: Path) -> float:
    """About how many bytes of a file make one document: a piece of a text, a line of the first lines of a table."""
    if ref.format == "text":
        return 0.75 * (ref.max_bytes or data.MAX_BYTES)
    with open(file, "rb") as stream:
        start = stream.read(1 << 16)
    return max(1.0, len(start) / max(1, start.count(b"\n")))


def _need(planned: Planned, plan: Plan) -> Need:
    sizes = [parameters(plan, name) for name in (*planned.models, *planned.inputs)]
    largest = max((one for one in sizes if one is not None), default=None)
    texts = [text_bytes(plan.recipe, name) for name in planned.data]
    text = sum(one for one in texts if one is not None) if texts and None not in texts else None
    tokens = None if text is None else text / BYTES_PER_TOKEN
    if planned.step.verb == "merge":
        return _merge_need(planned, plan, sizes)
    if planned.step.verb in RUNS:
        return _joined_need(planned, largest)
    if planned.output == "model" and "train" in planned.word.names:
        tokens = _trained_tokens(planned, tokens)
        saves = (planned.fields.get("train") or {}).get("save_strategy") != "no"
        memory = _plus(_times(largest, TRAINING), BASE)
        return Need(_times(largest, 4), 12 * (largest or 0) * saves, memory, _seconds(6, largest, tokens))
    if planned.step.verb == "align":
        return _align_need(planned, largest)
    if planned.output == "model":
        return Need(_times(largest, 4), 0, _plus(_times(largest, 4), BASE), None)
    everyone = sum(one for one in sizes if one is not None) if sizes and None not in sizes else None
    seconds = _seconds(2, everyone, tokens)
    if planned.output == "targets":
        return Need(_times(tokens, _entry_bytes(planned.fields)), 0, _plus(_times(largest, 4), BASE), seconds)
    return Need(1e6, 0, _plus(_times(largest, 4), BASE), seconds)


def _merge_need(planned: Planned, plan: Plan, sizes: list[float | None]) -> Need:
    """A merge reads all of its models and holds regions of them, or whole tensors where the method asks for these."""
    known = [one for one in sizes if one is not None]
    largest = max(known, default=None) if len(known) == len(sizes) else None
    fields, method = planned.fields, planned.fields.get("method")
    each = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0}.get(str(fields.get("dtype")), _stored(planned, plan))
    unit = words.find("merge", str(method)).constants.get("UNIT", "element") if method else "element"
    region = bytes_of(fields.get("memory", "512MiB"))
    if unit == "tensor":  # an embedding is about a fifth of a model
        return Need(_times(largest, each), 0, _plus(_times(largest, 0.2 * 4 * (2 * len(sizes) + 4)), BASE), None)
    seconds = 2 + MERGING * sum(known) / (os.cpu_count() or 1) if largest is not None else None
    return Need(_times(largest, each), 0, region + BASE / 2, seconds)


def _joined_need(planned: Planned, largest: float | None) -> Need:
    """All networks and the merged one at once, each as stored and as a module, on a number of tokens."""
    count = len(planned.fields["models"])
    tokens = planned.fields.get("tokens", 16384)
    kept = count if planned.fields.get("heads") == "keep" else 1
    seconds = _seconds(2 * RUNS[planned.step.verb] * count, largest, tokens)
    return Need(_times(largest, 4 * kept), 0, _plus(_times(largest, 8 * (count + 1)), BASE), seconds)


def _align_need(planned: Planned, largest: float | None) -> Need:
    """Both networks as stored, folded and balanced; for activations both as modules, and sums over pairs of units."""
    fields = {parameter.name: parameter.default for parameter in planned.word.parameters} | planned.fields
    if words.parse("features", fields["features"], planned.step.place)[0] == "weights":
        return Need(_times(largest, 4), 0, _plus(_times(largest, 24), BASE), None)
    sums = min(12 * (largest or 0), bytes_of(fields["memory"]))  # about three pairs for two parameters
    return Need(_times(largest, 4), 0, _plus(_times(largest, 32), BASE + sums), None)


def _stored(planned: Planned, plan: Plan) -> float:
    """Bytes a number of the first model that lies on this machine; 4 where none does."""
    for name in planned.models:
        ref = plan.recipe.models[name]
        if isinstance(ref.path, str) and not ref.path.endswith(".gguf") and ref.base is None:
            directory = _keys.model_directory(plan.recipe, name)
            if any(directory.glob("*.safetensors")):
                found = sources.header(directory)
                return found.bytes / max(1, found.parameters)
    return 4.0


def _entry_bytes(fields: dict[str, Any]) -> float:
    """Bytes a token of a store: what its rule keeps, packed."""
    kept = fields.get("top_k") or (fields.get("cap", 64) / 2 if fields.get("nucleus") else 0)
    return 6 + (3.0 * kept if kept else 1.2 * fields.get("draws", 16))


def _trained_tokens(planned: Planned, tokens: float | None) -> float | None:
    train = planned.fields.get("train") or {}
    defaults = {parameter.name: parameter.default for parameter in planned.word.parameters}
    length = planned.fields.get("max_length", defaults.get("max_length")) or 512
    steps = train.get("max_steps", -1)
    if isinstance(steps, int) and steps > 0:
        batch = train.get("per_device_train_batch_size", 8) * train.get("gradient_accumulation_steps", 1)
        return float(steps * batch * length)
    return _times(tokens, float(train.get("num_train_epochs", 3)))


def _seconds(operations: float, size: float | None, tokens: float | None) -> float | None:
    """operations: floating-point operations a parameter and token (2 forward, 6 with the backward pass)."""
    if size is None or tokens is None:
        return None
    return 2 + operations * size * tokens / (ACCELERATOR if _accelerated() else CORE * (os.cpu_count() or 1))


def _accelerated() -> bool:
    """Whether this machine shows an accelerator's device file: asking torch would cost two seconds."""
    return os.environ.get("CUDA_VISIBLE_DEVICES") != "" and any(Path(p).exists() for p in ("/dev/nvidia0", "/dev/kfd"))


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _plus(value: float | None, other: float) -> float | None:
    return None if value is None else value + other
