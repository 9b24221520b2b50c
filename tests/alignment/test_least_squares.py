"""Least squares and repair after averaging: normal equations against lstsq, limits, statistics as they should be."""

import copy

import pytest
import torch
from torch import nn

from alignment.least_squares import Normal, least_squares
from alignment.repair import output_moments, repair, reset_statistics
from tests.plain_networks import MLP, VGG, ResNet, image, randomised


def normal(x, y, batch=13):
    made = Normal.empty(x.shape[1], y.shape[1])
    for one, other in zip(x.split(batch), y.split(batch)):
        made.update(one, other)
    return made


def test_normal_equations_are_lstsq_and_a_ridge_goes_to_the_start():
    torch.manual_seed(0)
    x, y, start = torch.randn(100, 6).double(), torch.randn(100, 3).double(), torch.randn(3, 6).double()
    made = normal(x, y)
    torch.testing.assert_close(made.solve(start, 0.0), torch.linalg.lstsq(x, y).solution.T, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(made.solve(start, 1e12), start)
    losses = [float((x @ made.solve(start, ridge).T - y).square().sum()) for ridge in (0.0, 0.1, 1.0, 100.0)]
    assert losses == sorted(losses) and losses[-1] < float((x @ start.T - y).square().sum())
    x[:, 2] = 0
    assert normal(x, y).solve(start, 0.0)[:, 2].equal(start[:, 2])
    with pytest.raises(ValueError, match="5 samples do not determine a layer of 6 inputs"):
        normal(x[:5], y[:5]).solve(start, 0.0)
    with pytest.raises(ValueError, match="must not be negative"):
        made.solve(start, -1.0)
    with pytest.raises(ValueError, match="not finite"):
        made.update(x * torch.nan, y)
    gram = torch.tensor([[1.0, 1.0], [1.0, 1.0 - 1e-7]]).double()  # two that are one, summed in float32
    with pytest.raises(ValueError, match="inputs of a layer depend on each other.*larger ridge is needed; given: 0.0"):
        Normal(gram, gram[:1], 5).solve(torch.zeros(1, 2), 0.0)


def twins(make, seeds=(0, 1)):
    made = []
    for seed in seeds:
        torch.manual_seed(seed)
        made.append(randomised(make(), seed).double())
    merged, states = copy.deepcopy(made[0]), [dict(one.state_dict()) for one in made]
    merged.load_state_dict({n: (t + states[1][n]) / 2 if t.is_floating_point() else t for n, t in states[0].items()})
    return merged, made, states


@pytest.mark.parametrize("inputs", ["merged", "mean", "own"])
@pytest.mark.parametrize("make,data", [(lambda: MLP(8, (12, 9)), image(1, 8, 64)[:, 0, 0]), (VGG, image(3, 8, 40))])
def test_a_network_merged_with_itself_stays_what_it_is(make, data, inputs):
    merged, _, states = twins(make, (0, 0))
    batches = list(data.double().split(20))
    before = merged(batches[0])
    assert least_squares(merged, states, batches, inputs=inputs) == []
    torch.testing.assert_close(merged(batches[0]), before, rtol=1e-7, atol=1e-9)


def test_the_last_layer_is_nearer_the_ensemble_than_the_average():
    merged, made, states = twins(lambda: MLP(8, (12, 9)))
    data = image(1, 8, 200)[:, 0, 0].double()
    ensemble = (made[0](data) + made[1](data)) / 2
    before = float((merged(data) - ensemble).square().mean())
    least_squares(merged, states, list(data.split(50)))
    assert float((merged(data) - ensemble).square().mean()) < 0.7 * before


def test_regmean_is_its_formula():
    merged, made, states = twins(lambda: MLP(8, (12,), bias=False))
    data = image(1, 8, 200)[:, 0, 0].double()
    least_squares(merged, states, [data], inputs="own", ridge=0.0)
    hidden = [torch.relu(one.hidden[0](data)) for one in made]
    grams = [x.mT @ x for x in hidden]
    wanted = sum(one.head.weight @ gram for one, gram in zip(made, grams)) @ torch.linalg.pinv(sum(grams))
    torch.testing.assert_close(merged.head.weight, wanted, rtol=1e-6, atol=1e-7)


def test_a_residual_network_with_batch_norm():
    merged, made, states = twins(lambda: ResNet((6, 8), 1))
    batches = list(image(1, 8, 60).double().split(30))
    ensemble = (made[0](batches[0]) + made[1](batches[0])) / 2
    reset_statistics(merged, batches)
    before = float((merged(batches[0]) - ensemble).square().mean())
    assert least_squares(merged, states, batches) == []
    assert float((merged(batches[0]) - ensemble).square().mean()) < before
    with pytest.raises(ValueError, match="inputs are 'merged', 'mean' or 'own'"):
        least_squares(merged, states, batches, inputs="theirs")
    with pytest.raises(ValueError, match="no samples"):
        least_squares(merged, states, [])


def test_statistics_are_reset():
    module = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, momentum=0.3)).double()
    batches = list(torch.randn(60, 4, generator=torch.Generator().manual_seed(0)).double().split(20))
    reset_statistics(module, batches)
    outs = [module[0](one) for one in batches]
    torch.testing.assert_close(module[1].running_mean, torch.stack([x.mean(0) for x in outs]).mean(0))
    torch.testing.assert_close(module[1].running_var, torch.stack([x.var(0) for x in outs]).mean(0))
    assert module[1].momentum == 0.3 and module.training
    with pytest.raises(ValueError, match="no samples"):
        reset_statistics(module, [])


@pytest.mark.parametrize("make,data", [(lambda: MLP(8, (12, 9)), image(1, 8, 90)[:, 0, 0]), (VGG, image(3, 8, 40))])
def test_repaired_units_have_the_mean_of_means_and_deviations(make, data):
    merged, made, states = twins(make)
    batches = list(data.double().split(30))
    repair(merged, states, batches, [0.25, 0.75])
    found, ends = output_moments(merged, batches), [output_moments(one, batches) for one in made]
    for name in list(found)[:-1]:
        for number in (0, 1):
            goal = 0.25 * ends[0][name][number] + 0.75 * ends[1][name][number]
            torch.testing.assert_close(found[name][number], goal, rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="as many weights that sum to 1"):
        repair(merged, states, batches, [1.0])
    with pytest.raises(ValueError, match="no samples"):
        repair(merged, states, [])


def test_a_frozen_layer_stays_frozen():
    """A BatchNorm in evaluation mode inside a network in training mode is so afterwards, too."""
    merged, _, states = twins(lambda: ResNet((6, 8), 1))
    next(one for one in merged.train().modules() if isinstance(one, nn.BatchNorm2d)).eval()
    modes = [one.training for one in merged.modules()]
    assert modes.count(False) == 1
    least_squares(merged, states, [image(1, 8, 30).double()])
    assert [one.training for one in merged.modules()] == modes
