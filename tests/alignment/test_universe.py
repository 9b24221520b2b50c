"""Several networks in one universe: planted copies are found, no order of the networks matters, likeness only grows."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file

from alignment import align, find_family, trace, universe
from alignment._frank_wolfe import _top, climb
from alignment._joint import Joint
from alignment.maps import Index
from alignment.spaces import Axis, Part, Space, Spaces
from alignment.universe import _balanced, between
from alignment.verify import double
from tests.networks import network
from tests.plain_networks import MLP

SMALL = [("llama", 0, True), ("gpt2", 0, False), ("gemma3_text", 0, False), ("mixtral", 0, False)]


def planted(case, count=3, noise=0.01):
    """A network, noisy copies of it in units of their own, and the spaces."""
    config, tensors, outputs = network(case[0], case[1], folded=case[2])
    spaces = find_family(config)
    gains = {norm.gain for norm in spaces.norms} if case[2] else set()
    generator = torch.Generator().manual_seed(3)
    found = []
    for number in range(count):
        noisy = {
            name: one
            if name in gains
            else one + noise * float(one.square().mean().sqrt()) * torch.randn(one.shape, generator=generator).double()
            for name, one in tensors.items()
        }
        found.append(spaces.random_symmetry(number).carry(noisy))
    return spaces, tensors, found, outputs


@pytest.mark.parametrize("case", SMALL, ids=lambda case: "-".join(map(str, case)))
def test_planted_copies_meet_in_one_universe(case):
    spaces, tensors, copies, outputs = planted(case)
    maps = universe(copies, spaces, steps=2)
    for one, own in zip(copies, maps):
        own.check(spaces)
        with double():
            torch.testing.assert_close(outputs(own.carry(one)), outputs(one), rtol=1e-9, atol=1e-9)
    for (i, one), (j, other) in itertools.permutations(enumerate(copies), 2):
        carried = between(maps[i], maps[j]).carry(other)
        for name, tensor in one.items():
            if tensor.norm() > 0:
                assert float((carried[name] - tensor).norm() / tensor.norm()) < 0.06, (i, j, name)


def apart(seed, count=3):
    """Small MLPs of random weights, with the table of their spaces."""
    torch.manual_seed(seed)
    modules = [MLP(6, (12, 8), 4) for _ in range(count)]
    return [{name: one.double() for name, one in module.state_dict().items()} for module in modules], trace(
        modules[0], torch.randn(3, 6)
    )


def likeness(networks):
    return sum(
        float((one[name] / one[name].norm() * (other[name] / other[name].norm())).sum() * one[name].numel())
        for one, other in itertools.combinations(networks, 2)
        for name in one
    )


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 0, 1), (2, 1, 0)], ids=str)
def test_the_order_of_networks_does_not_matter(order):
    networks, spaces = apart(0)
    maps = universe(networks, spaces, steps=3)
    again = universe([networks[number] for number in order], spaces, steps=3)
    for number, one in zip(order, again):
        for name, map in maps[number].maps.items():
            assert map.index.equal(one.maps[name].index)
            assert map.scale is None or map.scale.equal(one.maps[name].scale)


@pytest.mark.parametrize("seed", range(2))
def test_networks_are_liker_each_other_than_each_aligned_to_one(seed):
    networks, spaces = apart(seed)
    maps = universe(networks, spaces)
    even, blocks = _balanced(networks, spaces)
    balanced = [one.carry(network) for one, network in zip(even, networks)]
    found = likeness([one.carry(network) for one, network in zip(maps, networks)])
    for target in range(3):
        others = [align(balanced[target], one, spaces, spaces, sweeps=20).carry(one) for one in balanced]
        assert found >= likeness(others) - 1e-9
    assert found > likeness(balanced)


def test_frank_wolfe_finds_what_turns_alone_do_not():
    networks, spaces = apart(1)
    found = [
        likeness([one.carry(network) for one, network in zip(universe(networks, spaces, steps=steps), networks)])
        for steps in (0, 20)
    ]
    assert found[1] > 1.01 * found[0]


def test_going_around_leads_back():
    networks, spaces = apart(1)
    a, b, c = universe(networks, spaces, steps=2)
    around = between(a, b).after(between(b, c))
    straight = between(a, c)
    for name, map in straight.maps.items():
        assert map.index.equal(around.maps[name].index)
        torch.testing.assert_close(map.scale, around.maps[name].scale)
    own = between(a, a).carry(networks[0])
    assert all(own[name].equal(tensor) for name, tensor in networks[0].items())


def test_frank_wolfe_by_hand():
    assert _top([1 - (t - 0.3) ** 2 for t in (0, 0.5, 1)]) == pytest.approx((0.3, 1.0))
    assert _top([0.0, 1.0, 2.0]) == pytest.approx((1.0, 2.0)) and _top([3.0, 1.0, 2.0])[0] == 0
    part = Part("w", ("w",), (3, 3), (3, 3), (), (Axis(3, "units", "w"), Axis(3)))
    spaces = Spaces("hand", (Space("units", 3, "permutation"),), (part,))
    order = torch.tensor([1, 2, 0])
    eye = torch.eye(3, dtype=torch.float64)
    joint = Joint(spaces, [{"w": eye[order]}, {"w": eye}, {"w": eye}])
    start = [{}, {}, {}]
    assert joint.likeness(start) == 3.0  # of 9: two of three networks agree
    maps = climb(spaces, start, joint.best, joint.likeness, 20)
    assert joint.likeness(maps) == 9.0
    assert maps[1]["units"].index.equal(maps[2]["units"].index)


@pytest.mark.real
@pytest.mark.slow
def test_three_noisy_copies_of_a_real_network_meet(smollm2):
    tensors = {name: one.float() for name, one in load_file(smollm2 / "model.safetensors").items()}
    spaces = find_family(json.loads((smollm2 / "config.json").read_text()), frozenset(tensors))
    generator = torch.Generator().manual_seed(0)
    symmetries, copies = [spaces.random_symmetry(seed) for seed in range(3)], []
    for symmetry in symmetries:
        noise = {name: torch.randn(one.shape, generator=generator) for name, one in tensors.items()}
        noisy = {name: one + 0.01 * one.square().mean().sqrt() * noise[name] for name, one in tensors.items()}
        copies.append(symmetry.carry(noisy))
    maps = universe(copies, spaces)
    for target, donor in ((0, 1), (1, 2)):
        found, wanted = between(maps[target], maps[donor]), symmetries[target].after(symmetries[donor].inverse())
        moved = [name for name, map in wanted.maps.items() if isinstance(map, Index)]
        assert all(found.maps[name].index.equal(wanted.maps[name].index) for name in moved)
        assert sum(found.maps[name].index.numel() for name in moved) == 47016
        back = found.carry(copies[donor])
        assert max(float((back[name] - one).norm() / one.norm()) for name, one in copies[target].items()) < 0.016


def test_bad_input_gets_a_sentence():
    networks, spaces = apart(0)
    with pytest.raises(ValueError, match="universe: 1 network is given"):
        universe(networks[:1], spaces)
    with pytest.raises(ValueError, match="head.weight has shape"):
        universe([networks[0], {**networks[1], "head.weight": torch.zeros(4, 9)}], spaces)
    with pytest.raises(ValueError, match="head.bias holds nan or infinity"):
        universe([networks[0], {**networks[1], "head.bias": torch.full((4,), torch.nan)}], spaces)
