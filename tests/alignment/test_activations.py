"""Moments do not depend on batches, padding plays no part, and matching by activations finds planted copies."""

import itertools

import pytest
import torch
import transformers

from alignment import align, find_family, trace
from alignment.features._patterns import Patterns
from alignment.features.activations import Moments, Pair, activations, collect, taps
from alignment.maps import Index
from alignment.trace import outputs_of
from tests.networks import NETWORKS, build, network
from tests.plain_networks import MLP, VGG, ResNet, image, randomised


def samples(n=200, shift=1000.0):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    y = x[:, [3, 1, 0, 2]] + 0.5 * torch.randn(n, 4, generator=generator, dtype=torch.float64)
    return x + shift, 3 * y - shift


@pytest.mark.parametrize("dtype,close", [(torch.float64, 1e-12), (torch.float32, 2e-4), (torch.bfloat16, None)])
@pytest.mark.parametrize("batch", [1, 7, 200])
def test_streamed_moments_are_those_of_all_samples(dtype, close, batch):
    x, y = samples()
    if close is None:
        x, y = x - 1000, y + 1000
    moments = Moments()
    for start in range(0, 200, batch):
        moments.update(x[start : start + batch].to(dtype), y[start : start + batch].to(dtype))
    exact = torch.corrcoef(torch.cat([x.to(dtype).double(), y.to(dtype).double()], 1).T)[:5, 5:]
    assert moments.count == 200
    torch.testing.assert_close(activations(moments), exact, rtol=0, atol=close or 1e-6)
    torch.testing.assert_close(moments.means[0], x.to(dtype).double().mean(0), rtol=1e-6, atol=1e-6)


def test_dead_units_and_products():
    x, y = samples(shift=0.0)
    x[:, 2] = 7.0
    moments = Moments()
    moments.update(x, y)
    found = activations(moments)
    assert found[2].eq(0).all() and found.isfinite().all() and float(found[3, 0]) > 0.8
    product = activations(moments, kind="product")
    sizes = x.square().mean().sqrt() * y.square().mean().sqrt()
    torch.testing.assert_close(product, x.T @ y / 200 / sizes)


def test_bad_input_gets_a_sentence():
    moments = Moments()
    with pytest.raises(ValueError, match="two samples or more; given: 0"):
        activations(moments)
    with pytest.raises(ValueError, match="target has 3 samples and donor 2"):
        moments.update(torch.ones(3, 2), torch.ones(2, 2))
    with pytest.raises(ValueError, match="not finite"):
        moments.update(torch.full((3, 2), torch.nan), torch.ones(3, 2))
    moments.update(torch.ones(3, 2), torch.ones(3, 2))
    with pytest.raises(ValueError, match="'correlation' or 'product'"):
        activations(moments, kind="cosine")


CASES = {
    "mlp": (lambda: MLP(8, (20, 14)), image(1, 8, 300)[:, 0, 0]),
    "resnet": (lambda: randomised(ResNet((6, 8), 1)), image(1, 8, 50)),
    "vgg": (VGG, image(3, 8, 100)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_permuted_copy_is_found_by_what_it_does(case):
    torch.manual_seed(0)
    make, data = CASES[case]
    module, other, data = make().double(), make().double(), data.double()
    spaces = trace(module, data[:2])
    assert set(taps(module, spaces)) == set(spaces.by_name)
    tensors = dict(module.state_dict())
    donor = spaces.random_symmetry(2).carry(tensors)
    other.load_state_dict(donor)
    features = collect(module, other, spaces, spaces, data.split(40))
    maps = align(tensors, donor, spaces, spaces, features=features)
    back = maps.carry(donor)
    outputs = outputs_of(module, data[:5])
    torch.testing.assert_close(outputs(back), outputs(tensors), rtol=1e-8, atol=1e-9)
    live = [name for name, table in features.items() if float(table.diagonal().abs().max()) > 0]
    assert live == list(features)


def test_attention_is_compared_on_shared_bytes_and_moves_heads():
    """A donor that cuts a token in two looks at both halves; what is between shared ends counts together."""
    whole = torch.tensor([[[1.0, 0, 0], [0.5, 0.5, 0], [0.2, 0.3, 0.5]], [[1, 0, 0], [0.9, 0.1, 0], [0.1, 0.8, 0.1]]])
    cut = torch.zeros(2, 4, 4)
    cut[:, [0, 2, 3]] = torch.stack(
        [whole[..., 0], 0.25 * whole[..., 1], 0.75 * whole[..., 1], whole[..., 2]], -1
    ).flip(0)
    patterns = Patterns()
    patterns.update(whole, cut, torch.arange(3), torch.tensor([0, 2, 3]))
    torch.testing.assert_close(patterns.similarity(), torch.tensor([[-1.0, 1.0], [1.0, -1.0]]).double())
    config, tensors, _ = network("llama")
    spaces = find_family(config)
    table = torch.zeros(2, 2, 2, 2)
    for group, query in itertools.product(range(2), range(2)):
        table[group, query, 1 - group, query] = 10.0
    maps = align(tensors, tensors, spaces, spaces, features={"layers.1.kv": table}).maps
    assert isinstance(maps["layers.0.kv"], Index) and maps["layers.0.kv"].index.tolist() == [0, 1]
    assert isinstance(maps["layers.1.kv"], Index) and maps["layers.1.kv"].index.tolist() == [1, 0]


def test_padding_is_left_out_and_positions_are_paired():
    module = MLP(4, (6,)).double()
    spaces, data = trace(module, torch.randn(2, 4)), torch.randn(8, 4).double()
    plain = collect(module, module, spaces, spaces, [data[:5]])
    padded = torch.cat([data[:5], torch.full((3, 4), 1e6)])
    kept = torch.arange(5)
    found = collect(module, module, spaces, spaces, [Pair(padded, data[:5].flip(0), kept, kept.flip(0))])
    torch.testing.assert_close(found["hidden.0"], plain["hidden.0"])
    with pytest.raises(ValueError, match="no samples"):
        collect(module, module, spaces, spaces, [])


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "gpt_neox", "opt", "phi3", "bloom", "mixtral"])
def test_units_of_language_models_are_seen_where_they_are_read(family, folded):
    config, tensors, _ = network(family, 0, folded=folded)
    name, config_name, variants = NETWORKS[family]
    sizes = getattr(transformers, config_name)(**{**variants[0], **({"tie_word_embeddings": False} if folded else {})})
    spaces = find_family(config)
    donor = spaces.random_symmetry(2).carry(tensors)
    both = []
    for one in (tensors, donor):
        module = build(name, sizes)
        module.load_state_dict(one, strict=False)
        both.append(module)
    batches = torch.randint(2, 61, (6, 8), generator=torch.Generator().manual_seed(0)).split(2)
    seen = taps(both[0], spaces.of(tensors))
    experts = family == "mixtral"
    assert set(seen) == {"residual"} | (set() if experts else {"layers.0.mlp", "layers.1.mlp"})
    features = collect(*both, spaces, spaces, batches)
    if spaces.by_name["residual"].group.startswith("orthogonal"):
        features["residual"] = collect(*both, spaces, spaces, batches, kind="product")["residual"]
    maps = align(tensors, donor, spaces, spaces, features=features)
    for key, tensor in maps.carry(donor).items():
        torch.testing.assert_close(tensor, tensors[key], rtol=1e-5, atol=1e-6)
