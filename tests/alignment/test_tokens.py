"""Byte spans and shared boundaries: tests A1 to A9, over every kind of tokenizer."""

from __future__ import annotations

import subprocess
import sys
import time
from itertools import product

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from alignment.tokens import chat_spans, ends_of, shared_boundaries, spans, special_roles, token_bytes
from tests.tokenizers import KINDS, TEXT, train

ALL = (*KINDS, "nfkc_byte_level", "digits", "legacy_llama")
# what these give back, token by token, is the text itself: their pieces can be checked against its bytes
LOSSLESS = ("byte_level", "bytes", "digits", "metaspace", "legacy_llama")
PAIRS = [(a, b) for a, b in product(ALL, ALL) if a < b]

HARD = [
    "",
    " ",
    "   ",
    "\n",
    " x",
    "x ",
    "  leading and trailing  ",
    "line\r\nline\r\n",
    "😀",
    "a😀b👨‍👩‍👧c🇩🇪",
    "日本語の漢字",
    "e\u0301 cafe\u0301 naïve",
    "ﬁne ﬂow ½ Ⅳ ＡＢＣ",
    "▁literal▁",
    "<s> </s> <unk> [CLS] <|endoftext|> <0x41>",
    "İstanbul ß SS",
    "\u200b\ufeff\x00x",
    "한국어 텍스트",
    "don't ##stop --- ... ?!",
    "tab\tand  two",
]

# characters that tokenizers treat differently, often enough side by side
texts = st.text(
    st.one_of(
        st.sampled_from(list(" \n\r\t\u00a0abcTHEthe019.,'#▁<>éßİﬁ½😀👨\u200d日本\u0301\ufeff")),
        st.characters(exclude_categories=("Cs",)),
    ),
    max_size=40,
)
relaxed = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def assert_tiles(text: str, ids: np.ndarray, ends: np.ndarray) -> None:
    assert ids.dtype == ends.dtype == np.int64
    assert ids.shape == ends.shape
    assert (np.diff(ends, prepend=0) >= 0).all()
    if len(ends):
        assert ends[-1] == len(text.encode())


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("text", HARD)
def test_a6_spans_tile_hard_texts(kind: str, text: str) -> None:
    tokenizer = train(kind)
    ids, ends = spans(tokenizer, text)
    assert_tiles(text, ids, ends)
    assert ids.tolist() == tokenizer.encode(text, add_special_tokens=False).ids


@relaxed
@given(text=texts, kind=st.sampled_from(ALL))
def test_spans_tile_any_text(text: str, kind: str) -> None:
    ids, ends = spans(train(kind), text)
    assert_tiles(text, ids, ends)


@relaxed
@given(text=texts, kind=st.sampled_from(LOSSLESS))
def test_spans_of_lossless_tokenizers_are_the_pieces(text: str, kind: str) -> None:
    tokenizer = train(kind)
    ids, ends = spans(tokenizer, text)
    data, table, start = text.encode(), token_bytes(tokenizer), 0
    for position, (index, end) in enumerate(zip(ids.tolist(), ends.tolist(), strict=True)):
        piece = table[index]
        # a special is in the text as its spelling, the dummy prefix is no byte of it, "▁" in it reads as a space
        if piece is not None and "▁" not in text:
            assert data[start:end] in (piece, piece[1:] if position == 0 else piece)
        start = end


def test_emoji_and_byte_fallback_end_at_true_bytes() -> None:
    for kind in ("bytes", "legacy_llama"):
        ids, ends = spans(train(kind), "🫠é")
        assert [int(e) for e in ends if e] == [1, 2, 3, 4, 5, 6]
    # the same through a normaliser, where pieces are matched to offsets character by character
    _, ends = spans(train("nfkc_byte_level"), "A🫠B")
    assert ends.tolist()[0] == 1 and ends.tolist()[-2:] == [5, 6] and len(set(ends.tolist())) == len(ends)


def test_pieces_of_a_changed_character_close_no_boundary() -> None:
    tokenizer = train("unigram")
    text = "a ﬁne day"
    ids, ends = spans(tokenizer, text)
    bytes_ids, bytes_ends = spans(train("bytes"), text)
    i, j = shared_boundaries(ends, bytes_ends)
    read = [tokenizer.decode(ids[: k + 1].tolist()) for k in i]
    # what a token that closes a boundary has read is what the text says up to there, normalised
    for k, prefix in zip(j.tolist(), read, strict=True):
        said = text.encode()[: int(bytes_ends[k])].decode()
        assert prefix.strip() == said.replace("ﬁ", "fi").strip()
    assert "a fine" in {prefix.strip() for prefix in read}


