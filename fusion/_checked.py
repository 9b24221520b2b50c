"""What a recipe names is there: models and data, each checked and digested once, without torch or transformers."""

import gzip
import json
from pathlib import Path
from typing import Any

from fusion import _keys, data, sources
from fusion._say import nearest
from fusion.recipe import DataRef, Recipe


class Checked:
    """The recipe's models and data, each checked and digested once, when a step first refers to it."""

    def __init__(self, recipe: Recipe, digests: _keys.Digests):
        self.recipe, self.digests = recipe, digests
        self.kinds: dict[str, str] = {}
        self.models: dict[str, list[Any]] = {}
        self.data: dict[str, str] = {}

    def model(self, name: str) -> list[Any]:
        if name not in self.models:
            ref = self.recipe.models[name]
            self.kinds[name] = sources.check(name, ref, self.recipe.base, self.recipe.models)
            if ref.hub and (sentence := _keys.hub_sentence("models", ref.hub, ref.revision, ref.place)):
                raise ValueError(sentence)
            source = (ref.tokenizer or {}).get("data")
            if source is not None:
                if source not in self.recipe.data:
                    raise ValueError(
                        f"{ref.place}.tokenizer.data: no data '{source}'{nearest(source, self.recipe.data)}"
                    )
                self.text(source)
                _scratch_vocabulary(ref.config or {}, ref.tokenizer or {}, ref.place)
            below = [self.model(ref.base)] if ref.base else []
            self.models[name] = [*_keys.of_model(self.recipe, name, self.kinds[name], self.digests), *below]
        return self.models[name]

    def text(self, name: str) -> str:
        if name not in self.data:
            ref = self.recipe.data[name]
            for part in ref.mix or {}:
                self.text(part)
            if ref.path is not None:
                data.parse_split(ref.split, 100, ref.place)
                _column(ref, data.files(ref, self.recipe.base))
            elif ref.hub and (sentence := _keys.hub_sentence("datasets", ref.hub, ref.revision, ref.place)):
                raise ValueError(sentence)
            self.data[name] = _keys.of_data(self.recipe, name, self.digests)
        return self.data[name]

    def files(self, path: Any) -> list[str]:
        """Digests of the file, or of all files in the directory, that a parameter called `path` names."""
        if not isinstance(path, str):
            return []
        root = self.recipe.base / Path(path).expanduser()
        inside = [root] if root.is_file() else sorted(file for file in root.rglob("*") if file.is_file())
        return [self.digests(file) for file in inside]


def _scratch_vocabulary(config: dict[str, Any], tokenizer: dict[str, Any], place: str) -> None:
    head, size = config.get("vocab_size"), tokenizer.get("vocab_size")
    if isinstance(head, int) and isinstance(size, int) and size > head:
        raise ValueError(
            f"{place}: the tokenizer has {size} tokens but config.vocab_size is {head}; leave that out or raise it"
        )


def _column(ref: DataRef, files: list[Path]) -> None:
    """The column exists in the first file, and some file holds something."""
    if not any(file.stat().st_size for file in files):
        raise ValueError(f"{ref.place}.path: {files[0]}{' and the others' if len(files) > 1 else ''} is empty")
    if ref.column == data.ALL:
        if ref.format == "text" or ref.max_bytes is not None:
            what = "max_bytes cuts texts" if ref.max_bytes is not None else "a text file has no columns"
            raise ValueError(f"{ref.place}.column: '*' takes all columns of a json or parquet file, and {what}")
        columns(ref, files)
        return
    known = columns(ref, files)
    if known and ref.column not in known:
        raise ValueError(f"{ref.place}.column: {files[0]} has no column '{ref.column}'{nearest(ref.column, known)}")


def columns(ref: DataRef, files: list[Path]) -> list[str]:
    """Names of columns as far as the first file's header, or its first line, says them."""
    if ref.format == "parquet":
        import pyarrow.parquet

        return list(pyarrow.parquet.read_schema(files[0]).names)
    if ref.format == "json":
        return _json_columns(ref, next(file for file in files if file.stat().st_size))
    return []


def _json_columns(ref: DataRef, file: Path) -> list[str]:
    """Columns of the first line; none known when the file is one JSON array over many lines."""
    with gzip.open(file, "rb") if file.suffix == ".gz" else open(file, "rb") as stream:
        line = next((text for text in stream if text.strip()), b"{}")
    if line.lstrip()[:1] == b"[" or line.strip() == b"{":
        return []
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{ref.place}.path: the first line of {file} is not JSON: {error}") from None
    return list(row)
