"""Vocabulary maps: tests V1 to V6, projections, and planted sources for which the right answer is known."""

from __future__ import annotations

import math
import time
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from alignment.tokens import spans, special_roles, token_bytes
from alignment.vocab import VocabMap
from tests.tokenizers import KINDS, TEXT, byte_bpe, train

ALL = (*KINDS, "nfkc_byte_level", "digits", "legacy_llama")
# tokenizers that keep every byte: for these V3 holds on the bytes as they are
LOSSLESS = ("byte_level", "bytes", "digits", "metaspace", "legacy_llama")
PAIRS = list(product(ALL, ALL))
LETTERS = list("theonam")
DIRECTIONS = ("teacher", "student", "auto")


def maps(teacher: Tokenizer, student: Tokenizer) -> list[VocabMap]:
    built = [VocabMap.first_piece(teacher, student, direction) for direction in DIRECTIONS]
    return [*built, VocabMap.exact(teacher, student)]


@pytest.mark.parametrize("kind", ALL)
def test_v1_identical_vocabularies_give_the_identity(kind: str) -> None:
    tokenizer = train(kind)
    other = Tokenizer.from_str(tokenizer.to_str())
    size = len(token_bytes(tokenizer))
    for direction in DIRECTIONS:
        m = VocabMap.first_piece(tokenizer, other, direction)
        assert m.index.tolist() == m.student_index.tolist() == list(range(size)) and m.size == size


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_v2_every_id_has_a_bucket_or_is_tail_and_mass_is_kept(teacher: str, student: str) -> None:
    a, b = train(teacher), train(student)
    size = len(token_bytes(b))
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(len(token_bytes(a)), generator=generator).log_softmax(0)
    for m in maps(a, b):
        assert m.size == size == len(m.student_index) and len(m.index) == len(token_bytes(a))
        for table in (m.index, m.student_index):
            assert table.dtype == torch.int64 and ((table >= -1) & (table < size)).all()
        # a bucket is named by one of its own student tokens
        buckets = m.student_index[m.student_index >= 0].unique()
        assert (m.student_index[buckets] == buckets).all()
        assert torch.isin(m.index[m.index >= 0], buckets).all()
        ids, masses = m.project(torch.arange(len(m.index)), log_probs)
        tail = log_probs[m.index < 0].exp().sum()
        assert torch.isclose(masses.exp().sum() + tail, torch.tensor(1.0), atol=1e-6)
        assert len(ids.unique()) == len(ids) and (masses.diff() <= 0).all()


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_v3_the_first_piece_begins_the_bytes(teacher: str, student: str) -> None:
    a, b = train(teacher), train(student)
    given_bytes, pieces = token_bytes(a), token_bytes(b)
    m = VocabMap.first_piece(a, b, "teacher")
    mapped = 0
    for data, index in zip(given_bytes, m.index.tolist(), strict=True):
        if data is None or index < 0 or teacher == student:
            continue
        mapped += 1
        piece = pieces[index]
        assert piece
        if student in LOSSLESS:
            assert data.startswith(piece)
        else:
            text = data.decode("utf-8", "ignore")
            seen = (b.normalizer.normalize_str(text) if b.normalizer else text).replace("▁", " ")
            # to a tokenizer without spaces all white space before a word is one
            forms = {data, seen.encode(), b" " + seen.lstrip().encode(), seen.lstrip().encode()}
            assert any(form.startswith(piece) for form in forms)
    if teacher != student:
        assert mapped > 0
    if student in LOSSLESS:
        # bytes always have a piece here: byte alphabet or byte fallback
        assert all(index >= 0 for data, index in zip(given_bytes, m.index.tolist(), strict=True) if data is not None)


