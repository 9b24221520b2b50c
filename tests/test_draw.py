"""Random numbers by counting: the same whatever the order, the chunks and the machinery; uniform and unrelated."""

import pytest
import torch

from fusion.merge import _compiled
from fusion.merge._draw import Draw

MASK = (1 << 64) - 1


def splitmix64(state: int) -> int:
    """The published generator's output for a state that was already advanced."""
    z = state & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


@pytest.fixture(params=["compiled", "torch"])
def machinery(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(_compiled, "library", lambda: None)


def test_the_generator_is_splitmix64(machinery):
    # the published test vector: seed 1234567 gives these first outputs
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    gamma = 0x9E3779B97F4A7C15
    assert [splitmix64(1234567 + gamma * (i + 1)) for i in range(3)] == published
    draw = Draw(seed=3, name="a.0.w", start=5, n=1000)
    key = draw.key(2)
    want = [(splitmix64(key + gamma * (i + 1)) >> 40) / 2**24 for i in range(5, 1005)]
    assert draw.uniform(2).tolist() == want


def test_any_region_draws_the_same(machinery):
    whole = Draw(0, "w", 0, 10000).uniform(0)
    cut = [Draw(0, "w", start, n).uniform(0) for start, n in ((0, 1), (1, 4096), (4097, 5903))]
    assert torch.equal(torch.cat(cut), whole)
    far = Draw(0, "w", 3_000_000_000, 4).uniform(0)  # past 32 bits
    assert torch.equal(far[2:], Draw(0, "w", 3_000_000_002, 2).uniform(0))
    assert Draw(0, "w", 0, 0).uniform(0).shape == (0,)


def test_everything_counts():
    draws = [
        Draw(seed, name, 0, 4096, step).uniform(model)
        for seed, name, step, model in ((0, "w", 0, 0), (1, "w", 0, 0), (0, "v", 0, 0), (0, "w", 1, 0), (0, "w", 0, 1))
    ]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))
    assert correlation.abs().max() < 5 / 4096**0.5


def test_it_is_uniform():
    drawn = Draw(7, "w", 0, 1 << 20).uniform(0)
    assert 0 <= drawn.min() and drawn.max() < 1
    counts = drawn.mul(256).long().bincount(minlength=256).double()
    expected = (1 << 20) / 256
    # chi squared with 255 degrees of freedom: 255 +- 22.6
    assert abs(float(((counts - expected) ** 2 / expected).sum()) - 255) < 5 * 22.6
    neighbours = torch.corrcoef(torch.stack([drawn[1:], drawn[:-1]]))[0, 1]
    assert abs(float(neighbours)) < 5 / 1024


def test_keep_has_the_chance_it_was_given(machinery):
    draw = Draw(0, "w", 0, 100_000)
    kept = draw.keep(0, 0.3)
    assert set(kept.tolist()) == {0.0, 1.0}
    assert abs(float(kept.mean()) - 0.3) < 5 * (0.21 / 100_000) ** 0.5
    assert draw.keep(0, 1.0).all() and not draw.keep(0, 0.0).any()
    each = torch.cat([torch.zeros(50_000), torch.ones(50_000)])
    assert torch.equal(draw.keep(0, each), each)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_draws_the_same():
    here, there = (Draw(5, "w", 77, 100_000, 2, device).uniform(1) for device in ("cpu", "cuda"))
    assert torch.equal(here, there.cpu())
