"""Layers of networks of different depth: by hand, against all monotone matchings, and on planted copies."""

import itertools

import pytest
import torch

from alignment import align, find_family
from alignment.layers import LinearCKA, layer_types, match_layers, types_of_both
from alignment.verify import double
from tests.networks import network


def test_by_hand():
    table = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.3, 0.8]])
    assert match_layers(table) == {0: 0, 1: 2}
    assert match_layers(table, least=0.85) == {0: 0}
    assert match_layers(table - 1) == {} == match_layers(table - 1, least=-9)
    assert match_layers(table - 1, gap=1.0, least=-9) == {0: 0, 1: 2}
    assert match_layers(table, types=(["local", "global"], ["global", "local", "global"])) == {0: 1, 1: 2}
    assert match_layers(torch.eye(3).flip(1), least=0.5) in ({0: 2}, {1: 1}, {2: 0})  # order is kept
    with pytest.raises(ValueError, match="not finite"):
        match_layers(torch.tensor([[torch.nan]]))
    with pytest.raises(ValueError, match="types of 1 and 3 layers"):
        match_layers(table, types=(["a"], ["a", "b", "c"]))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("gap", [0.0, 0.3])
def test_it_is_the_best_of_all_monotone_matchings(seed, gap):
    table = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)).double()

    def worth(pairs):
        return sum(float(table[i, j]) for i, j in pairs) - gap * (7 - 2 * len(pairs))

    best = max(
        worth(list(zip(rows, columns)))
        for count in range(4)
        for rows in itertools.combinations(range(4), count)
        for columns in itertools.combinations(range(3), count)
        if all(table[i, j] >= -9 for i, j in zip(rows, columns))
    )
    found = match_layers(table, gap=gap, least=-9)
    assert worth(list(found.items())) == pytest.approx(best)
    assert list(found.values()) == sorted(found.values())


def test_cka_knows_no_rotation_and_no_batch():
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(64, 6, generator=generator) for _ in range(3)]
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator))[0]
    same, parts = LinearCKA(), LinearCKA()
    same.add(states, [3 * one @ turn + 1 for one in states])
    torch.testing.assert_close(same.similarity().diagonal(), torch.ones(3).double())
    for rows in range(0, 64, 8):
        parts.add([one[rows : rows + 8] for one in states], [one[rows : rows + 8] @ turn for one in states])
    torch.testing.assert_close(parts.similarity().diagonal(), torch.ones(3).double())
    assert (same.similarity() - torch.eye(3)).abs().max() < 0.15  # not biased upwards by few tokens
    with pytest.raises(ValueError, match="at least four tokens"):
        LinearCKA().add([states[0][:3]], [states[0][:3]])


def test_a_deeper_copy_is_met_layer_by_layer():
    """The donor is the target with a layer that writes nothing between its two; the carried donor is the target."""
    config, tensors, outputs = network("llama")
    spaces = find_family(config)
    deeper = {**config, "num_hidden_layers": 3, "layer_types": None}
    donor = {name.replace("layers.1.", "layers.2."): tensor for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if "layers.1." in name:
            donor[name] = torch.zeros_like(tensor) if "o_proj" in name or "down" in name else tensor.flip(0)
    table = find_family(deeper)
    donor = table.random_symmetry(2).carry(donor)
    assert layer_types(table) == [layer_types(spaces)[0]] * 3
    likeness = torch.tensor([[0.9, 0.8, 0.1], [0.1, 0.2, 0.9]])
    layers = match_layers(likeness, gap=0.1, types=(layer_types(spaces), layer_types(table)))
    maps = align(tensors, donor, spaces, table, layers=layers)
    assert any(key.startswith("unmatched.1") or "layers.1" in key for key in maps.lacking(donor).left)
    back = maps.carry(donor, into=tensors)
    for name, tensor in tensors.items():
        torch.testing.assert_close(back[name], tensor, rtol=1e-8, atol=1e-10)
    with double():
        torch.testing.assert_close(outputs(back), outputs(tensors))
    with pytest.raises(ValueError, match="the donor has a space 'layers.2.kv'"):
        align(tensors, donor, spaces, table)


def test_types_tell_dense_layers_from_experts():
    config, _, _ = network("qwen3_moe")
    first, second = layer_types(find_family(config))
    assert first != second and "experts" in second
    config, _, _ = network("gemma3_text")
    assert all(one.startswith(("sliding_attention", "full_attention")) for one in layer_types(find_family(config)))


def test_kinds_of_attention_count_where_both_networks_have_several():
    """A Llama has one kind of layer, and a Gemma's local and global ones may all be its counterparts."""
    local = find_family({**network("gemma3_text")[0], "layer_types": ["sliding_attention", "full_attention"]})
    plain = find_family(network("llama")[0])
    assert len(set(layer_types(local))) == 2
    one, other = types_of_both(plain, local)
    assert set(one) == set(other) and len(set(other)) == 1
    assert types_of_both(local, local) == (layer_types(local), layer_types(local))