# byte-level BPE is the same in the middle of a text and alone
@pytest.mark.parametrize(
    ("teacher", "student"), [(a, b) for a, b in PAIRS if a != b and b in ("byte_level", "digits", "bytes")]
)
def test_first_piece_is_the_students_own_tokenization(teacher: str, student: str) -> None:
    b = train(student)
    m = VocabMap.first_piece(train(teacher), b, "teacher")
    checked = 0
    for data, index in zip(token_bytes(train(teacher)), m.index.tolist(), strict=True):
        if data is not None and "\ufffd" not in (text := data.decode("utf-8", "replace")):
            assert index == b.encode(text).ids[0]
            checked += 1
    assert checked > 50


def test_prefix_spaces_do_not_leak_into_the_middle_of_a_text() -> None:
    for kind in ("metaspace", "legacy_llama", "unigram"):
        student, teacher = train(kind), train("byte_level")
        m = VocabMap.first_piece(teacher, student, "teacher")
        pieces = token_bytes(student)

        def first(spelling: str, m: VocabMap = m, teacher: Tokenizer = teacher, pieces: list = pieces) -> bytes | None:
            return pieces[int(m.index[teacher.token_to_id(spelling)])]

        assert not first("ing").startswith(b" ") and b"ing".startswith(first("ing"))
        assert first("Ġth").startswith(b" ") and b" th".startswith(first("Ġth"))


def test_wordpiece_student_takes_continuations_and_words_apart() -> None:
    student, teacher = train("wordpiece"), train("byte_level")
    m = VocabMap.first_piece(teacher, student, "teacher")

    def first(spelling: str) -> str | None:
        index = int(m.index[teacher.token_to_id(spelling)])
        return student.id_to_token(index) if index >= 0 else None

    assert first("ing") == "##ing"
    assert first("Ġthe") == "the"
    assert first(",") == ","
    # white space alone leaves no trace in WordPiece
    assert first("Ġ") is None
    # upper case is lower case to this student
    assert first("The") in ("##the", "##th", "##t")


@pytest.mark.parametrize(("teacher", "student"), [p for p in PAIRS if p[0] != p[1]])
def test_v4_special_tokens_go_to_the_same_role_only(teacher: str, student: str) -> None:
    a, b = train(teacher), train(student)
    roles, counterparts = special_roles(a), special_roles(b)
    for m in maps(a, b):
        for index, data in enumerate(token_bytes(a)):
            bucket = int(m.index[index])
            held = {role for role, i in roles.items() if i == index}
            if data is None and bucket >= 0:
                # of the same role, or the same special spelling in both
                assert held & {role for role, i in counterparts.items() if i == bucket} or (
                    not held and a.id_to_token(index) == b.id_to_token(bucket)
                )
            if data is not None and bucket >= 0:
                assert token_bytes(b)[bucket] is not None
        for role, index in roles.items():
            if role in counterparts:
                assert int(m.index[index]) == counterparts[role] == int(m.student_index[counterparts[role]])


def levenshtein(a: bytes, b: bytes) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        ahead = [i]
        for j, y in enumerate(b, start=1):
            ahead.append(min(row[j] + 1, ahead[j - 1] + 1, row[j - 1] + (x != y)))
        row = ahead
    return row[-1]


@pytest.mark.parametrize(
    ("teacher", "student"), [("byte_level", "wordpiece"), ("unigram", "digits"), ("digits", "unigram")]
)
def test_v5_string_maps_equal_a_naive_reference(teacher: str, student: str) -> None:
    a, b = train(teacher, 400), train(student, 400)
    exact, nearest = VocabMap.exact(a, b), VocabMap.minimum_edit(a, b)
    candidates = [(index, data) for index, data in enumerate(token_bytes(b)) if data]
    tied_to_zero = 0
    for index, data in list(enumerate(token_bytes(a)))[::3]:
        if data is None:
            continue
        same = [i for i, other in candidates if other == data]
        assert int(exact.index[index]) == (same[0] if same else -1)
        distances = [levenshtein(data, other) for _, other in candidates]
        expected = candidates[distances.index(min(distances))][0]
        assert int(nearest.index[index]) == expected
        tied_to_zero += int(nearest.index[index]) == 0
    assert tied_to_zero <= 2
    assert (nearest.index[[i for i, data in enumerate(token_bytes(a)) if data]] >= 0).all()
    # the student's own tail: what no teacher token equals
    equal = {data for data in token_bytes(a) if data}
    kept = [i for i, data in enumerate(token_bytes(b)) if data in equal]
    roles = set(special_roles(b).values())
    assert set(torch.nonzero(exact.student_index >= 0)[:, 0].tolist()) - roles == set(kept)


