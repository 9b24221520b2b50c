"""What lies beside the weights: configuration, tokenizer, chat template, generation settings, the index of shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fusion._composed import homes
from fusion._files import INDEX, json_of
from fusion._misfit import called
from fusion.checkpoint import Shard, Source

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
FILES = (
    *TOKENIZER,
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)
OWN = ("config.json", "merge.json", INDEX)
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def carry(directory: Path, config: Mapping[str, Any], shards: Sequence[Shard], target: Source, speaker: Source) -> None:
    """Writes all of it; `target` is what the weights look like, `speaker` whose tokenizer and templates they get."""
    speaks = any((home / "tokenizer.json").is_file() for home in homes(speaker))
    for name in FILES:
        # a tokenizer with another one's template or merges is none
        places = homes(speaker) if speaks and name in TOKENIZER else (*homes(speaker), *homes(target))
        found = next((home / name for home in places if (home / name).is_file()), None)
        if found is not None:
            shutil.copyfile(found, directory / name)
    if (speaker.path / "chat_templates").is_dir():
        shutil.copytree(speaker.path / "chat_templates", directory / "chat_templates", dirs_exist_ok=True)
    if config:
        own = dict(config)
        if speaker is not target:
            own |= {key: speaker.config[key] for key in SPECIAL if key in speaker.config and key in own}
        own.pop("_name_or_path", None)
        write(directory / "config.json", own)
    if len(shards) > 1:
        total = sum(shard.size - len(shard.header) for shard in shards)
        where = {name: shard.file for shard in shards for name in shard.places}
        write(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def left_behind(models: Mapping[str, Source], name: str, speaker: Source) -> list[str]:
    """A sentence for each thing that models have and the one whose tokenizer is carried lacks, or says otherwise."""
    found = []
    speaking = [model for model, source in models.items() if _has_template(source)]
    if speaking and not _has_template(speaker):
        found.append(
            f"no chat template is carried: {called(name)} has none, {called(speaking[0])} has one; with tokenizer: "
            f"{speaking[0]} its tokenizer, template and generation settings are"
        )
    mine = speaker.config.get("text_config") or speaker.config
    for model, source in models.items():
        theirs = source.config.get("text_config") or source.config
        for key in SPECIAL:
            if None not in (mine.get(key), theirs.get(key)) and mine[key] != theirs[key]:
                found.append(
                    f"{called(model)} has {key} {theirs[key]} and {called(name)} {mine[key]}, which is carried; with "
                    f"tokenizer: {model} the other one is"
                )
    return found


def _has_template(source: Source) -> bool:
    for home in homes(source):
        settings = home / "tokenizer_config.json"
        if any((home / name).exists() for name in ("chat_template.jinja", "chat_template.json", "chat_templates")):
            return True
        if settings.is_file() and json_of(settings).get("chat_template"):
            return True
    return False


def write(path: Path, value: Any) -> None:
    """Indented JSON, as the Hugging Face libraries write it."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