def test_dropped_white_space_belongs_to_the_following_token() -> None:
    tokenizer = train("wordpiece")
    text = "  The   thing \n"
    ids, ends = spans(tokenizer, text)
    assert tokenizer.decode(ids.tolist()).split() == ["the", "thing"]
    assert ends[-1] == len(text)
    assert 5 in ends.tolist()


def test_trimmed_offsets_are_given_back() -> None:
    tokenizer = train("nfkc_byte_level")
    ids, ends = spans(tokenizer, "ﬁ: a\n\n  b ")
    assert_tiles("ﬁ: a\n\n  b ", ids, ends)


@pytest.mark.parametrize("kind", ALL)
def test_special_tokens_are_zero_length(kind: str) -> None:
    tokenizer = train(kind)
    text = "The ﬁne thing 😀"
    plain_ids, plain_ends = spans(tokenizer, text)
    ids, ends = spans(tokenizer, text, special=True)
    mask = np.array(tokenizer.encode(text).special_tokens_mask, dtype=bool)
    assert ids[~mask].tolist() == plain_ids.tolist()
    assert ends[~mask].tolist() == plain_ends.tolist()
    assert (np.diff(ends, prepend=0)[mask] == 0).all()


@relaxed
@given(text=texts, kind=st.sampled_from(ALL))
def test_a1_same_tokenizer_is_the_identity(text: str, kind: str) -> None:
    _, ends = spans(train(kind), text)
    i, j = shared_boundaries(ends, ends)
    assert i.tolist() == j.tolist() == np.flatnonzero(np.diff(ends, prepend=0)).tolist()
    if kind in LOSSLESS and "▁" not in text:
        # nothing but a dummy prefix is zero-length
        assert len(i) >= len(ends) - 1


@relaxed
@given(text=texts, pair=st.sampled_from(PAIRS))
def test_a2_a3_a4_a5_shared_boundaries(text: str, pair: tuple[str, str]) -> None:
    data = text.encode()
    (_, ends_a), (_, ends_b) = (spans(train(kind), text) for kind in pair)
    i, j = shared_boundaries(ends_a, ends_b)
    # A2: strictly increasing on both sides
    assert (np.diff(i) > 0).all() and (np.diff(j) > 0).all()
    # A3: the same bytes lie before both
    assert all(data[: ends_a[a]] == data[: ends_b[b]] for a, b in zip(i, j, strict=True))
    # A4: the groups between boundaries partition both sequences, zero-length tokens going with what follows them
    if len(ends_a) and len(ends_b):
        assert ends_a[i[-1]] == ends_b[j[-1]] == len(data)
        for index, ends in ((i, ends_a), (j, ends_b)):
            groups = np.split(np.arange(len(ends)), index + 1)
            assert np.concatenate(groups).tolist() == list(range(len(ends)))
            assert all(len(group) for group in groups[:-1])
            assert all(ends[k] == ends[index[-1]] for k in groups[-1])
    # A5: transposed
    b, a = shared_boundaries(ends_b, ends_a)
    assert a.tolist() == i.tolist() and b.tolist() == j.tolist()


ends_arrays = st.lists(st.integers(0, 3), max_size=64).map(lambda steps: np.cumsum(steps, dtype=np.int64))


@relaxed
@given(ends_a=ends_arrays, ends_b=ends_arrays)
def test_a7_equals_brute_force(ends_a: np.ndarray, ends_b: np.ndarray) -> None:
    def closes(ends: np.ndarray, k: int) -> bool:
        return ends[k] > (ends[k - 1] if k else 0)

    expected = [
        (a, b)
        for a in range(len(ends_a))
        for b in range(len(ends_b))
        if ends_a[a] == ends_b[b] and closes(ends_a, a) and closes(ends_b, b)
    ]
    i, j = shared_boundaries(ends_a, ends_b)
    assert list(zip(i.tolist(), j.tolist(), strict=True)) == expected


@pytest.mark.parametrize("pair", PAIRS)
def test_a6_bos_on_one_side_changes_nothing(pair: tuple[str, str]) -> None:
    text = "The naïve 😀 fox\r\n 日本"
    (_, a), (_, b) = (spans(train(kind), text) for kind in pair)
    (_, a_special), (_, b_special) = (spans(train(kind), text, special=True) for kind in pair)
    i, j = shared_boundaries(a, b)
    i_special, j_special = shared_boundaries(a_special, b)
    assert a_special[i_special].tolist() == a[i].tolist() and j_special.tolist() == j.tolist()
    i_both, j_both = shared_boundaries(a_special, b_special)
    assert a_special[i_both].tolist() == a[i].tolist() and b_special[j_both].tolist() == b[j].tolist()