def test_byte_fallback_pieces_stand_back_where_another_has_the_byte() -> None:
    teacher, student = train("byte_level"), train("metaspace")
    index, fallback = student.token_to_id("a"), student.token_to_id("<0x61>")
    assert fallback < index
    for m in maps(teacher, student):
        assert int(m.index[teacher.token_to_id("a")]) == int(m.student_index[index])
    assert int(VocabMap.minimum_edit(teacher, student).index[teacher.token_to_id("a")]) == index


def test_v6_digits() -> None:
    teacher, student = train("byte_level"), train("digits")
    assert teacher.token_to_id("201") is not None and student.token_to_id("201") is None
    for direction in DIRECTIONS:
        m = VocabMap.first_piece(teacher, student, direction)
        assert int(m.index[teacher.token_to_id("201")]) == int(m.student_index[student.token_to_id("2")])
    assert int(
        VocabMap.first_piece(teacher, student, "teacher").index[teacher.token_to_id("201")]
    ) == student.token_to_id("2")


def test_parts_of_characters_go_to_the_longest_piece_they_begin_with() -> None:
    teacher, student = train("byte_level"), train("bytes")
    m = VocabMap.first_piece(teacher, student, "teacher")
    parts = [(i, d) for i, d in enumerate(token_bytes(teacher)) if d and "\ufffd" in d.decode("utf-8", "replace")]
    assert any(len(data) > 1 for _, data in parts)
    assert all(token_bytes(student)[int(m.index[index])] == data[:1] for index, data in parts)


def test_runs_of_white_space_leave_their_last_space_to_the_word() -> None:
    """GPT-2's splitting cuts two spaces and a word into " ", " word"; SentencePiece may cut them into "  ", "word"."""
    student = train("byte_level")
    teacher = byte_bpe(["Ġ", *LETTERS, "ĠĠ"], [("Ġ", "Ġ")])
    assert student.encode("  the").ids[0] == student.token_to_id("Ġ") and student.token_to_id("ĠĠ") is not None
    two, one = teacher.token_to_id("ĠĠ"), student.token_to_id("Ġ")
    assert int(VocabMap.first_piece(teacher, student, "teacher").index[two]) == one
    m = VocabMap.first_piece(teacher, student, "auto")
    assert int(m.index[two]) == int(m.student_index[one])


# Planted sources: continuations with known probabilities; the true next-token distribution of a tokenizer is the
# distribution of the first token of its own encoding.

FINE = byte_bpe(LETTERS, [])
COARSE = byte_bpe([*LETTERS, "th", "to", "the", "then"], [("t", "h"), ("t", "o"), ("th", "e"), ("the", "n")])
WITH_THE = byte_bpe([*LETTERS, "th", "the"], [("t", "h"), ("th", "e")])
WITH_THEM = byte_bpe([*LETTERS, "th", "em", "them"], [("t", "h"), ("e", "m"), ("th", "em")])
SOURCE = {"the": 0.4, "then": 0.2, "to": 0.1, "a": 0.2, "at": 0.1}
MIXED = {"the": 0.5, "them": 0.3, "th": 0.1, "a": 0.1}


def truth(tokenizer: Tokenizer, source: dict[str, float]) -> torch.Tensor:
    probabilities = torch.zeros(tokenizer.get_vocab_size(), dtype=torch.float64)
    for text, probability in source.items():
        probabilities[tokenizer.encode(text).ids[0]] += probability
    return probabilities


