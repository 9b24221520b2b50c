"""Planted copies are found again: exactly without noise, nearly all units with noise of 1 % of the weights' scale."""

import itertools

import pytest
import torch

from alignment import Maps, align, find_family
from alignment._balance import balance
from alignment._heads import assign_heads
from alignment.features.weights import weights
from alignment.maps import Index, Turn
from alignment.match.hungarian import hungarian
from alignment.match.procrustes import procrustes
from alignment.verify import double
from alignment.vocab import VocabMap
from tests.bench.planted import planted as planted_copy
from tests.networks import CASES, network

PLANTED = [
    (*case, folded)
    for case in CASES
    for folded in (False, True)
    if not (folded and (case[0] == "bert" or case == ("opt", 2)))
]


def planted(case, noise: float, seed: int = 5):
    """A network, a noisy copy carried by a random symmetry, that symmetry, the spaces and the logits."""
    config, tensors, outputs = network(case[0], case[1], folded=case[2])
    spaces = find_family(config)
    generator = torch.Generator().manual_seed(3)
    gains = {norm.gain for norm in spaces.norms} if case[2] else set()  # a folded gain is one
    noisy = {}
    for name, tensor in tensors.items():
        random = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        noisy[name] = tensor if name in gains else tensor + noise * rms(tensor) * random
    symmetry = spaces.random_symmetry(seed)
    return spaces, tensors, symmetry.carry(noisy), symmetry, outputs


def rms(tensor: torch.Tensor) -> float:
    return float(tensor.square().mean().sqrt())


@pytest.mark.parametrize("case", PLANTED, ids=lambda case: "-".join(map(str, case)))
def test_a_planted_copy_is_found(case):
    spaces, tensors, donor, symmetry, outputs = planted(case, 0.0)
    maps = align(tensors, donor, spaces, spaces)
    maps.check(spaces)
    back = maps.carry(donor)
    with double():
        reference = outputs(tensors)
        assert float((outputs(back) - reference).abs().max()) < 1e-9
        assert float((outputs(donor) - reference).abs().max()) < 1e-9
    for name, tensor in tensors.items():  # a merge of the two, with any weights, is the target
        torch.testing.assert_close(back[name], tensor, rtol=1e-9, atol=1e-11)
    assert recovered(maps, symmetry) == 1.0


@pytest.mark.parametrize("case", PLANTED, ids=lambda case: "-".join(map(str, case)))
def test_a_planted_copy_with_noise_is_found(case):
    spaces, tensors, donor, symmetry, outputs = planted(case, 0.01)
    maps = align(tensors, donor, spaces, spaces)
    assert recovered(maps, symmetry) >= 0.99
    back = maps.carry(donor)
    for name, tensor in tensors.items():
        if tensor.norm() > 0:
            assert float((back[name] - tensor).norm() / tensor.norm()) < 0.03, name
    with double():
        assert float((outputs(back) - outputs(donor)).abs().max()) < 1e-9


def recovered(maps: Maps, symmetry: Maps) -> float:
    """The share of units of discrete spaces that come back to where they were."""
    both = [map for map in maps.after(symmetry).maps.values() if isinstance(map, Index)]
    right = [(map.index == torch.arange(map.index.shape[-1])).flatten() for map in both]
    return float(torch.cat(right).double().mean())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "case", [("llama", 0, True), ("gemma3_text", 0, False), ("gpt2", 0, True), ("mixtral", 0, False)]
)
def test_a_network_is_its_own_counterpart_bit_by_bit(case, dtype):
    config, tensors, _ = network(case[0], case[1], folded=case[2])
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    spaces = find_family(config)
    back = align(tensors, tensors, spaces, spaces).carry(tensors)
    assert all(back[name].equal(tensors[name]) for name in tensors)


@pytest.mark.parametrize("case", [("llama", 0, True), ("gpt_neox", 0, False)], ids=lambda case: case[0])
def test_it_does_not_matter_in_which_units_either_network_is_given(case):
    config, one, outputs = network(case[0], case[1], seed=0, folded=case[2])
    _, other, _ = network(case[0], case[1], seed=1, folded=case[2])
    spaces = find_family(config)
    plain = align(one, other, spaces, spaces)
    g, h = spaces.random_symmetry(11), spaces.random_symmetry(12)
    moved = align(g.carry(one), h.carry(other), spaces, spaces)
    first, second = plain.carry(other), g.inverse().carry(moved.carry(h.carry(other)))
    with double():
        mean = outputs({name: (one[name] + first[name]) / 2 for name in one})
        again = outputs({name: (one[name] + second[name]) / 2 for name in one})
    torch.testing.assert_close(again, mean, rtol=1e-6, atol=1e-8)


