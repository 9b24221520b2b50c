"""Permutations refined by what the mean of two networks does: a smaller loss, still the donor's function."""

import pytest
import torch
from torch.nn import functional as F

from alignment import Maps, align, refine, trace
from alignment.maps import Index
from tests.plain_networks import MLP


def trained(seed, x, y):
    torch.manual_seed(seed)
    module = MLP(4, (12, 8), 3)
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        F.cross_entropy(module(x), y).backward()
        optimizer.step()
    return module


@pytest.fixture(scope="module")
def task():
    """Samples of three classes that no line tells apart, in batches, and two networks trained on them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 4, generator=generator)
    y = ((x[:, 0] * x[:, 1] > 0).long() + (x[:, 2] > 0.5).long()).clamp_max(2)
    return [trained(seed, x, y) for seed in (1, 2)], list(zip(x.split(100), y.split(100)))


def halfway(module, donor, batches):
    """The loss of the mean of a network and tensors in its units."""
    mean = {name: (one + donor[name]) / 2 for name, one in module.state_dict().items()}
    with torch.no_grad():
        return sum(float(F.cross_entropy(torch.func.functional_call(module, mean, x), y)) for x, y in batches) / 3


def test_the_mean_gets_better_and_the_donor_stays_the_same_function(task):
    (target, other), batches = task
    spaces, donor = trace(target, batches[0][0][:3]), dict(other.state_dict())
    start = align(dict(target.state_dict()), donor, spaces, spaces, sweeps=20)
    before = {name: one.clone() for name, one in target.state_dict().items()}
    found = refine(target, donor, spaces, batches, F.cross_entropy, start=start, epochs=15, learning_rate=0.1)
    found.check(spaces)
    carried = found.carry(donor)
    assert halfway(target, carried, batches) < halfway(target, start.carry(donor), batches) - 1e-3
    torch.testing.assert_close(
        torch.func.functional_call(target, carried, batches[0][0]), other(batches[0][0]), rtol=1e-4, atol=1e-5
    )
    assert all(one.equal(before[name]) for name, one in target.state_dict().items())


def test_a_planted_copy_is_found_from_a_poor_start(task):
    (target, _), batches = task
    spaces = trace(target, batches[0][0][:3])
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    poor = Maps(spaces, spaces, {spaces.spaces[0].name: Index(order)})
    own = dict(target.state_dict())
    found = refine(target, own, spaces, batches, F.cross_entropy, start=poor, epochs=1).carry(own)
    for name, tensor in own.items():
        torch.testing.assert_close(found[name], tensor)


class Twice(torch.nn.Module):
    """One layer under two names between two others."""

    def __init__(self):
        super().__init__()
        self.into, self.once, self.head = torch.nn.Linear(4, 8), torch.nn.Linear(8, 8), torch.nn.Linear(8, 3)
        self.again = self.once

    def forward(self, x):
        return self.head(F.relu(self.again(F.relu(self.once(F.relu(self.into(x)))))))


def test_shared_weights_are_one(task):
    """A planted copy is found, and the gradient reaches both uses of the weights."""
    (_, _), batches = task
    torch.manual_seed(3)
    target = Twice()
    spaces, own = trace(target, batches[0][0][:3]), dict(target.state_dict())
    assert {"once.weight", "again.weight"} <= own.keys()
    space = next(space for space in spaces.spaces if space.size == 8)
    poor = Maps(spaces, spaces, {space.name: Index(torch.tensor([1, 0, *range(2, 8)]))})
    found = refine(target, own, spaces, batches, F.cross_entropy, start=poor, epochs=2)
    for name, tensor in own.items():
        torch.testing.assert_close(found.carry(own)[name], tensor, msg=name)


def test_bad_input_gets_a_sentence(task):
    (target, other), batches = task
    spaces = trace(target, batches[0][0][:3])
    with pytest.raises(ValueError, match="refine: there are no batches"):
        refine(target, dict(other.state_dict()), spaces, [], F.cross_entropy)
    line = torch.nn.Linear(4, 3)
    with pytest.raises(ValueError, match="refine: no units of this network change places"):
        own = dict(line.state_dict())
        refine(line, own, trace(line, batches[0][0][:3]), batches, F.cross_entropy)
