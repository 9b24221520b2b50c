"""Networks of other widths: exact widening, transport from a small network into a wide one and back, what is kept."""

import pytest
import torch

from alignment import Maps, align, find_family, fold, widen
from alignment._acts import Plan, act, coupled
from alignment._heads import cover
from alignment._sizes import compare
from alignment.maps import Index
from alignment.verify import double
from tests.networks import NETWORKS, build, logits

LLAMA = {"hidden_size": 24, "intermediate_size": 20, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}
GPT2 = {"n_embd": 24, "n_head": 4, "n_inner": 20}
GEMMA = {**LLAMA, "hidden_size": 16}  # transformers keeps the root of the width in float32, where 4 and 8 are exact
PHI3 = {  # three quarters of a head's coordinates turn; it has no head_dim of its own
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
}
WIDER = [
    ("llama", LLAMA, {"hidden_size": 48, "intermediate_size": 33}, False),
    ("llama", LLAMA, {"num_attention_heads": 8, "num_key_value_heads": 4}, False),
    ("llama", LLAMA, {"num_attention_heads": 12, "num_key_value_heads": 3}, False),
    ("llama", LLAMA, {"hidden_size": 36, "intermediate_size": 40}, True),
    ("qwen3", LLAMA, {"hidden_size": 48, "num_attention_heads": 8}, False),
    ("mixtral", LLAMA, {"hidden_size": 48, "intermediate_size": 40}, False),
    ("gpt2", GPT2, {"n_embd": 48, "n_head": 8, "n_inner": 50}, False),
    ("gpt2", GPT2, {"n_embd": 48, "n_head": 4}, False),
    ("gpt2", GPT2, {"n_embd": 48, "n_head": 6, "n_inner": 20}, True),
    ("gemma2", GEMMA, {"hidden_size": 64, "num_attention_heads": 8}, False),
    ("gemma3_text", GEMMA, {"hidden_size": 64, "intermediate_size": 40}, False),
    ("gpt_neox", {"hidden_size": 24, "num_attention_heads": 4}, {"hidden_size": 48, "num_attention_heads": 8}, False),
    ("phi3", PHI3, {"intermediate_size": 40}, True),
    ("phi3", PHI3, {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4}, False),
    ("bert", {"hidden_size": 24, "num_attention_heads": 4}, {"hidden_size": 48, "num_attention_heads": 8}, False),
]


def made(family: str, sizes: dict, folded: bool = False, seed: int = 0):
    """Config, random float64 tensors and their logits, of a family's first variant with these sizes."""
    import transformers

    name, config_name, variants = NETWORKS[family]
    common = {"vocab_size": 61, "n_layer": 2} if family == "gpt2" else dict(variants[0])
    config = getattr(transformers, config_name)(**{**common, **sizes})
    model = build(name, config)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, value in model.state_dict().items():
        if key not in model.all_tied_weights_keys:
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            gain = value.dim() == 1 and bool((value == value[0]).all()) and key.endswith("weight")
            tensors[key] = (
                value.double() + 0.3 * noise if gain else noise * (0.5 if value.dim() == 1 else value.shape[-1] ** -0.5)
            )
    described = config.to_dict()
    if folded:
        tied = bool(model.all_tied_weights_keys)
        tensors, described = fold(tensors, described, untie=True)
        if tied:
            config.tie_word_embeddings = False
            model = build(name, config)
    return described, tensors, lambda given: logits(model, given)


@pytest.mark.parametrize("case", WIDER, ids=lambda case: f"{case[0]}-{'-'.join(map(str, case[2].values()))}")
def test_widening_keeps_the_function(case):
    family, small, wider, folded = case
    config, tensors, outputs = made(family, small, folded)
    wide, like, wide_outputs = made(family, {**small, **wider}, folded, seed=1)
    maps = widen(find_family(config), find_family(wide))
    carried = maps.carry(tensors)
    assert {name: one.shape for name, one in carried.items()} == {name: one.shape for name, one in like.items()}
    with double():
        torch.testing.assert_close(wide_outputs(carried), outputs(tensors), rtol=1e-9, atol=1e-10)