def gap(teacher: Tokenizer, student: Tokenizer, direction: str, source: dict[str, float]) -> float:
    """Total variation between the true teacher and the true student distribution on the map's buckets: the bias of a
    target."""
    m = VocabMap.first_piece(teacher, student, direction)
    folded = torch.zeros(m.size, dtype=torch.float64)
    target = folded.clone()
    truth_s, truth_t = truth(student, source), truth(teacher, source)
    folded.index_add_(0, m.student_index.clamp(min=0), truth_s * (m.student_index >= 0))
    target.index_add_(0, m.index.clamp(min=0), truth_t * (m.index >= 0))
    return float((folded - target).abs().sum() / 2)


def test_planted_finer_teacher_is_right_only_where_the_student_is_projected() -> None:
    assert gap(FINE, COARSE, "teacher", SOURCE) == pytest.approx(0.7)
    assert gap(FINE, COARSE, "student", SOURCE) == pytest.approx(0.0, abs=1e-12)
    assert gap(FINE, COARSE, "auto", SOURCE) == pytest.approx(0.0, abs=1e-12)


def test_planted_coarser_teacher_is_right_projected() -> None:
    assert gap(COARSE, FINE, "teacher", SOURCE) == pytest.approx(0.0, abs=1e-12)
    assert gap(COARSE, FINE, "auto", SOURCE) == pytest.approx(0.0, abs=1e-12)
    # here the student's own projection leaves its tokens alone, and teacher tokens go where they begin: the same map
    assert gap(COARSE, FINE, "student", SOURCE) == pytest.approx(0.0, abs=1e-12)


def test_planted_neither_finer_needs_both_directions() -> None:
    # teacher "the" is longer than the student's "th" and shorter than its "them"
    assert gap(WITH_THE, WITH_THEM, "teacher", MIXED) == pytest.approx(0.3)
    assert gap(WITH_THE, WITH_THEM, "student", MIXED) == pytest.approx(0.5)
    assert gap(WITH_THE, WITH_THEM, "auto", MIXED) == pytest.approx(0.0, abs=1e-12)
    assert gap(WITH_THEM, WITH_THE, "auto", MIXED) == pytest.approx(0.0, abs=1e-12)


def test_planted_auto_keeps_what_it_can() -> None:
    m = VocabMap.first_piece(FINE, COARSE, "auto")
    names = {piece: COARSE.id_to_token(int(m.student_index[COARSE.token_to_id(piece)])) for piece in COARSE.get_vocab()}
    assert names == {letter: letter for letter in LETTERS} | dict.fromkeys(["t", "th", "to", "the", "then"], "t")


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.text(alphabet="theonam", min_size=1, max_size=6), st.floats(0.01, 1), min_size=1, max_size=8),
    st.sampled_from([(FINE, COARSE), (COARSE, FINE)]),
)
def test_auto_is_unbiased_for_any_source_where_one_side_is_finer(source: dict[str, float], pair: tuple) -> None:
    assert gap(*pair, "auto", source) == pytest.approx(0.0, abs=1e-9)


# Several teachers


def test_join_gives_one_partition_of_the_student() -> None:
    m_fine, m_the = VocabMap.first_piece(FINE, WITH_THEM), VocabMap.first_piece(WITH_THE, WITH_THEM)
    joined = VocabMap.join([m_fine, m_the])
    assert joined[0].student_index.tolist() == joined[1].student_index.tolist()
    table = joined[0].student_index
    for before, after in zip((m_fine, m_the), joined, strict=True):
        # equal before, equal after, for teacher and student ids alike
        for bucket in before.student_index.unique().tolist():
            assert len(table[before.student_index == bucket].unique()) == 1
        assert after.index.tolist() == [int(table[b]) if b >= 0 else -1 for b in before.index.tolist()]
        assert after.size == before.size
    # exactly the joint of both relations: "t", "th", "them" are one through FINE; "e" and "em" too; nothing else moves
    assert len(table.unique()) == len(LETTERS)
    assert (table[table.unique()] == table.unique()).all()


