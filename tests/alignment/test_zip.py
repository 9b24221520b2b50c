"""Zipping: the loop's merges, budgets, exactness on planted copies, bad input."""

import pytest
import torch

from alignment import trace
from alignment.features.activations import collect
from alignment.trace import outputs_of
from alignment.zip import zip_networks, zip_units
from tests.bench.zip import copying, correlations
from tests.plain_networks import MLP


@pytest.mark.parametrize("alpha,beta", [(0.3, 0.125), (1.0, 1.0), (0.1, 0.0), (0.0, 0.5), (0.5, 0.3)])
@pytest.mark.parametrize("seed", range(3))
def test_the_same_merges_as_the_loop(alpha, beta, seed):
    similarity = correlations(3, 20, 200, seed)
    until = 31 if alpha == 0 or beta == 0 else 20
    found = zip_units(similarity, [20] * 3, until, alpha=alpha, beta=beta)
    assert found.equal(copying(similarity, [20] * 3, until, alpha, beta))
    assert len(found.unique()) == until


@pytest.mark.parametrize("models,size", [(3, 1), (3, 17), (4, 12), (6, 9)])
def test_units_that_have_nothing_in_common_merge_across_networks_alone(models, size):
    """Where the loop comes to an end with units that must not merge."""
    similarity = torch.rand(models * size, models * size, generator=torch.Generator().manual_seed(0))
    found = zip_units((similarity + similarity.T) / 2, [size] * models, alpha=0.5, beta=0.0)
    assert all(own.sort().values.equal(torch.arange(size)) for own in found.split(size))


def test_three_networks_by_hand():
    """The loop would stop at 0 with 3, 1 with 4 and 2 with 5, units (0, 1), (2, 3) and (4, 5) being of one network."""
    table = torch.full((6, 6), 0.1)
    for value, (one, other) in {0.9: (0, 3), 0.8: (1, 4), 0.7: (2, 5), 0.5: (0, 5), 0.4: (2, 4)}.items():
        table[one, other] = table[other, one] = value
    table[3, 5] = table[5, 3] = 0.2  # 0 and 3 take 5, and what is left, 2, goes to 1 and 4
    assert zip_units(table, [2, 2, 2], beta=0.0).tolist() == [0, 1, 1, 0, 1, 0]


@pytest.mark.parametrize("seed", range(3))
def test_the_same_merges_with_ties_and_below_zero(seed):
    generator = torch.Generator().manual_seed(seed)
    similarity = torch.randint(-4, 5, (24, 24), generator=generator) / 4
    similarity = (similarity + similarity.T) / 2
    found = zip_units(similarity, [12, 12], 8, alpha=0.5, beta=1.0)
    assert found.equal(copying(similarity, [12, 12], 8, 0.5, 1.0))


def test_by_hand():
    table = torch.tensor([[1.0, 0.9, 0.2, 0.8], [0.9, 1, 0.1, 0.3], [0.2, 0.1, 1, 0.5], [0.8, 0.3, 0.5, 1]])
    assert zip_units(table, [2, 2], 2, beta=0.0).tolist() == [0, 1, 1, 0]  # 0 with 3, then 1 with 2
    assert zip_units(table, [2, 2], 2, beta=1.0).tolist() == [0, 0, 1, 1]  # each within its network
    assert zip_units(table, [4], 2, alpha=1.0, beta=1.0).tolist() == [0, 0, 1, 1]


def test_a_permuted_copy_zips_to_the_network_itself():
    torch.manual_seed(0)
    module, example = MLP(8, (20, 14)).double(), torch.randn(300, 8).double()
    spaces = trace(module, example[:2])
    tensors = dict(module.state_dict())
    moved = {name: type(m)(m.index) for name, m in spaces.random_symmetry(1).maps.items()}
    donor = type(spaces.random_symmetry(1))(spaces, spaces, moved).carry(tensors)
    other = MLP(8, (20, 14)).double()
    other.load_state_dict(donor)
    both = [module, other]
    tables = [[collect(a, b, spaces, spaces, [example]) for b in both] for a in both]
    joint = {n: torch.cat([torch.cat([one[n] for one in row], 1) for row in tables]) for n in tables[0][0]}
    mean = zip_networks(spaces, [tensors, donor], joint, beta=0.0)
    outputs = outputs_of(module, example)
    torch.testing.assert_close(outputs(mean), outputs(tensors), rtol=1e-8, atol=1e-9)


def test_a_unit_merged_within_one_network():
    """Two equal units of the first become one, which leaves room for a unit of the second alone."""
    module = MLP(2, (2,), 1, bias=False).double()
    spaces = trace(module, torch.randn(2, 2))
    first = {"hidden.0.weight": torch.tensor([[1.0, 0], [1, 0]]), "head.weight": torch.tensor([[1.0, 1]])}
    second = {"hidden.0.weight": torch.tensor([[1.0, 0], [0, 1]]), "head.weight": torch.tensor([[2.0, 4]])}
    table = torch.tensor([[1.0, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [0, 0, 0, 1]])
    found = zip_networks(spaces, [first, second], {"hidden.0": table}, alpha=1.0, beta=1.0)
    assert found["hidden.0.weight"].tolist() == [[1, 0], [0, 1]] and found["head.weight"].tolist() == [[2, 2]]


def test_bad_input_gets_a_sentence():
    eye = torch.eye(4)
    with pytest.raises(ValueError, match="do not fit networks of"):
        zip_units(eye, [2, 3])
    with pytest.raises(ValueError, match="until is in 1 to 4"):
        zip_units(eye, [2, 2], 5)
    with pytest.raises(ValueError, match="not finite"):
        zip_units(eye * torch.nan, [2, 2])
    with pytest.raises(ValueError, match="not symmetric"):
        zip_units(torch.tensor([[1.0, 0.5], [0.2, 1]]), [1, 1])
    with pytest.raises(ValueError, match="3 units are left in place of 1, and none of them may merge"):
        zip_units(eye, [2, 2], 1, alpha=0.0, beta=0.0)