def test_a8_linear_time() -> None:
    random = np.random.default_rng(0)
    a, b = (np.cumsum(random.integers(1, 8, 32_000)) for _ in range(2))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        shared_boundaries(a, b)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.05


# What broke the aligner that huggingface/trl issue 4393 is about, which grew two decoded strings until they were equal:
# characters split over tokens, BOS on one side only (A6), and whatever `decode` does not give back as it was: markers
# of the vocabularies in the text, runs of spaces, spaces before punctuation.
A9 = [
    "Answer: 201 + 99 = 300.",
    "SELECT  *\n\tFROM t WHERE x='▁' AND y=\"Ġ\";",
    "He said “it’s 3.14”…",
    "<think>\n2+2=4\n</think>\n\n4",
    "naïve café — 東京 2020\r\n",
]


@pytest.mark.parametrize("text", A9)
def test_a9_all_kinds_meet_at_the_end_and_between_words(text: str) -> None:
    _, byte_ends = spans(train("bytes"), text)
    for kind in ALL:
        _, ends = spans(train(kind), text)
        i, j = shared_boundaries(ends, byte_ends)
        # the byte model stops everywhere, so every token that closes a boundary is found
        assert i.tolist() == np.flatnonzero(np.diff(ends, prepend=0)).tolist()
        assert len(i) >= len(text.split()) - 1


def test_ends_of_an_encoding() -> None:
    tokenizer = train("metaspace")
    encoding = tokenizer.encode(TEXT[1], add_special_tokens=False)
    ids, ends = spans(tokenizer, TEXT[1])
    assert ends_of(tokenizer, encoding, ids, TEXT[1]).tolist() == ends.tolist()


def test_truncation_and_padding_left_in_a_tokenizer_are_set_aside() -> None:
    tokenizer = Tokenizer.from_str(train("byte_level").to_str())
    expected = spans(tokenizer, TEXT[0])[0].tolist()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=200)
    ids, ends = spans(tokenizer, TEXT[0])
    assert ids.tolist() == expected and ends[-1] == len(TEXT[0])
    assert tokenizer.truncation["max_length"] == 4 and tokenizer.padding["length"] == 200


def test_bad_input_gets_a_sentence() -> None:
    with pytest.raises(ValueError, match="character 2 of the text is a lone surrogate"):
        spans(train("byte_level"), "ab\ud800c")
    with pytest.raises(ValueError, match="slow tokenizer"):
        spans(object(), "text")
    with pytest.raises(ValueError, match="must not decrease: token 2 ends at byte 1"):
        shared_boundaries(np.array([1, 2, 1]), np.array([1]))


def test_no_shared_boundary_is_empty() -> None:
    i, j = shared_boundaries(np.array([1, 3]), np.array([2, 4]))
    assert not len(i) and not len(j)
    i, j = shared_boundaries(np.array([], dtype=np.int64), np.array([0, 2]))
    assert not len(i) and not len(j)


def test_token_bytes_of_every_kind() -> None:
    def of(kind: str, spelling: str) -> bytes | None:
        return token_bytes(train(kind))[train(kind).token_to_id(spelling)]

    assert of("byte_level", "Ġthe") == b" the"
    assert of("byte_level", "č") == b"\r"
    assert of("byte_level", "<|endoftext|>") is None
    assert of("metaspace", "▁the") == b" the"
    assert of("metaspace", "<0xE2>") == b"\xe2"
    assert of("metaspace", "<unk>") is None and of("metaspace", "<s>") is None
    assert of("unigram", "<unk>") is None and of("unigram", "▁") == b" "
    assert of("wordpiece", "the") == b" the"
    assert of("wordpiece", "##ing") == b"ing"
    assert of("wordpiece", ",") == b"," and of("wordpiece", "[UNK]") is None
    assert of("bytes", "Ā") == b"\x00"


def test_special_roles() -> None:
    assert special_roles(train("metaspace")) == {"bos": 1, "eos": 2, "unk": 0}
    assert special_roles(train("wordpiece")) == {"unk": 1, "pad": 0, "sep": 3, "cls": 2, "mask": 4}
    declared = PreTrainedTokenizerFast(tokenizer_object=train("metaspace"), eos_token="</s>", pad_token="</s>")
    assert special_roles(declared) == {"eos": 2, "pad": 2}


def test_importing_tokens_leaves_torch_and_transformers_alone() -> None:
    code = "import sys, alignment.tokens; assert not {'torch', 'transformers', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# Chat

PLAIN = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
TRIMMED = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] | trim }}!{% endfor %}"
MESSAGES = [
    {"role": "user", "content": "user says: naïve 😀"},
    {"role": "assistant", "content": "  the assistant\nanswers \n"},
    {"role": "user", "content": "user"},
]


