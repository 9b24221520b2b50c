"""The vocabulary that a model is to have: its tokenizer, where each token comes from, and the files that say so."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion._carry import write
from fusion._files import config_of

if TYPE_CHECKING:
    import numpy as np

    from alignment._pieces import Pieces

SETTINGS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
# What slow tokenizers read: they don't know the tokens of a union.
SLOW = ("added_tokens.json", "chat_template.json", "vocab.json", "merges.txt", "vocab.txt", "tokenizer.model")


@dataclass(frozen=True)
class Spoken:
    """A tokenizer with the roles that its directory declares, without transformers; `alignment` takes it as one."""

    directory: Path
    backend_tokenizer: Any
    special_tokens_map: dict[str, str]
    template: str | None

    @classmethod
    def open(cls, directory: Path) -> Spoken:
        from tokenizers import Tokenizer

        from fusion.sources import SPECIALS, tokenizer_digest

        tokenizer_digest(directory)  # raises its sentence where there is no tokenizer.json
        settings = _optional(directory / "tokenizer_config.json")
        specials = {key: settings[key] for key in SPECIALS if settings.get(key) and key.endswith("_token")}
        template = directory / "chat_template.jinja"
        return cls(
            directory,
            Tokenizer.from_file(str(directory / "tokenizer.json")),
            {
                k: str(v["content"] if isinstance(v, dict) else v)
                for k, v in specials.items()
                if not isinstance(v, bool)
            },
            template.read_text(encoding="utf-8") if template.exists() else settings.get("chat_template"),
        )


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The tokenizer that comes out of `names` (their tokenizers), and what the model has of it."""

    names: Sequence[str]
    speakers: Mapping[str, Spoken]
    model: Spoken
    result: Spoken
    kept: np.ndarray  # (V,) int64: the model's own id of each token, -1 where it has none
    given_up: np.ndarray  # (own ids,) int64: the new id of each of the model's tokens, -1 where there is none
    origin: np.ndarray  # (V, 2) int64: the place in `names` of the tokenizer a token comes from, and its id there
    left_out: int  # tokens that the union could not spell

    @classmethod
    def of(cls, names: Sequence[str], model: str, read: Callable[[str], Spoken]) -> Vocabulary:
        """That of the first of `names` and, when there are more, of the union of them all."""
        from alignment.union import counterparts, union

        speakers = {name: read(name) for name in [model, *names]}
        first = speakers[names[0]]
        united = union([speakers[name] for name in names])
        result = first
        if united.tokenizer is not first.backend_tokenizer:
            result = Spoken(first.directory, united.tokenizer, first.special_tokens_map, first.template)
        kept, origin = counterparts(result, speakers[model]), united.origin
        if model in names:  # what comes from the model is its own, also where several of its tokens have the same bytes
            mine = origin[:, 0] == names.index(model)
            kept[mine] = origin[mine, 1]
        down = counterparts(speakers[model], result)
        return cls(names, speakers, speakers[model], result, kept, down, origin, united.left_out)

    @property
    def table(self) -> Pieces:
        """Of the tokenizer that comes out."""
        return pieces_of(self.result)

    @property
    def mine(self) -> Pieces:
        """Of the model's own tokenizer."""
        return pieces_of(self.model)

    @property
    def lacking(self) -> np.ndarray:
        """Ids of tokens that the model does not have, ascending."""
        import numpy as np

        return np.flatnonzero((self.kept < 0) & (self.origin[:, 0] >= 0))

    def donors(self) -> dict[str, np.ndarray]:
        """Model -> the missing tokens that come from its tokenizer."""
        sources = self.origin[self.lacking, 0]
        return {name: self.lacking[sources == n] for n, name in enumerate(self.names) if (sources == n).any()}

    def shared(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the ordinary tokens that `name` and the model both have, there and here, each of the model's once."""
        import numpy as np

        from alignment.union import counterparts

        mine = counterparts(self.speakers[name], self.model)
        mine[sorted(pieces_of(self.speakers[name]).special)] = -1
        found, first = np.unique(mine, return_index=True)
        return first[found >= 0], found[found >= 0]


def pieces_of(spoken: Spoken) -> Pieces:
    from alignment._pieces import pieces

    return pieces(spoken)


def write_files(vocabulary: Vocabulary, directory: Path, before: int, count: int, folder: Path) -> None:
    """The tokenizer's files, and config.json and generation_config.json of `directory` with the new ids and `count`
    rows where there were `before`."""
    from alignment._pieces import special_roles

    _write_tokenizer(vocabulary, folder)
    roles = special_roles(vocabulary.result)
    config = resized(remapped(config_of(directory), vocabulary.given_up, roles), before, count)
    write(folder / "config.json", config)
    if (directory / "generation_config.json").exists():
        generation = _optional(directory / "generation_config.json")
        write(folder / "generation_config.json", remapped(generation, vocabulary.given_up, roles))


def _write_tokenizer(vocabulary: Vocabulary, folder: Path) -> None:
    """The first one's files, with the union's tokens. Without a chat template of its own it takes the first of the
    others' whose special tokens are all there."""
    result = vocabulary.result
    united = result is not vocabulary.speakers[vocabulary.names[0]]
    for name in (*SETTINGS, *(() if united else SLOW)):
        if (result.directory / name).exists():
            (folder / name).write_bytes((result.directory / name).read_bytes())
    if united:
        result.backend_tokenizer.save(str(folder / "tokenizer.json"))
        # a class of its own may build the decoder anew, and then shows the marks of the others' tokens
        settings = _optional(folder / "tokenizer_config.json") | {"tokenizer_class": "PreTrainedTokenizerFast"}
        write(folder / "tokenizer_config.json", settings)
    there = result.backend_tokenizer.get_vocab(with_added_tokens=True)
    for other in vocabulary.speakers.values() if result.template is None else ():
        table = pieces_of(other)
        named = [str(table.spelling[index]) for index in table.special]
        if other.template and all(one in there for one in named if one in other.template):
            (folder / "chat_template.jinja").write_text(other.template, encoding="utf-8")
            return


def remapped(record: dict[str, Any], down: np.ndarray, roles: Mapping[str, int]) -> dict[str, Any]:
    """A configuration whose token ids (*_token_id, *_token_ids, *_token_index, suppress_tokens) are the new ones.

    down: old id -> new id, -1 for none. An id without a counterpart becomes the new tokenizer's token of that role, or
    goes.
    """

    def new(index: Any) -> int | None:
        return int(down[index]) if isinstance(index, int) and 0 <= index < len(down) and down[index] >= 0 else None

    result: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, dict):
            result[key] = remapped(value, down, roles)
        elif key.endswith(("_token_id", "_token_ids", "_token_index")) or key in (
            "suppress_tokens",
            "begin_suppress_tokens",
        ):
            role = roles.get(key.partition("_token")[0])
            if isinstance(value, list):
                found = [index for index in map(new, value) if index is not None]
                result[key] = list(dict.fromkeys(found)) or (None if role is None else [role])
            else:
                result[key] = value if value is None else role if new(value) is None else new(value)
        else:
            result[key] = value
    return result


def resized(config: dict[str, Any], before: int, count: int) -> dict[str, Any]:
    """The configuration with `count` rows where it said `before`."""
    sized = {key: count for key, value in config.items() if "vocab_size" in key and value == before}
    nested = {key: resized(value, before, count) for key, value in config.items() if isinstance(value, dict)}
    return {**config, **sized, **nested}


def _optional(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