def test_what_cannot_be_widened_is_named():
    config, _, _ = made("llama", LLAMA)
    small = find_family(config)
    for sizes, sentence in (
        ({"hidden_size": 36}, "space 'residual' has 24 units .* no multiple"),
        ({"head_dim": 8}, "space 'layers.0.qk' has 6 units in the one network and 8"),
        ({"intermediate_size": 10}, "'layers.0.mlp' has 20 units .* narrower exactly"),
        ({"vocab_size": 70}, "space 'vocabulary' has 61 units"),
    ):
        with pytest.raises(ValueError, match=sentence):
            widen(small, find_family(made("llama", {**LLAMA, **sizes})[0]))


TWICE = [
    ("llama", LLAMA, {"hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 8}, False),
    ("llama", LLAMA, {"intermediate_size": 60, "num_attention_heads": 8, "num_key_value_heads": 4}, True),
    ("llama", LLAMA, {"hidden_size": 48}, True),
    ("gpt2", GPT2, {"n_embd": 48, "n_head": 8, "n_inner": 40}, False),
    ("mixtral", LLAMA, {"intermediate_size": 40}, False),
]


@pytest.mark.parametrize("match", ["clusters", "emd", "sinkhorn"])
@pytest.mark.parametrize("case", TWICE, ids=lambda case: f"{case[0]}-{'-'.join(map(str, case[2].values()))}-{case[3]}")
def test_a_small_network_is_found_in_its_widened_and_scrambled_copy(case, match):
    family, small, wider, folded = case
    config, tensors, outputs = made(family, small, folded)
    wide, _, wide_outputs = made(family, {**small, **wider}, folded, seed=1)
    narrow_spaces, spaces = find_family(config), find_family(wide)
    target = spaces.random_symmetry(7).carry(widen(narrow_spaces, spaces).carry(tensors))
    maps = align(target, tensors, spaces, narrow_spaces, match=match)
    carried = maps.carry(tensors)
    with double():
        reference = outputs(tensors)
        torch.testing.assert_close(wide_outputs(target), reference, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(wide_outputs(carried), reference, rtol=1e-7, atol=1e-8)
        middle = {name: (target[name] + carried[name]) / 2 for name in target}
        torch.testing.assert_close(wide_outputs(middle), reference, rtol=1e-7, atol=1e-8)  # no barrier
        if "num_attention_heads" in wider or "n_head" in wider:
            return  # to fewer heads: those left over are dropped
        back = align(tensors, target, narrow_spaces, spaces, match=match).carry(target)
        torch.testing.assert_close(outputs(back), reference, rtol=1e-7, atol=1e-8)


def test_two_maps_are_exact_where_one_is_off_by_the_ratio():
    """Reference facts: writers by rows and readers by columns have error 0 on planted 2:1 duplicates."""
    coupling = torch.zeros(1, 6, 3).double()
    coupling[0, torch.arange(6), torch.arange(6) % 3] = 1 / 6
    plan = coupled(coupling)
    up, down = torch.randn(3, 5).double(), torch.randn(4, 3).double()
    wide_up = act(Plan(plan.write[0], plan.read[0], plan.even[0]), "w", up, 0, None)
    wide_down = act(Plan(plan.write[0], plan.read[0], plan.even[0]), "r", down, 1, None)
    torch.testing.assert_close(wide_down @ wide_up, down @ up)
    torch.testing.assert_close(wide_up, torch.cat([up, up]))
    torch.testing.assert_close(down @ plan.write[0].T @ wide_up, 2 * down @ up)  # one map for both


def test_units_without_counterpart_stay_the_targets():
    config, tensors, outputs = made("llama", LLAMA)
    wide, target, wide_outputs = made("llama", {**LLAMA, "intermediate_size": 30}, seed=1)
    spaces = find_family(wide)
    maps = align(target, tensors, spaces, find_family(config))  # hungarian: ten units are left over
    lacking = maps.lacking(tensors)
    assert lacking.units == {"layers.0.mlp": 10, "layers.1.mlp": 10} and not lacking.kept and not lacking.left
    with pytest.raises(ValueError, match="10 units of 'layers.0.mlp' have no counterpart"):
        maps.carry(tensors)
    carried = maps.carry(tensors, into=target)
    index = maps.maps["layers.0.mlp"].index
    own, at = index < 0, "model.layers.0.mlp."
    assert own.sum() == 10
    assert carried[at + "up_proj.weight"][own].equal(target[at + "up_proj.weight"][own])
    assert carried[at + "down_proj.weight"][:, own].equal(target[at + "down_proj.weight"][:, own])
    taken = tensors[at + "gate_proj.weight"][index[~own]]
    moved = carried[at + "gate_proj.weight"][~own]
    torch.testing.assert_close(moved.abs().sum(), taken.abs().sum())
    narrow = align(tensors, target, find_family(config), spaces)
    assert narrow.lacking(target).units == {} and narrow.maps["layers.0.mlp"].index.shape == (20,)


def test_partial_transport_leaves_the_targets_units(tmp_path):
    config, tensors, _ = made("llama", LLAMA)
    _, other, _ = made("llama", LLAMA, seed=1)
    spaces = find_family(config)
    maps = align(tensors, other, spaces, spaces, match=_most)
    assert 0 < maps.lacking(other).units["layers.0.mlp"] < 20
    carried = maps.carry(other, into=tensors)
    maps.save(tmp_path / "maps.safetensors")
    again = Maps.load(tmp_path / "maps.safetensors").carry(other, into=tensors)
    assert all(again[name].equal(carried[name]) for name in carried)
    with pytest.raises(ValueError, match="a map of kind Plan does not fit"):
        maps.check(spaces)
    with pytest.raises(ValueError, match="a coupling, .* cannot be undone"):
        maps.inverse()


def _most(similarity: torch.Tensor) -> torch.Tensor:
    from alignment.match.emd import emd
    from alignment.match.partial import partial

    return partial(similarity, mass=0.7) if len(similarity) == 20 else emd(similarity)


def test_queries_and_keys_of_other_heads_stay_the_targets():
    config, tensors, _ = made("llama", LLAMA)
    wide, target, wide_outputs = made("llama", {**LLAMA, "head_dim": 8}, seed=1)
    spaces = find_family(wide)
    maps = align(target, tensors, spaces, find_family(config))
    kept = maps.lacking(tensors).kept
    assert sorted(kept) == [f"layers.{n}.{name}.weight" for n in (0, 1) for name in ("k", "q")]
    assert "turns 8 coordinates in the target and 6 in the donor" in kept["layers.0.q.weight"]
    carried = maps.carry(tensors, into=target)
    assert carried["model.layers.0.self_attn.q_proj.weight"].equal(target["model.layers.0.self_attn.q_proj.weight"])
    v = "model.layers.0.self_attn.v_proj.weight"
    assert not carried[v].equal(target[v]) and torch.linalg.matrix_rank(carried[v][:8]) == 6
    other = find_family({**config, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    assert "other frequencies" in compare(find_family(config), other, False, False)["layers.1.qk"]


def test_gromov_needs_no_matched_space_to_find_units():
    config, tensors, _ = made("llama", LLAMA)
    spaces = find_family(config)
    symmetry = spaces.random_symmetry(3)
    donor = symmetry.carry(tensors)
    for match in ("gromov", "fused_gromov"):
        back = align(tensors, donor, spaces, spaces, match=match).carry(donor)
        for name, tensor in tensors.items():
            torch.testing.assert_close(back[name], tensor, rtol=1e-8, atol=1e-9)


def test_cover_takes_all_and_evenly():
    table = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    assert sorted(torch.bincount(cover(table)).tolist()) == [2, 2, 3]
    assert len(cover(table.T).unique()) == 3


def test_index_shares_out_what_it_takes_twice():
    twice = Index(torch.tensor([0, 1, 1, -1]))
    torch.testing.assert_close(act(twice, "w", torch.tensor([3.0, 4.0]), 0, None), torch.tensor([3.0, 4.0, 4.0, 0.0]))
    torch.testing.assert_close(act(twice, "r", torch.tensor([3.0, 4.0]), 0, None), torch.tensor([3.0, 2.0, 2.0, 0.0]))


def test_a_gain_means_the_same_in_a_family_that_stores_it_otherwise():
    """Gemma stores a norm's factor less 1."""
    config, tensors, _ = made("gemma2", {**LLAMA, "head_dim": 6})
    plain, target, _ = made("llama", {**LLAMA, "head_dim": 6}, seed=1)
    there = align(target, tensors, find_family(plain), find_family(config)).carry(tensors, into=target)
    back = align(tensors, target, find_family(config), find_family(plain)).carry(target, into=tensors)
    name = "model.layers.0.input_layernorm.weight"
    assert float((there[name].sort().values - (tensors[name] + 1).abs().sort().values).abs().max()) < 1e-6
    assert float((back[name].sort().values - (target[name] - 1).sort().values).abs().max()) < 1e-6


def test_embeddings_mean_the_same_in_a_family_that_multiplies_them():
    """Gemma takes its embeddings times the root of its width, and its tied head reads them as they are."""
    config, tensors, _ = made("gemma2", {**LLAMA, "head_dim": 6})
    plain, target, _ = made("llama", {**LLAMA, "head_dim": 6}, seed=1)
    root = 24**0.5

    def same(one, two):  # but for places and signs
        torch.testing.assert_close(one.abs().flatten().sort().values, two.abs().flatten().sort().values)

    name, norm = "model.embed_tokens.weight", "model.norm.weight"
    there = align(target, tensors, find_family(plain), find_family(config)).carry(tensors, into=target)
    same(there[name], tensors[name] * root)
    same(there["lm_head.weight"], tensors[name])
    same(there[norm], tensors[norm] + 1)
    back = align(tensors, target, find_family(config), find_family(plain)).carry(target, into=tensors)
    same(back[name], target[name] / root)
    same(back[norm] + 1, target[norm] * root)
    again = align(tensors, there, find_family(config), find_family(plain)).carry(there, into=tensors)
    same(again[name], tensors[name])


def test_frequencies_of_each_type_of_layer_in_either_spelling():
    """Files of Gemma 3 give the base of global layers and that of local ones, or both by the type of layer."""
    config, _, _ = made("gemma3_text", GEMMA)
    plain = {name: value for name, value in config.items() if name != "rope_parameters"}
    old = {**plain, "rope_theta": 1e6, "rope_local_base_freq": 1e4}

    def new(everywhere, local):
        kinds = {"full_attention": everywhere, "sliding_attention": local}
        return {
            **plain,
            "rope_parameters": {n: {"rope_type": "default", "rope_theta": base} for n, base in kinds.items()},
        }

    for same in (plain, old):  # without a word the classes take these two
        assert compare(find_family(same), find_family(new(1e6, 1e4)), False, False) == {}
    for other in (new(1e6, 2e4), new(5e5, 1e4), {**old, "rope_local_base_freq": 2e4}):
        assert "other frequencies" in compare(find_family(old), find_family(other), False, False)["layers.0.qk"]
        with pytest.raises(ValueError, match="turn at other frequencies"):
            widen(find_family(old), find_family(other))
    scaled = {"rope_theta": 5e5, "factor": 8.0}
    config, _, _ = made("llama", LLAMA)
    config = {name: value for name, value in config.items() if name != "rope_parameters"}
    before = {**config, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 8.0}}
    now = {**config, "rope_parameters": {"rope_type": "linear", **scaled}}
    assert compare(find_family(before), find_family(now), False, False) == {}
    assert compare(find_family(config), find_family(now), False, False)


def test_what_attention_divides_by_is_not_guessed():
    """A widening whose queries and keys would meet other frequencies, or another root, is refused."""
    config, tensors, _ = made("llama", LLAMA)
    wide = {**made("llama", {**LLAMA, "intermediate_size": 40})[0]}
    turned = {**wide, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    with pytest.raises(ValueError, match="'layers.0.qk': rotary embeddings turn at other frequencies"):
        widen(find_family(config), find_family(turned))
    config, tensors, _ = made("gemma2", {**LLAMA, "query_pre_attn_scalar": 6})
    with pytest.raises(ValueError, match="query_pre_attn_scalar"):
        widen(find_family(config), find_family({**config, "query_pre_attn_scalar": 12}))
    part = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    config, tensors, _ = made("gpt_neox", {"hidden_size": 24, "num_attention_heads": 2, "rope_parameters": part})
    less = {**config, "hidden_size": 48, "rope_parameters": {**part, "partial_rotary_factor": 0.25}}
    spaces, wide = find_family(config), find_family(less)
    with pytest.raises(ValueError, match="'layers.0.qk_rest': heads have 18 coordinates that do not turn .* and 6 in"):
        widen(spaces, wide)
    assert "18 coordinates" in compare(wide, spaces, False, False)["layers.0.qk"]
