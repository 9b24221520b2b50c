"""Units kept apart: all of them are the ensemble, none is the average; budgets, least squares between, bad input."""

import copy
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from alignment import trace
from alignment.apart import keep_apart, partly, spend
from alignment.least_squares import least_squares
from tests.plain_networks import MLP, VGG, Grouped, ResNet, image, randomised


class Shared(nn.Module):
    """A layer in two places: the same module called twice, or another one with its weights."""

    def __init__(self, twins):
        super().__init__()
        self.first, self.again, self.head = nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.twin = nn.Linear(6, 6) if twins else self.again
        self.twin.weight, self.twin.bias = self.again.weight, self.again.bias

    def forward(self, x):
        return self.head(F.relu(self.twin(F.relu(self.again(F.relu(self.first(x)))))))


class Voxels(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.norm, self.two = nn.Conv3d(2, 5, 3, padding=1), nn.BatchNorm3d(5), nn.Conv3d(5, 4, 2)

    def forward(self, x):
        return self.two(F.relu(self.norm(self.one(x))))


def voxels(count):
    return torch.randn(count, 2, 3, 3, 3, generator=torch.Generator().manual_seed(0))


def pair(make, seeds=(0, 1)):
    made = []
    for seed in seeds:
        torch.manual_seed(seed)
        made.append(randomised(make(), seed).double())
    return made, [dict(one.state_dict()) for one in made]


@pytest.mark.parametrize(
    "make,data",
    [
        (lambda: MLP(8, (12, 9)), image(1, 8, 50)[:, 0, 0]),
        (VGG, image(3, 8, 30)),
        (lambda: ResNet((6, 8), 1), image(1, 8, 30)),
        (lambda: Shared(False), image(1, 8, 50)[:, 0, 0]),
        (lambda: Shared(True), image(1, 8, 50)[:, 0, 0]),
        (Voxels, voxels(30)),
    ],
    ids=["mlp", "vgg", "resnet", "called twice", "twins", "voxels"],
)
def test_all_units_apart_are_the_mean_of_outputs(make, data):
    data = data.double()
    made, states = pair(make)
    wide, groups = partly(made[0], trace(made[0], data[:2]), states, [data], flops=4.0)
    assert all(len(unit.unique()) == len(unit) for unit in groups.values())
    torch.testing.assert_close(wide(data), (made[0](data) + made[1](data)) / 2)


def test_three_networks_apart():
    data = image(1, 8, 50)[:, 0, 0].double()
    made, states = pair(lambda: MLP(8, (12, 9)), (0, 1, 2))
    wide, groups = partly(made[0], trace(made[0], data[:2]), states, [data], flops=9.0)
    assert wide.hidden[0].out_features == 36 and wide.head.in_features == 27
    torch.testing.assert_close(wide(data), torch.stack([one(data) for one in made]).mean(0))


def multiplications(module):
    return sum(one.weight.numel() for one in module.modules() if isinstance(one, torch.nn.Linear))


def test_a_budget_is_kept_and_spent():
    data = image(1, 8, 200)[:, 0, 0].double()
    made, states = pair(lambda: MLP(8, (30, 20)))
    spaces = trace(made[0], data[:2])
    ensemble = (made[0](data) + made[1](data)) / 2
    errors = []
    for flops in (1.0, 1.5, 2.0):
        wide, groups = partly(made[0], spaces, states, [data], flops=flops)
        assert flops - 0.06 < multiplications(wide) / multiplications(made[0]) <= flops
        left = least_squares(wide, states, [data], spaces=spaces, groups=groups)
        errors.append(float((wide(data) - ensemble).square().mean().detach()))
        assert left == []
    assert errors[0] > errors[1] > errors[2]
    same, groups = partly(made[0], spaces, [states[0], states[0]], [data], flops=2.0)
    assert groups == {} and same(data).equal(made[0](data))  # units that agree need no second one


@pytest.mark.parametrize("twins", [False, True], ids=["called twice", "twins"])
def test_a_layer_in_two_places_is_paid_for_twice_and_stays_one(twins):
    data = image(1, 8, 50)[:, 0, 0].double()
    made, states = pair(lambda: Shared(twins))
    spaces = trace(made[0], data[:2])
    for flops in (1.3, 1.7, 2.4):  # one network: 8 * 6 + 2 * 6 * 6 + 6 * 3 multiplications
        wide, groups = partly(made[0], spaces, states, [data], flops=flops)
        n, _ = wide.first.weight.shape
        assert n > 6 and n * (8 + 2 * n + 3) <= flops * 138 < (n + 1) * (8 + 2 * (n + 1) + 3)
        assert wide.twin.weight is wide.again.weight and wide.twin.bias is wide.again.bias
    left = least_squares(wide, states, [data], spaces=spaces, groups=groups)
    assert left == (["again", "twin"] if twins else ["again"])
    assert wide.twin.weight is wide.again.weight


def test_convolutions_in_space_count_and_grow():
    data = voxels(30).double()
    made, states = pair(Voxels)
    wide, groups = partly(made[0], trace(made[0], data[:2]), states, [data], flops=1.5)
    assert wide.one.out_channels == wide.two.in_channels == wide.norm.num_features == 7  # 1.4 times, 1.6 is too much


def test_the_least_alike_go_apart_by_what_they_cost():
    assert keep_apart(torch.tensor([0.9, 0.1, 0.8, 0.2]), 2, 2).tolist() == [0, 1, 2, 3, 0, 4, 2, 5]
    assert keep_apart(torch.tensor([0.9, 0.1]), 1, 3).tolist() == [0, 1, 0, 2, 0, 3]
    module = MLP(1, (4, 4), 1, bias=False).double()
    spaces = trace(module, torch.randn(2, 1).double())
    positions = {f"{name}.weight": 1 for name in ("hidden.0", "hidden.1", "head")}
    # 4 + 16 + 4 = 24 multiplications; a unit of the first, or of the second, adds 1 + 4
    alike = {"hidden.0": torch.tensor([0.0, 1, 1, 1]), "hidden.1": torch.tensor([0.5, 0.5, 1, 1])}
    assert spend(spaces, alike, positions, 29 / 24) == {"hidden.0": 1, "hidden.1": 0}
    # beside it one of the second adds 5 + 1
    assert spend(spaces, alike, positions, 34.9 / 24) == {"hidden.0": 1, "hidden.1": 0}
    assert spend(spaces, alike, positions, 35 / 24) == {"hidden.0": 1, "hidden.1": 1}
    assert spend(spaces, alike, positions, 4) == {"hidden.0": 1, "hidden.1": 2}
    for budget in range(24, 60):  # as good as the best of all choices
        counts = spend(spaces, alike, positions, budget / 24)
        fits = [
            one + 0.5 * two
            for one, two in product(range(2), range(3))
            if 4 + one + (4 + one) * (4 + two) + 4 + two <= budget
        ]
        assert counts["hidden.0"] + 0.5 * counts["hidden.1"] == max(fits), budget


def test_bad_input_gets_a_sentence():
    data = image(3, 8, 20).double()
    made, states = pair(Grouped)
    spaces = trace(made[0], data[:2])
    with pytest.raises(ValueError, match="flops is 5; 1 is one network, and 4 all units"):
        partly(made[0], spaces, states, [data], flops=5)
    with pytest.raises(ValueError, match="and a Conv2d cannot grow|and a GroupNorm cannot grow"):
        partly(made[0], spaces, states, [data], flops=4)
    made, states = pair(lambda: MLP(8, (12,)))
    table = trace(made[0], data[:2, 0, 0])
    wide, groups = partly(made[0], table, states, [data[:, 0, 0]], flops=2)
    with pytest.raises(ValueError, match="have no part in a network's own inputs"):
        least_squares(copy.deepcopy(wide), states, [data[:, 0, 0]], inputs="own", spaces=table, groups=groups)