def chat(kind: str, template: str | None) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=train(kind), chat_template=template, bos_token="<s>")


@pytest.mark.parametrize("kind", ["byte_level", "bytes", "metaspace", "legacy_llama"])
def test_chat_contents_are_located(kind: str) -> None:
    tokenizer = chat(kind, PLAIN)
    ids, ends, is_content = chat_spans(tokenizer, MESSAGES)
    data = "".join(m["content"] for m in MESSAGES).encode()
    rendered = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert ids.tolist() == spans(tokenizer, rendered)[0].tolist()
    lengths = np.diff(ends, prepend=0)
    assert (lengths >= 0).all() and ends[-1] <= len(data)
    table, start = token_bytes(tokenizer), 0
    for index, end, inside in zip(ids.tolist(), ends.tolist(), is_content.tolist(), strict=True):
        if inside:
            # a token after a straddling one also takes the bytes that ended nowhere
            assert data[start:end].endswith(table[index] or b"?")
        start = end
    if kind == "bytes":
        assert is_content.sum() == len(data) == ends[-1]
        assert (lengths[~is_content] == 0).all()


def test_chat_of_two_templates_meets_in_the_contents() -> None:
    (_, a, _), (_, b, _) = chat_spans(chat("bytes", PLAIN), MESSAGES), chat_spans(chat("byte_level", TRIMMED), MESSAGES)
    i, j = shared_boundaries(a, b)
    data = "".join(m["content"] for m in MESSAGES).encode()
    assert len(i) > 5
    assert a[i].tolist() == b[j].tolist()
    first = len(MESSAGES[0]["content"].encode())
    # the second content begins with stripped white space, which ends nowhere on that side
    assert first + 1 not in b.tolist() and a[-1] == len(data)


def test_chat_straddling_tokens_close_no_boundary_too_late() -> None:
    tokenizer = Tokenizer.from_str(train("bytes").to_str())
    tokenizer.add_tokens(["b!", "]a"])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template="{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}!{% endfor %}",
    )
    ids, ends, is_content = chat_spans(wrapped, [{"role": "u", "content": "a..b"}, {"role": "u", "content": "x"}])
    spelt = [tokenizer.id_to_token(i) for i in ids.tolist()]
    assert spelt == ["[", "u", "]a", ".", ".", "b!", "[", "u", "]", "x", "!"]
    assert is_content.tolist() == [False, False, False, True, True, False, False, False, False, True, False]
    # "]a" has read exactly one byte of content; after "b!" the model has read more than the content
    assert ends.tolist() == [0, 0, 1, 2, 3, 3, 3, 3, 3, 5, 5]


def test_chat_bad_input_gets_a_sentence() -> None:
    with pytest.raises(ValueError, match="no chat template"):
        chat_spans(chat("bytes", None), MESSAGES)
    with pytest.raises(ValueError, match="no chat template"):
        chat_spans(train("bytes"), MESSAGES)
    with pytest.raises(ValueError, match="rewrites the content of message 0"):
        chat_spans(chat("bytes", PLAIN.replace("m['content']", "m['content'] | upper")), MESSAGES)
    with pytest.raises(ValueError, match="drops, repeats or reorders the content of message 0"):
        chat_spans(chat("bytes", "{{ messages[-1]['content'] }}"), MESSAGES)
    with pytest.raises(ValueError, match="message 0 must have a role and a content that is a string"):
        chat_spans(chat("bytes", PLAIN), [{"role": "user", "content": [{"type": "text", "text": "x"}]}])


# Real tokenizers


def test_real_tokenizers_on_hard_texts(smollm2, gemma3) -> None:
    smol, gemma = (Tokenizer.from_file(str(path / "tokenizer.json")) for path in (smollm2, gemma3))
    for text in [*HARD, *A9, *TEXT]:
        (ids_a, a), (ids_b, b) = spans(smol, text), spans(gemma, text, special=True)
        assert_tiles(text, ids_a, a)
        i, j = shared_boundaries(a, b)
        if text:
            assert_tiles(text, ids_b, b)
            assert a[i[-1]] == len(text.encode()) and ids_b[0] == special_roles(gemma)["bos"] and b[0] == 0


def test_real_chat_template(smollm2) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    ids, ends, is_content = chat_spans(tokenizer, MESSAGES)
    data = "".join(m["content"] for m in MESSAGES).encode()
    table = token_bytes(tokenizer)
    contents = b"".join(table[i] or b"?" for i in ids[is_content].tolist())
    # SmolLM2 joins a newline of the template to white space that follows, so the second content may lose its two spaces
    assert contents == data.replace(b"  the", b" the") or contents == data
    assert ends[-1] == len(data)
    assert (np.diff(ends, prepend=0)[is_content] > 0).all()