def test_join_of_one_is_itself_and_of_another_student_a_sentence() -> None:
    m = VocabMap.first_piece(train("metaspace"), train("byte_level"))
    (same,) = VocabMap.join([m])
    assert same.index.tolist() == m.index.tolist() and same.student_index.tolist() == m.student_index.tolist()
    assert VocabMap.join([]) == []
    with pytest.raises(ValueError, match="cannot be joined"):
        VocabMap.join([m, VocabMap.first_piece(train("metaspace"), train("bytes"))])


def test_join_of_real_kinds_keeps_maps_consistent() -> None:
    student = train("byte_level")
    joined = VocabMap.join([VocabMap.first_piece(train(kind), student) for kind in ("metaspace", "wordpiece", "bytes")])
    reference = joined[0].student_index
    for m in joined:
        assert m.student_index.tolist() == reference.tolist()
        assert torch.isin(m.index[m.index >= 0], reference[reference >= 0]).all()


# Projection


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.tuples(st.integers(-1, 5), st.floats(-20, 0)), max_size=8), min_size=1, max_size=4),
    st.lists(st.integers(-1, 3), min_size=6, max_size=6),
)
def test_project_equals_a_naive_sum(rows: list[list[tuple[int, float]]], table: list[int]) -> None:
    m = VocabMap(torch.tensor(table), torch.arange(4), 4)
    width = max(len(row) for row in rows)
    ids = (
        torch.tensor([[i for i, _ in row] + [-1] * (width - len(row)) for row in rows]).reshape(len(rows), width).long()
    )
    log_probs = torch.tensor(
        [[p if i >= 0 else -math.inf for i, p in row] + [-math.inf] * (width - len(row)) for row in rows]
    )
    names, masses = m.project_rows(ids, log_probs.reshape(len(rows), width))
    assert names.shape == masses.shape == ids.shape
    for row, got_names, got_masses in zip(rows, names.tolist(), masses.tolist(), strict=True):
        expected: dict[int, float] = {}
        for index, log_prob in row:
            if index >= 0 and table[index] >= 0:
                expected[table[index]] = expected.get(table[index], 0.0) + math.exp(log_prob)
        got = {name: mass for name, mass in zip(got_names, got_masses, strict=True) if name >= 0}
        assert set(got) == set(expected)
        assert all(got[name] == pytest.approx(math.log(mass), abs=1e-4) for name, mass in expected.items())
        assert got_masses == sorted(got_masses, reverse=True)
        padding = [mass for name, mass in zip(got_names, got_masses, strict=True) if name < 0]
        assert all(mass == -math.inf for mass in padding) and got_names[len(got_names) - len(padding) :] == [-1] * len(
            padding
        )


def test_project_of_one_row_and_of_none() -> None:
    m = VocabMap(torch.tensor([2, 0, 2, -1]), torch.arange(3), 3)
    ids, masses = m.project(torch.tensor([0, 1, 2, 3]), torch.tensor([0.1, 0.3, 0.4, 0.2]).log())
    assert ids.tolist() == [2, 0] and masses.exp().tolist() == pytest.approx([0.5, 0.3])
    ids, masses = m.project(torch.tensor([], dtype=torch.int64), torch.tensor([]))
    assert ids.tolist() == [] and masses.tolist() == []
    # alone in its bucket an entry is left exactly as it was, -inf never makes nan
    lone = torch.tensor([-1234.5678])
    assert m.project(torch.tensor([1]), lone)[1].equal(lone)


# Heads, duplicates, files


def test_padded_heads_are_tail() -> None:
    teacher, student = train("metaspace"), train("byte_level")
    plain = VocabMap.first_piece(teacher, student)
    for build in (VocabMap.first_piece, VocabMap.exact):
        m = build(teacher, student, teacher_size=700, student_size=640)
        assert len(m.index) == 700 and len(m.student_index) == 640 == m.size
        assert (m.index[len(plain.index) :] == -1).all() and (m.student_index[plain.size :] == -1).all()
    assert (
        VocabMap.first_piece(teacher, student, teacher_size=700).index[: len(plain.index)].tolist()
        == plain.index.tolist()
    )


