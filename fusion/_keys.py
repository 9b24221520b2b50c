"""What a step's content key is made of: digests of models, data and plug-in sources, without torch or transformers."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fusion import data
from fusion._files import SHA256, file_digest, tensor_files
from fusion.recipe import ModelRef, Recipe

BESIDE = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


class Digests:
    """sha256 of files, remembered between runs while real path, size and modification time stay."""

    def __init__(self, file: Path | None = None):
        self.file = file or cache_directory() / "digests.json"
        self.known = _read_cache(self.file)
        self.new = False

    def __call__(self, path: Path) -> str:
        real = path.resolve()
        if real.parent.name == "blobs" and SHA256.fullmatch(real.name):  # the hub's cache names files by content
            return real.name
        status = real.stat()
        stamp = f"{status.st_size}:{status.st_mtime_ns}"
        entry = self.known.get(str(real))
        if entry is None or entry[0] != stamp:
            entry = (stamp, file_digest(real))
            self.known[str(real)] = entry
            self.new = True
        return entry[1]

    def save(self) -> None:
        """Writes what is new: other processes see the old file or the new one."""
        if self.new:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.file.with_name(f"{self.file.name}.{os.getpid()}.new")
            temporary.write_text(json.dumps({**_read_cache(self.file), **self.known}), encoding="utf-8")
            os.replace(temporary, self.file)
            self.new = False


def cache_directory() -> Path:
    """Where conversions, models from scratch and digests are kept: $FUSION_CACHE, else ~/.cache/fusion."""
    return Path(os.environ.get("FUSION_CACHE") or Path.home() / ".cache" / "fusion")


def of(parts: Mapping[str, Any]) -> str:
    """64 hex digits of a JSON-like value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def of_data(recipe: Recipe, name: str, digests: Digests) -> str:
    """What a data entry's documents depend on: bytes of its files and how they are read."""
    return data.digest(recipe.data[name], recipe.base, digests, recipe.data)


def of_model(recipe: Recipe, name: str, kind: str, digests: Digests) -> list[Any]:
    """What a recipe's model depends on. kind: as `sources.check` says."""
    ref = recipe.models[name]
    if ref.hub:
        return [kind, ref.hub, ref.revision or hub_revision(ref)]
    if kind == "gguf":
        from fusion import _gguf

        return ["gguf", *(digests(path) for path in _gguf.locate(name, ref.path or "", recipe.base))]
    if kind == "scratch":
        source = (ref.tokenizer or {}).get("data")
        text = of_data(recipe, source, digests) if source in recipe.data else None
        return ["scratch", name, ref.config, ref.tokenizer, text, recipe.seed]
    directory = model_directory(recipe, name)
    beside = [directory / file for file in BESIDE if (directory / file).exists()]
    if kind in ("adapter", "sharded", "compressed"):  # its base's parts follow
        from fusion import _adapter_files, _sharded

        own = (
            _adapter_files.read_adapter(directory).files
            if kind == "adapter"
            else _sharded.files(directory)
            if kind == "sharded"
            else [directory / "compression.json", directory / "compression.safetensors"]
        )
        return [kind, *([file.name, digests(file)] for file in [*beside, *own])]
    return ["directory", *([file.name, digests(file)] for file in [*beside, *tensor_files(directory)])]


def model_directory(recipe: Recipe, name: str) -> Path:
    """Where a local model lies."""
    return (recipe.base / Path(str(recipe.models[name].path)).expanduser()).resolve()


def hub_folder(kind: str, repository: str) -> Path:
    """Where the hub's client keeps a repository. kind: models or datasets."""
    home = Path(os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface").expanduser()
    cache = Path(os.environ.get("HF_HUB_CACHE") or home / "hub").expanduser()
    return cache / f"{kind}--{repository.replace('/', '--')}"


def hub_revision(ref: ModelRef) -> str | None:
    """The commit that the hub's cache holds of a model without a revision."""
    file = hub_folder("models", str(ref.hub)) / "refs" / "main"
    return file.read_text().strip() if file.is_file() else None


def hub_is_offline() -> bool:
    """Whether the user forbade the network."""
    return any(
        os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE")
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def hub_sentence(kind: str, repository: str, revision: str | None, place: str) -> str:
    """Why a hub repository can't be had here and now; "" when it can (or may)."""
    folder = hub_folder(kind, repository)
    wanted = revision if revision and re.fullmatch("[0-9a-f]{40}", revision) else None
    there = (folder / "snapshots" / wanted).is_dir() if wanted else (folder / "snapshots").is_dir()
    if there or not hub_is_offline():
        return ""
    at = f" at {revision}" if revision else ""
    return (
        f"{place}: {repository}{at} is not in the hub's cache ({folder.parent}) and HF_HUB_OFFLINE forbids the network"
    )


def _read_cache(file: Path) -> dict[str, tuple[str, str]]:
    """The remembered digests; a cache that can't be read is as good as none."""
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        return {str(path): (str(stamp), str(digest)) for path, (stamp, digest) in entries.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
