"""Targets inside a teacher's tokens: what remains of its tokens after the bytes read since its last boundary."""

import numpy as np
import torch

from alignment.inner import Inner
from alignment.tokens import token_bytes
from tests.tokenizers import train


def inner() -> tuple[Inner, list[bytes | None], list[bytes | None]]:
    teacher, student = train("byte_level"), train("bytes")
    identity = torch.arange(student.get_vocab_size())
    return Inner(teacher, student, identity), token_bytes(teacher), token_bytes(student)


def test_rests_are_the_first_piece_of_what_a_token_has_left() -> None:
    found, theirs, mine = inner()
    ids = np.array([i for i, data in enumerate(theirs) if data and len(data) > 2][:50])
    first = theirs[ids[0]]
    assert first is not None
    prefix = first[:1]
    rests = found.rests(prefix, ids)
    assert (rests >= 0).any() and (rests < 0).any()
    for i, bucket in zip(ids, rests, strict=True):
        data = theirs[i]
        assert data is not None
        expected = data[1:2] if data.startswith(prefix) and len(data) > 1 else None
        assert (mine[bucket] if bucket >= 0 else None) == expected
    assert (found.rests(prefix, ids) == rests).all()  # and again from memory


def test_a_token_that_ends_at_the_boundary_does_not_go_on() -> None:
    found, theirs, _ = inner()
    token = next(i for i, data in enumerate(theirs) if data and len(data) == 2)
    data = theirs[token]
    assert data is not None
    assert found.rests(data, np.array([token])).tolist() == [-1]


def test_a_prefix_is_given_only_where_the_token_has_the_bytes_of_the_text() -> None:
    found, theirs, _ = inner()
    token = next(i for i, data in enumerate(theirs) if data and len(data) == 3)
    data = theirs[token]
    assert data is not None
    assert found.prefix(token, 2, 3) == data[:2]
    assert found.prefix(token, 2, 4) is None  # white space that the tokenizer dropped stands before it
