"""Rows for missing tokens: planted sparse combinations come back, pieces split as the tokenizer splits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from alignment._pieces import is_text, pieces
from alignment.rows import Mix, omp, splits
from tests.tokenizers import KINDS, byte_bpe, train


def planted(m: int, n: int, d: int, k: int, seed: int = 0):
    """Targets (m, d) that are combinations of k of n random atoms, and the dense weights (m, n)."""
    draw = torch.Generator().manual_seed(seed)
    atoms = torch.randn(n, d, generator=draw) * torch.rand(n, 1, generator=draw).add(0.2)
    dense = torch.zeros(m, n)
    for row in dense:
        row[torch.randperm(n, generator=draw)[:k]] = torch.randn(k, generator=draw).sign() * (
            1 + torch.rand(k, generator=draw)
        )
    return dense @ atoms, atoms, dense


def dense_of(mix: Mix, n: int) -> torch.Tensor:
    return torch.zeros(len(mix.ids), n).scatter_add(1, mix.ids, mix.weights)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_omp_finds_planted_combinations(seed, k):
    targets, atoms, dense = planted(9, 60, 256, k, seed)
    found = omp(targets, atoms, k=8)
    torch.testing.assert_close(dense_of(found, 60), dense, atol=1e-3, rtol=1e-3)
    assert ((found.weights != 0).sum(1) == k).all(), "it stops when nothing is left"


def test_omp_by_hand():
    """Two atoms at 45 degrees: the longer one has the smaller cosine and comes second, least squares is exact."""
    atoms = torch.tensor([[2.0, 0.0, 0.0], [7.0, 7.0, 0.0], [0.0, 0.0, 0.1]])
    target = torch.tensor([[3.0, 0.5, 0.0]])
    first = omp(target, atoms, k=1)
    assert first.ids.tolist() == [[0]] and first.weights.tolist() == [[1.5]]
    both = omp(target, atoms, k=2)
    assert both.ids.tolist() == [[0, 1]]
    torch.testing.assert_close(both.weights, torch.tensor([[1.25, 0.5 / 7]]))


def test_omp_fits_by_least_squares_and_never_worse_with_more_atoms():
    draw = torch.Generator().manual_seed(3)
    targets, atoms = torch.randn(7, 32, generator=draw), torch.randn(200, 32, generator=draw)
    errors = []
    for k in (1, 2, 4, 8, 16, 32, 64):
        mix = omp(targets, atoms, k)
        errors.append((mix.rows(atoms) - targets).norm(dim=1))
        for row, ids in enumerate(mix.ids):
            used = ids[mix.weights[row] != 0]
            assert len(set(used.tolist())) == len(used)
            exact = torch.linalg.lstsq(atoms[used].T.double(), targets[row].double()).solution
            torch.testing.assert_close(mix.weights[row][mix.weights[row] != 0].double(), exact, atol=1e-4, rtol=1e-3)
    assert all((after <= before + 1e-6).all() for before, after in zip(errors, errors[1:], strict=False))
    assert errors[-1].max() < 1e-4, "as many atoms as dimensions span everything"


def test_omp_lives_with_zero_and_repeated_atoms_and_zero_targets():
    atoms = torch.zeros(6, 4)
    atoms[1] = atoms[2] = torch.tensor([1.0, 1.0, 0.0, 0.0])
    atoms[3, 3] = 2.0
    mix = omp(torch.tensor([[2.0, 2.0, 0.0, 4.0], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 5.0, 0.0]]), atoms, k=64)
    assert torch.isfinite(mix.weights).all()
    torch.testing.assert_close(mix.rows(atoms), torch.tensor([[2.0, 2.0, 0, 4.0], [0, 0, 0, 0], [0, 0, 0, 0]]))


def test_chunks_change_nothing(monkeypatch):
    targets, atoms, _ = planted(40, 80, 64, 6)
    heard = []
    one, table = omp(targets, atoms, k=12), torch.randn(80, 3, 5)
    rows = one.rows(table)
    monkeypatch.setattr("alignment.rows.ELEMENTS", 3000)
    two = omp(targets, atoms, k=12, advance=heard.append)
    torch.testing.assert_close(dense_of(two, 80), dense_of(one, 80), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(one.rows(table), rows)
    assert sum(heard) == 40 and len(heard) > 5


def test_means_by_hand():
    table = torch.tensor([[1.0, 2.0], [3.0, 6.0], [5.0, 1.0]])
    mix = Mix.means([[0, 1], [2], [], [0, 0, 2]])
    torch.testing.assert_close(mix.rows(table), torch.tensor([[2.0, 4.0], [5.0, 1.0], [0.0, 0.0], [7 / 3, 5 / 3]]))
    assert Mix.means([]).rows(table).shape == (0, 2)
    torch.testing.assert_close(mix.rows(table[:, 0]), torch.tensor([2.0, 5.0, 0.0, 7 / 3]))  # a bias


def test_splits_by_hand():
    tokenizer = byte_bpe(["t", "h", "e", "r", "th", "the"], [("t", "h"), ("th", "e")])
    assert splits([b"there", b"the", b"eth", b"e", b"xt"], tokenizer) == [[5, 3, 2], [5], [2, 4], [2], [0]]


@pytest.mark.parametrize("kind", KINDS)
def test_splits_spell_the_bytes(kind):
    tokenizer = train(kind)
    take = pieces(tokenizer)
    words = [" walking", "walk", " the", "ing", " ", "1234", " über", "日本"]
    data = [word.encode() for word in words] + ["Straße".encode()[:5], b"\xe6\x97"]
    if kind in ("unigram", "wordpiece"):  # they normalise, drop spaces, and have no bytes
        found = splits(data, tokenizer)
        assert all(index not in take.special for ids in found for index in ids) and found[1] and found[3]
        return
    for string, ids in zip(data, splits(data, tokenizer), strict=True):
        assert b"".join(take.literal[index] for index in ids) == string


def test_an_own_token_is_its_own_piece():
    tokenizer = train("byte_level")
    take = pieces(tokenizer)
    known = [data for data in take.text if data and b"\xef\xbf\xbd" not in data]
    found = splits(known, tokenizer)
    alone = np.mean([len(ids) == 1 for ids in found])
    assert alone > 0.99  # all but parts of words that begin with a space run


def test_omp_needs_something_to_combine():
    with pytest.raises(ValueError, match="needs atoms"):
        omp(torch.ones(1, 2), torch.ones(0, 2))
    with pytest.raises(ValueError, match="k of at least 1"):
        omp(torch.ones(1, 2), torch.ones(3, 2), k=0)


def test_a_broken_character_beside_a_replacement_character_is_no_text():
    assert is_text("\ufffd".encode()) and is_text(b"") and is_text("é".encode())
    assert not is_text(b"\xbf\xbd\xef\xbf\xbd") and not is_text("é".encode()[:1])