def test_experts_a_tensor_each_are_met_by_a_stack():
    spaces, tensors, donor, symmetry, _ = planted(("qwen3_moe", 0, False), 0.0)
    apart = {}
    for name, tensor in donor.items():
        if name.endswith("gate_up_proj"):
            for number, both in enumerate(tensor):
                stem = name.replace("gate_up_proj", str(number))
                apart[f"{stem}.gate_proj.weight"], apart[f"{stem}.up_proj.weight"] = both.chunk(2)
        elif name.endswith("experts.down_proj"):
            apart.update({name.replace("down_proj", f"{n}.down_proj.weight"): one for n, one in enumerate(tensor)})
        else:
            apart[name] = tensor
    maps = align(tensors, apart, spaces, spaces)
    assert recovered(maps, symmetry) == 1.0
    back = maps.carry(apart)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        torch.testing.assert_close(back[name], tensor, rtol=1e-9, atol=1e-11)


def test_gains_of_queries_and_keys_may_have_other_signs():
    config, tensors, outputs = network("gemma3_text")
    spaces = find_family(config)
    scale = torch.tensor([-1.5, 0.5, -0.7, 2.0], dtype=torch.complex128)
    flip = Maps(spaces, spaces, {"layers.1.qk_norm": Turn(scale)})
    flip.check(spaces)
    donor = flip.carry(tensors)
    back = align(tensors, donor, spaces, spaces).carry(donor)
    with double():
        torch.testing.assert_close(outputs(donor), outputs(tensors), rtol=1e-10, atol=1e-12)
    for name, tensor in tensors.items():
        torch.testing.assert_close(back[name], tensor, rtol=1e-9, atol=1e-11)


def test_float32():
    spaces, tensors, donor, symmetry, outputs = planted(("llama", 0, True), 0.0)
    low = [{name: tensor.float() for name, tensor in one.items()} for one in (tensors, donor)]
    back = align(*low, spaces, spaces).carry(low[1])
    reference = outputs(low[0])
    assert float((outputs(back) - reference).abs().max() / reference.abs().max()) < 1e-4


def test_alignment_raises_the_likeness_of_networks_trained_apart():
    config, one, _ = network("llama", 0, seed=0)
    _, other, _ = network("llama", 0, seed=1)
    spaces = find_family(config)
    maps = align(one, other, spaces, spaces)
    maps.check(spaces)
    back = maps.carry(other)

    def gap(given):
        return sum(float((one[name] - given[name]).square().sum()) for name in one if "norm" not in name)

    assert gap(back) < gap(other)


def test_vocabularies_correspond_by_rows():
    spaces, tensors, donor, symmetry, _ = planted(("llama", 0, False), 0.0)
    order = torch.randperm(61, generator=torch.Generator().manual_seed(0))
    shuffled = {**donor, **{name: donor[name][order] for name in ("model.embed_tokens.weight", "lm_head.weight")}}
    rows = (order[:50], torch.arange(50))
    maps = align(tensors, shuffled, spaces, spaces, vocab=rows)
    assert recovered(maps, symmetry) == 1.0
    index = torch.full((61,), -1)
    index[:50] = order[:50]  # the donor's token i is the target's order[i]
    maps = align(tensors, shuffled, spaces, spaces, vocab=VocabMap(index, torch.arange(61), 61))
    assert recovered(maps, symmetry) == 1.0
    carried = maps.carry(shuffled, into=tensors)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):  # whose rows are in the donor's order
        assert carried[name].equal(tensors[name])


def test_layers_correspond_as_given():
    config, tensors, _ = network("llama")
    spaces = find_family(config)
    swapped = {}
    for name, tensor in tensors.items():
        swapped[name.replace("layers.0.", "layers.x.").replace("layers.1.", "layers.0.").replace("x.", "1.")] = tensor
    maps = align(tensors, swapped, spaces, spaces, layers={0: 1, 1: 0})
    back = maps.carry(swapped)
    assert all(back[name].equal(tensors[name]) for name in tensors)
    half = align(tensors, swapped, spaces, spaces, layers={0: 1})
    with pytest.raises(ValueError, match="no counterpart of layers.1"):
        half.carry(swapped)
    carried = half.carry(swapped, into=tensors)
    assert all(carried[name].equal(tensors[name]) for name in tensors)


def test_features_given_by_space_decide():
    config, tensors, _ = network("llama")
    spaces = find_family(config)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    similarity = torch.zeros(40, 40).index_put_((torch.arange(40), order), torch.ones(40))
    maps = align(tensors, tensors, spaces, spaces, features={"layers.1.mlp": similarity})
    assert maps.maps["layers.1.mlp"].index.equal(order) and maps.maps["layers.0.mlp"].index.equal(torch.arange(40))
    maps.check(spaces)
    with pytest.raises(ValueError, match="'layers.0.vo', and spaces with its group, or within others, go by weights"):
        align(tensors, tensors, spaces, spaces, features={"layers.0.vo": similarity})
    with pytest.raises(ValueError, match="no space of the target"):
        align(tensors, tensors, spaces, spaces, features={"layers.7.mlp": similarity})


