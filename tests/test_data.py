"""Documents: the pieces, splits, mixtures, formats and digests of `data:` entries, and what bad ones are told."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion import data
from fusion.recipe import load

TEXT = (
    "It is a truth universally acknowledged.\n\nThat a single man.\nIn possession of a good fortune, Straße 5 €.\n" * 20
)


def entry(tmp_path: Path, **fields: object) -> tuple[data.Mixed | data.Documents, dict]:
    """The documents of a one-entry recipe on disk, and the recipe's `data`."""
    entries = parsed(tmp_path, {"text": fields})
    return data.documents(entries["text"], tmp_path, entries), entries


def parsed(tmp_path: Path, entries: dict) -> dict:
    """`data:` entries as the recipe loader has them."""
    step = {"record": {"out": "hints", "teacher": "m", "data": next(iter(entries))}}
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"models": {"m": {"path": "."}}, "data": entries, "steps": [step]}))
    return load(path).data


@settings(deadline=None)  # the first example imports numpy
@given(st.text(alphabet=st.sampled_from("ab \né€😀\r"), max_size=300), st.integers(1, 40))
def test_pieces_tile_the_text_and_keep_to_their_size(text: str, size: int) -> None:
    pieces = data.cut(text, size)
    assert "".join(text[a:b] for a, b in pieces) == text
    assert all(len(text[a:b].encode()) <= size or b - a == 1 for a, b in pieces)
    assert all(b > a for a, b in pieces)


def test_pieces_end_at_blank_lines_where_they_can() -> None:
    text = "one two\n\nthree four five six\n"
    assert [text[a:b] for a, b in data.cut(text, 16)][0] == "one two\n\n"


@pytest.mark.parametrize(
    ("split", "expected"),
    [(None, slice(None, None)), ("train[:95%]", slice(None, 95)), ("train[95%:]", slice(95, None))]
    + [("train[10:20]", slice(10, 20)), ("train[-5:]", slice(-5, None))],
)
def test_splits(split: str | None, expected: slice) -> None:
    assert data.parse_split(split, 100, "here") == expected


def test_a_wrong_split_is_a_sentence() -> None:
    with pytest.raises(ValueError, match=r"data.text.split: 'test' is not like 'train'"):
        data.parse_split("test", 10, "data.text")


def test_text_is_read_whole_and_in_order(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    found, _ = entry(tmp_path, path="a.txt", format="text", max_bytes=100)
    assert "".join(document.text for document in found) == TEXT
    assert all(document.size <= 100 for document in found)
    first, second = (
        entry(tmp_path, path="a.txt", format="text", max_bytes=100, split=s)[0] for s in ("train[:30%]", "train[30%:]")
    )
    assert [d.digest for d in first] + [d.digest for d in second] == [d.digest for d in found]


def test_a_shuffle_comes_before_the_split_and_depends_on_its_seed_alone(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    plain, one, two = (
        [d.text for d in entry(tmp_path, path="a.txt", max_bytes=60, **more)[0]]
        for more in ({}, {"shuffle": 1}, {"shuffle": 2})
    )
    assert sorted(plain) == sorted(one) == sorted(two)
    assert plain != one != two
    halves = [
        entry(tmp_path, path="a.txt", max_bytes=60, shuffle=1, split=s)[0] for s in ("train[:50%]", "train[50%:]")
    ]
    assert [d.text for half in halves for d in half] == one


def test_json_rows_and_conversations(tmp_path: Path) -> None:
    rows = [{"text": "one", "chat": [{"role": "user", "content": "hi é"}, {"role": "assistant", "content": "ho"}]}] * 3
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found, _ = entry(tmp_path, path="a.jsonl", format="json")
    assert [d.text for d in found] == ["one"] * 3
    chats, _ = entry(tmp_path, path="a.jsonl", format="json", column="chat")
    assert chats[0].messages[1] == {"role": "assistant", "content": "ho"}
    assert chats[0].size == len("hi ého".encode())
    with pytest.raises(ValueError, match="no column 'body'; there is text, chat"):
        entry(tmp_path, path="a.jsonl", format="json", column="body")


def test_a_mixture_keeps_its_proportions_at_every_prefix(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 1000)
    (tmp_path / "b.txt").write_text("b" * 1000)
    entries = parsed(
        tmp_path,
        {
            "a": {"path": "a.txt", "format": "text", "max_bytes": 10},
            "b": {"path": "b.txt", "format": "text", "max_bytes": 10},
            "both": {"mix": {"a": 0.75, "b": 0.25}},
        },
    )
    mixed = data.documents(entries["both"], tmp_path, entries)
    share = [d.text[0] for d in mixed]
    assert all(abs(share[:n].count("a") - 0.75 * n) <= 1 for n in range(1, len(share)))
    assert share.count("a") == 100


def test_bad_data_get_sentences(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(ValueError, match="no file at"):
        entry(tmp_path, path="gone.txt", format="text")
    with pytest.raises(ValueError, match="no text in it"):
        entry(tmp_path, path="empty.txt", format="text")
    with pytest.raises(ValueError, match="not UTF-8 at byte 0"):
        entry(tmp_path, path="latin.txt", format="text")


def test_the_digest_follows_the_bytes_and_the_fields(tmp_path: Path) -> None:
    def key(**more: object) -> str:
        _, entries = entry(tmp_path, path="a.txt", format="text", **more)
        return data.digest(entries["text"], tmp_path, lambda p: str(p.read_bytes()), entries)

    (tmp_path / "a.txt").write_text(TEXT)
    before = key()
    changed = [key(split="train[:50%]"), key(max_bytes=77), key(shuffle=0), key(shuffle=1)]
    assert before == key()
    assert len({before, *changed}) == 5
    (tmp_path / "a.txt").write_text(TEXT + ".")
    assert key() != before


def test_the_standard_library_is_code() -> None:
    class Entry:
        path, format, place = data.STDLIB, "text", "data.code"

    found = data.files(Entry(), Path("."))
    assert len(found) > 200
    assert {"json", "argparse"} <= {p.stem for p in found} | {p.parent.name for p in found}
    assert not any("site-packages" in p.parts for p in found)
