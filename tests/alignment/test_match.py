"""Matchers: planted permutations come back, couplings have the sums they promise, bad input gets a sentence."""

import inspect

import pytest
import torch

from alignment.match._plan import cost_of, profiles, quality, relations
from alignment.match.clusters import clusters
from alignment.match.emd import emd
from alignment.match.fused_gromov import fused_gromov
from alignment.match.gromov import gromov
from alignment.match.hungarian import hungarian
from alignment.match.partial import partial
from alignment.match.sinkhorn import sinkhorn
from alignment.match.unbalanced import unbalanced

SOFT = (clusters, emd, sinkhorn, partial, unbalanced, gromov, fused_gromov)


def match(word, one: torch.Tensor, other: torch.Tensor, **params) -> torch.Tensor:
    """A word's coupling of rows (n, F) and (m, F)."""
    if "target" in inspect.signature(word).parameters:
        params = {"target": one @ one.T, "donor": other @ other.T, **params}
    return word(one @ other.T, **params)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("word", SOFT, ids=lambda word: word.__name__)
def test_a_planted_permutation_comes_back(word):
    rows, order = normal(40, 16), torch.randperm(40, generator=torch.Generator().manual_seed(1))
    found = match(word, rows, rows[order] + 0.03 * normal(40, 16, seed=2))
    assert found.shape == (40, 40) and found.dtype == torch.float64 and (found >= 0).all()
    matched = found.sum(1) > 0
    assert matched.sum() >= (32 if word is partial else 40)
    assert (found.argmax(1) == order.argsort())[matched].all()


@pytest.mark.parametrize("word", (emd, sinkhorn, gromov, fused_gromov), ids=lambda word: word.__name__)
@pytest.mark.parametrize("sizes", [(6, 9), (9, 6), (5, 10), (1, 4)], ids=str)
def test_sums_are_uniform_whatever_the_numbers(word, sizes):
    n, m = sizes
    found = match(word, normal(n, 4), normal(m, 4, seed=1))
    torch.testing.assert_close(found.sum(1), torch.full((n,), 1 / n).double(), rtol=2e-3, atol=0)
    torch.testing.assert_close(found.sum(0), torch.full((m,), 1 / m).double(), rtol=2e-3, atol=0)
    assert quality(found).marginal_error < 2e-3


def test_emd_is_the_assignment_and_sinkhorn_goes_to_it():
    similarity = normal(30, 30)
    exact = emd(similarity)
    assert exact.argmax(1).equal(hungarian(similarity))
    best = float((exact * similarity).sum())
    totals = [float((sinkhorn(similarity, epsilon=e) * similarity).sum()) for e in (0.2, 0.02, 0.002)]
    assert totals[0] < totals[1] < totals[2] <= best + 1e-9
    assert best - totals[2] < 1e-3 * (similarity.max() - similarity.min())
    supports = [quality(sinkhorn(similarity, epsilon=e)).effective_support for e in (0.2, 0.02, 0.002)]
    assert supports[0] > supports[1] > supports[2] and supports[2] < 1.2


def test_clusters_by_hand():
    """The second target unit is nobody's likest but one's match; with fewer donor units each target unit is a copy."""
    similarity = torch.tensor([[9.0, 8.0, 1.0, 7.0], [5.0, 2.0, 0.0, 1.0], [0.0, 3.0, 4.0, 0.0]])
    whole = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 1, 0]]).double() / 4
    assert clusters(similarity).equal(whole)
    wide = torch.tensor([[9.0, 1.0], [8.0, 2.0], [3.0, 4.0]])
    assert clusters(wide).equal(torch.tensor([[1, 0], [1, 0], [0, 1]]).double() / 3)
    with pytest.raises(ValueError, match="a similarity of units is not finite"):
        clusters(torch.full((2, 2), torch.nan))


def test_quality_by_hand():
    found = quality(torch.tensor([[0.25, 0.25], [0.0, 0.25], [0.0, 0.0]]).double())
    assert found.effective_support == pytest.approx(1.5) and found.largest_share == pytest.approx(0.75)
    assert found.mass == pytest.approx(0.75) and found.marginal_error == pytest.approx(1.0)


def test_costs_do_not_depend_on_scale_or_shift():
    similarity = normal(7, 5)
    assert torch.from_numpy(cost_of(similarity)).allclose(torch.from_numpy(cost_of(100 * similarity + 7)))
    assert cost_of(similarity).min() == 0 and cost_of(similarity).max() == 1
    assert (cost_of(torch.ones(2, 2)) == 0).all()


def test_partial_leaves_out_what_matches_worst():
    similarity = torch.diag(torch.tensor([5.0, 4.0, 3.0, -9.0])) - 10
    found = partial(similarity, mass=0.75)
    torch.testing.assert_close(found, torch.diag(torch.tensor([0.25, 0.25, 0.25, 0.0])).double())
    assert partial(similarity, mass=1.0).sum() == pytest.approx(1)


def test_unbalanced_keeps_mass_by_its_cost():
    similarity = torch.tensor([[1.0, 0.0], [0.0, 0.6]])  # costs 0 and 0.4 on the diagonal
    found = unbalanced(similarity, penalty=0.2, least=0.0)
    kept = torch.diagonal(found) * 2
    assert kept[0] == pytest.approx(1.0, abs=2e-2) and kept[1] == pytest.approx(
        float(torch.tensor(-1.0).exp()), abs=2e-2
    )
    assert (unbalanced(similarity, penalty=0.2, least=0.5)[1] == 0).all()


def test_relations_need_nothing_in_common():
    rows, order = normal(30, 12), torch.randperm(30, generator=torch.Generator().manual_seed(1))
    turn = torch.linalg.qr(normal(12, 12, seed=3))[0]
    turned = rows[order] @ turn  # rows of the two no longer compare
    found = gromov(torch.zeros(30, 30), target=rows @ rows.T, donor=turned @ turned.T)
    assert found.argmax(1).equal(order.argsort())
    one, other = relations(rows @ rows.T, turned @ turned.T)
    assert torch.from_numpy(profiles(one, other)).argmin(1).equal(order.argsort())


def test_bad_input_gets_a_sentence():
    broken = torch.full((3, 3), torch.nan)
    for word in (emd, sinkhorn, partial, unbalanced):
        with pytest.raises(ValueError, match="not finite"):
            word(broken)
    with pytest.raises(ValueError, match="not finite"):
        gromov(broken, target=broken, donor=broken)
    with pytest.raises(ValueError, match="sinkhorn: epsilon must be above 0"):
        sinkhorn(normal(3, 3), epsilon=0)
    with pytest.raises(ValueError, match="sinkhorn: the sums of its coupling are up to .* raise epsilon or iterations"):
        sinkhorn(normal(40, 30), epsilon=1e-4, iterations=2, tolerance=1e-6)
    with pytest.raises(ValueError, match="partial: mass must be above 0"):
        partial(normal(3, 3), mass=0)
    with pytest.raises(ValueError, match="unbalanced: penalty must be above 0"):
        unbalanced(normal(3, 3), penalty=0)
    with pytest.raises(ValueError, match="fused_gromov: alpha must be between"):
        fused_gromov(normal(3, 3), target=normal(3, 3), donor=normal(3, 3), alpha=2)