def test_bad_input_gets_a_sentence():
    config, tensors, _ = network("llama")
    spaces = find_family(config)
    with pytest.raises(ValueError, match="unknown match word 'hungarain'.*did you mean 'hungarian'"):
        align(tensors, tensors, spaces, spaces, match="hungarain")
    with pytest.raises(ValueError, match="features 'activations' come from a model and its data"):
        align(tensors, tensors, spaces, spaces, features="activations")
    broken = {**tensors, "model.norm.weight": torch.full((24,), torch.nan).double()}
    with pytest.raises(ValueError, match="model.norm.weight holds nan or infinity"):
        align(tensors, broken, spaces, spaces)
    bloom, blooms, _ = network("bloom")
    with pytest.raises(ValueError, match="space 'residual' is 24 units"):
        align(tensors, blooms, spaces, find_family(bloom))
    with pytest.raises(ValueError, match="'layers.0.kv': what is within its units .* this matcher gives a coupling"):
        align(tensors, tensors, spaces, spaces, features={"layers.0.kv": torch.eye(2)}, match="emd")


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.parametrize("folded", [False, True], ids=["as given", "folded"])
def test_a_noisy_copy_of_a_real_network_is_found(folded, smollm2):
    found = planted_copy(smollm2, folded)
    assert found.seconds < 180
    assert found.back >= 0.99 * found.units and found.units > 46000
    assert found.error < 0.03, found.worst


@pytest.mark.parametrize("seed", range(6))
def test_hungarian_is_exact(seed):
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(5, 5, generator=generator)
    if seed % 2:
        table += 4 * torch.eye(5)[torch.randperm(5, generator=generator)]  # mutual bests for most
    best = max(sum(float(table[i, j]) for i, j in enumerate(order)) for order in itertools.permutations(range(5)))
    found = hungarian(table)
    assert sorted(found.tolist()) == list(range(5))
    assert float(table[torch.arange(5), found].sum()) == pytest.approx(best)


def test_hungarian_by_hand():
    assert hungarian(torch.tensor([[10.0, 9.0], [9.0, 0.0]])).tolist() == [1, 0]  # the mutual best pair is not in it
    assert hungarian(torch.tensor([[1.0, 5.0, 2.0]])).tolist() == [1]
    assert hungarian(torch.tensor([[1.0], [5.0], [2.0]])).tolist() == [-1, 0, -1]
    with pytest.raises(ValueError, match="not finite"):
        hungarian(torch.tensor([[torch.nan]]))


def test_procrustes_by_hand():
    quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    torch.testing.assert_close(procrustes(quarter @ torch.diag(torch.tensor([3.0, 2.0]))), quarter.double())
    found = procrustes(torch.randn(4, 5, 5, generator=torch.Generator().manual_seed(0)), fixing_ones=True)
    torch.testing.assert_close(found.sum(-1), torch.ones(4, 5).double())
    torch.testing.assert_close(found @ found.mT, torch.eye(5).double().expand(4, 5, 5))
    with pytest.raises(ValueError, match="not finite"):
        procrustes(torch.full((2, 2), torch.inf))


def test_features_by_weights_do_not_depend_on_a_tensors_scale():
    rows = torch.randn(2, 1, 4, 3, generator=torch.Generator().manual_seed(0))
    pair = (rows[0], rows[1])
    torch.testing.assert_close(weights([pair]), weights([(100 * rows[0], rows[1] / 7)]))
    torch.testing.assert_close(weights([pair, pair]), 2 * weights([pair]))
    assert weights([(torch.zeros(1, 4, 3), rows[1])]).eq(0).all()


def test_balanced_units_are_even():
    config, tensors, _ = network("gpt2")
    spaces = find_family(config)
    blocks = {part.key: part.read(tensors) for part in spaces.parts}
    carried = Maps(spaces, spaces, balance(spaces, blocks)).carry(tensors)
    block = {part.key: part.read(carried) for part in spaces.parts}
    v = torch.cat([block["layers.0.v.weight"], block["layers.0.v.bias"][None]]).movedim(0, -1)  # (heads, size, F)
    o = block["layers.0.o.weight"][:, 0]  # (heads, size, F)
    torch.testing.assert_close(v @ v.mT, o @ o.mT)


def test_heads_go_with_their_groups():
    similarity = torch.zeros(2, 2, 2, 2)
    similarity[0, 0, 1, 1] = similarity[0, 1, 1, 0] = similarity[1, 0, 0, 0] = similarity[1, 1, 0, 1] = 1
    outer, inside = assign_heads(similarity, fixed=False)
    assert outer.tolist() == [1, 0] and inside.tolist() == [[1, 0], [0, 1]]
    assert assign_heads(similarity, fixed=True)[0].tolist() == [0, 1]
