"""What a PEFT LoRA adapter's directory says (Hu et al. 2021, arXiv:2106.09685), from its headers: what is scaled by
how much, what is replaced, and whether anything in it is not understood. Imports no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fusion._files import Tensor, json_of, tensors_of

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
FACTOR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(?:\.weight)?")
# What the tensors and the numbers below already tell, or what only matters while training.
HARMLESS = {
    *("auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "inference_mode"),
    *("init_lora_weights", "layers_pattern", "layers_to_transform", "lora_dropout", "lora_ga_config", "loftq_config"),
    *("megatron_core", "modules_to_save", "peft_version", "qalora_group_size", "revision", "runtime_config"),
    *("target_modules", "task_type", "bias"),
}
UNDERSTOOD = {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"}
# Beginnings that leave the base as it is; the others subtract something from it when training starts.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
MERGE = "merge it with peft (model.merge_and_unload().save_pretrained(DIR)) and give that directory as path"


@dataclass(frozen=True)
class Pair:
    """The two factors of a module's update, W + scale * B A: names in the file, rank and scale."""

    a: str
    b: str
    rank: int
    scale: float
    embedding: bool  # A is (rank, tokens), B is (width, rank), the weight (tokens, width)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter: updates by module, and tensors that stand in for the base's own, by the base's names."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    pairs: dict[str, Pair]
    replaced: dict[str, str]  # tensor of the base -> tensor of the file

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path / "adapter_config.json", self.weights)

    @property
    def weights(self) -> Path:
        return self.path / WEIGHTS


def is_adapter(directory: Path) -> bool:
    return (Path(directory) / "adapter_config.json").is_file()


def read_adapter(directory: Path) -> Adapter:
    """The adapter in a directory; ValueError, one sentence, for DoRA and whatever else is not plain LoRA."""
    directory = Path(directory)
    config = _config(directory)
    if not (directory / WEIGHTS).is_file():
        if (directory / "adapter_model.bin").is_file():
            raise ValueError(
                f"{directory} holds pickled weights (adapter_model.bin), which can run code when read; if you trust "
                "them, load the adapter with peft and save it again: save_pretrained(DIR, safe_serialization=True)"
            )
        raise ValueError(f"{directory} has no {WEIGHTS}")
    tensors = tensors_of(directory / WEIGHTS)
    factors: dict[str, dict[str, str]] = {}
    replaced: dict[str, str] = {}
    for key in tensors:
        found = FACTOR.fullmatch(key)
        if found:
            factors.setdefault(found[1].removeprefix(PREFIX), {})[found[3]] = key
        elif ".lora_" in key:
            what = key.rpartition(".lora_")[2]
            dora = " (DoRA)" if "magnitude" in what else ""
            raise ValueError(f"{directory}: {key} is not of plain LoRA{dora}, and its effect is not known; {MERGE}")
        elif ".original_module." not in key:
            steps = key.removeprefix(PREFIX).split(".")
            replaced[".".join(s for s in steps if s not in ("modules_to_save", "base_layer"))] = key
    pairs = {module: _pair(directory, config, tensors, module, keys) for module, keys in factors.items()}
    if not pairs and not replaced:
        raise ValueError(f"{directory}: {WEIGHTS} holds no tensor")
    return Adapter(directory, config, tensors, pairs, replaced)


def _pair(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], module: str, keys: dict[str, str]
) -> Pair:
    if len(keys) != 2:
        raise ValueError(f"{directory}: {module} has lora_{next(iter(keys))} and not the other factor")
    a, b = tensors[keys["A"]].shape, tensors[keys["B"]].shape
    rank, alpha = _pattern(config, "rank_pattern", module, "r"), _pattern(config, "alpha_pattern", module, "lora_alpha")
    if len(a) < 2 or len(b) < 2 or math.prod(b[2:]) != 1 or not a[0] == b[1] == rank:
        raise ValueError(
            f"{directory}: {module} has factors of shape {a} and {b}, adapter_config.json a rank of {rank}; "
            "factors are (rank, in) and (out, rank)"
        )
    scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
    return Pair(keys["A"], keys["B"], rank, scale, ".lora_embedding_" in keys["A"])


def _pattern(config: Mapping[str, Any], patterns: str, module: str, otherwise: str) -> Any:
    """The first pattern that matches the module's whole name, or its end after a dot, decides; as in PEFT."""
    for key, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return config[otherwise]


def _config(directory: Path) -> dict[str, Any]:
    file = directory / "adapter_config.json"
    config = json_of(file)
    if str(config.get("peft_type")).upper() != "LORA":
        raise ValueError(f"{directory} is an adapter of type {config.get('peft_type')}; only LoRA is read; {MERGE}")
    if config.get("use_dora"):
        raise ValueError(f"{directory} is a DoRA adapter (use_dora), whose magnitudes are not applied yet; {MERGE}")
    if config.get("init_lora_weights", True) not in PLAIN_STARTS:
        raise ValueError(
            f"{directory}: init_lora_weights '{config['init_lora_weights']}' changed the base's own weights, so that "
            "the adapter alone does not say what it adds; save it with path_initial_model_for_weight_conversion, "
            f"or {MERGE}"
        )
    for key, value in config.items():
        if key not in HARMLESS | UNDERSTOOD and value not in (None, False, "none", "", [], {}):
            raise ValueError(f"{directory}: its option {key} ({value!r:.60}) is not understood; {MERGE}")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), (int, float)):
            raise ValueError(f"{file} gives no {key}")
    return {**config, "modules_to_save": config.get("modules_to_save") or []}
