"""Unions of tokenizers: the first one's text and ids to the letter, and all others known, decoded, never made."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from alignment._pieces import pieces
from alignment.union import counterparts, union
from tests.tokenizers import KINDS, TEXT, build, byte_bpe, train

OTHER = ["Entirely other words: zebra quartz; über Füße, жизнь и судьба, ∮ 한국어.", "raise StopIteration(zzz)"] * 6
PAIRS = list(itertools.product([*KINDS, "legacy_llama", "digits"], KINDS))
TRICKY = st.text(alphabet=st.sampled_from("theqzä日жü🇩😀 \n\t01.<|>"), max_size=40)


def two(first: str, second: str) -> tuple[Tokenizer, Tokenizer]:
    return train(first) if first in KINDS else build(first, TEXT, 600), build(second, OTHER, 500)


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_text_is_cut_as_the_first_cuts_it(first, second):
    a, b = two(first, second)
    made = union([a, b]).tokenizer

    @settings(max_examples=25, deadline=None)
    @given(st.sampled_from([*TEXT, *OTHER]) | TRICKY)
    def check(text):
        assert made.encode(text).ids == a.encode(text).ids
        assert made.decode(a.encode(text).ids) == a.decode(a.encode(text).ids)

    check()


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_every_token_is_there_once_and_under_its_own_bytes(first, second):
    a, b = two(first, second)
    made = union([a, b])
    old, other, new = pieces(a), pieces(b), pieces(made.tokenizer)
    assert new.spelling[: len(old.text)] == old.spelling and new.text[: len(old.text)] == old.text
    assert len(new.text) == len(made.origin)
    for index, (source, own) in enumerate(made.origin.tolist()):
        if source == 1:
            assert new.text[index] == other.text[own]
    fresh = [data for data in new.text[len(old.text) :] if data is not None]
    assert len(set(fresh)) == len(fresh) and not set(fresh) & {data for data in old.text if data}
    there = {data for data in new.text if data}
    lacking = {data for data in other.text if data} - there
    broken = [d for d in other.text if d and "\ufffd" in d.decode("utf-8", "replace")]
    assert len(lacking) <= made.left_out <= len(broken)


def test_others_tokens_decode_and_byte_fallback_is_not_disturbed():
    a, b = two("metaspace", "byte_level")
    made = union([a, b])
    added = [i for i, (source, own) in enumerate(made.origin.tolist()) if source == 1 and pieces(b).text[own]]
    assert added
    start = a.encode("The").ids
    for index in added:
        text = made.tokenizer.decode([*start, index])
        assert text == a.decode(start) + pieces(made.tokenizer).text[index].decode()
    assert made.tokenizer.encode("ж").ids == a.encode("ж").ids and len(a.encode("ж").ids) > 2


def test_special_tokens_by_role_and_others_by_spelling():
    a = byte_bpe(["a", "b"], [])
    a.add_special_tokens(["<eos>"])
    b = byte_bpe(["b", "c"], [])
    b.add_special_tokens(["</s>", "<|tool|>"])
    made = union([a, b])
    assert made.origin.tolist() == [[0, 0], [0, 1], [0, 2], [1, 1], [1, 3]]
    assert made.tokenizer.encode("ab<|tool|>a").ids == [0, 1, 4, 0]
    assert counterparts(b, made.tokenizer).tolist() == [1, 3, 2, 4]
    assert counterparts(made.tokenizer, b).tolist() == [-1, 0, 2, 1, 3]
    assert pieces(made.tokenizer).special == {2, 4}


def test_three_share_what_they_share():
    a, b, c = byte_bpe(["a"], []), byte_bpe(["b", "a"], []), byte_bpe(["c", "b"], [])
    assert union([a, b, c]).origin.tolist() == [[0, 0], [1, 0], [2, 0]]
    assert union([a, a]).tokenizer is a


def test_counterparts_prefer_the_same_spelling():
    a = train("metaspace")
    own = counterparts(a, a)
    assert own.tolist() == list(range(len(own)))  # <0x41> stays <0x41> where there is an A too


def test_a_union_survives_its_file(tmp_path):
    a, b = two("unigram", "wordpiece")
    made = union([a, b]).tokenizer
    made.save(str(tmp_path / "tokenizer.json"))
    again = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert again.get_vocab() == made.get_vocab() and pieces(again).text == pieces(made).text