def test_a_vocabulary_larger_than_its_head_is_refused_with_both_numbers() -> None:
    teacher, student = train("metaspace"), train("byte_level")
    size = len(token_bytes(teacher))
    with pytest.raises(ValueError, match=f"teacher's tokenizer has {size} ids, but its head only 100 rows"):
        VocabMap.first_piece(teacher, student, teacher_size=100)
    with pytest.raises(ValueError, match="student's tokenizer has .* only 3 rows"):
        VocabMap.minimum_edit(teacher, student, student_size=3)
    with pytest.raises(ValueError, match="direction 'both' is none of teacher, student, auto"):
        VocabMap.first_piece(teacher, student, "both")


def test_duplicate_bytes_in_one_vocabulary_share_a_bucket() -> None:
    # "<0x61>" and "a" are the same byte to a teacher with byte fallback
    teacher, student = train("metaspace"), train("byte_level")
    for m in maps(teacher, student):
        assert int(m.index[teacher.token_to_id("<0x61>")]) == int(m.index[teacher.token_to_id("a")])
    back = VocabMap.first_piece(student, teacher)
    assert int(back.student_index[teacher.token_to_id("<0x61>")]) == int(back.student_index[teacher.token_to_id("a")])


def test_save_and_load(tmp_path) -> None:
    m = VocabMap.first_piece(train("unigram"), train("byte_level"))
    m.save(tmp_path / "map.safetensors")
    back = VocabMap.load(tmp_path / "map.safetensors")
    assert back.index.equal(m.index) and back.student_index.equal(m.student_index) and back.size == m.size


# Real vocabularies


@pytest.fixture(scope="module")
def real(smollm2, gemma3) -> tuple[Tokenizer, Tokenizer]:
    return tuple(Tokenizer.from_file(str(path / "tokenizer.json")) for path in (gemma3, smollm2))


def test_real_vocabularies_both_ways_in_under_a_minute(real) -> None:
    gemma, smol = real
    start = time.process_time()
    forward, backward = VocabMap.first_piece(gemma, smol), VocabMap.first_piece(smol, gemma)
    assert time.process_time() - start < 60
    given_bytes, pieces = token_bytes(gemma), token_bytes(smol)
    index = VocabMap.first_piece(gemma, smol, "teacher").index.tolist()
    plain = [i for i, data in enumerate(given_bytes) if data is not None]
    assert all(given_bytes[i].startswith(pieces[index[i]]) for i in plain if index[i] >= 0)
    # SmolLM2 lacks bytes that UTF-8 never uses and some that its training text never had; Gemma has all 256
    begins = {data[:1] for data in pieces if data}
    lost = [given_bytes[i] for i in plain if index[i] < 0]
    assert len(lost) < 30 and all(data[:1] not in begins for data in lost)
    plain = [i for i, data in enumerate(pieces) if data is not None]
    assert (backward.index[plain] >= 0).all()
    assert len(forward.student_index.unique()) > 46_000
    roles, counterparts = special_roles(gemma), special_roles(smol)
    assert int(forward.index[roles["eot"]]) == counterparts["eot"]


def test_real_projections_agree_on_what_comes_next(real) -> None:
    """At a shared boundary the next token of either side is in the same bucket: the map is a function of the bytes."""
    gemma, smol = real
    m = VocabMap.first_piece(gemma, smol)
    agreed = total = 0
    for text in TEXT[:7]:
        (ids_t, ends_t), (ids_s, ends_s) = spans(gemma, text), spans(smol, text)
        shared = np.intersect1d(ends_t, ends_s)[:-1]
        i, j = np.searchsorted(ends_s, shared), np.searchsorted(ends_t, shared)
        agreed += int((m.student_index[ids_s[i + 1]] == m.index[ids_t[j + 1]]).sum())
        total += len(shared)
    assert agreed / total > 0.97
