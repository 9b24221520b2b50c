"""Sums over models that agree: the compiled loops and plain torch give the same bits."""

import itertools

import pytest
import torch

from fusion.merge import _compiled
from fusion.merge._votes import agreed, weighted

WEIGHTS = (torch.tensor([0.3, -0.2, 0.0, 1.0, 0.5]), torch.ones(5))


@pytest.fixture(scope="module", params=[1, 17, 1024, 9000])
def models(request):
    """Five models that agree with the origin, cancel each other, or have zeros here and there; and the origin."""
    generator = torch.Generator().manual_seed(request.param)
    tensors, origin = torch.randn(5, request.param, generator=generator), torch.randn(request.param)
    tensors[:, ::7], tensors[0, ::3] = origin[::7], -tensors[1, ::3]
    return tensors, origin


def both(monkeypatch, function, *arguments, **given):
    assert _compiled.library() is not None
    one = function(*arguments, **given)
    with monkeypatch.context() as patch:
        patch.setattr(_compiled, "library", lambda: None)
        return one, function(*arguments, **given)


@pytest.mark.parametrize("weights", WEIGHTS, ids=["mixed", "ones"])
@pytest.mark.parametrize("based", [True, False])
def test_weighted_sums(models, weights, based, monkeypatch):
    tensors, origin = models
    one, two = both(monkeypatch, weighted, tensors, weights, origin if based else None, 0.7)
    assert torch.equal(one, two)
    exact = weights.double() @ (tensors.double() - based * origin.double())
    torch.testing.assert_close(one.double(), origin + 0.7 * exact if based else exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights", WEIGHTS, ids=["mixed", "ones"])
@pytest.mark.parametrize("based", [True, False])
def test_those_that_agree(models, weights, based, monkeypatch):
    tensors, origin = models
    least = torch.tensor([0.0, 0.5, 0.2, 1.0, 0.1])
    for how, divide, bound, even in itertools.product(
        ("weighted", "unweighted"), ("", "weight", "count"), (None, least), (0.0, 1.0)
    ):
        given = {"origin": origin if based else None, "least": bound, "even": even}
        one, two = both(monkeypatch, agreed, tensors, weights, how, divide, **given)
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
        d = tensors - origin if based else tensors
        kept = d if bound is None else d.where(d.abs() >= bound[:, None], 0)
        assert one[1].tolist() == kept.ne(0).sum(1).tolist()


def test_by_hand():
    d = torch.tensor([[1.0, -2.0, 1.0], [4.0, 1.0, -1.0]])
    weights = torch.tensor([1.0, 2.0])
    assert agreed(d, weights)[0].tolist() == [9.0, 0.0, -2.0]  # in the second the votes cancel
    assert agreed(d, weights, "unweighted", "weight")[0].tolist() == [3.0, -2.0, 0.0]
    assert agreed(d, weights, "unweighted", "weight", even=1.0)[0].tolist() == [3.0, -2.0, 1.0]
    assert agreed(d, weights, divide="count", least=torch.tensor([2.0, 0.0]))[0].tolist() == [8.0, 0.0, -2.0]
