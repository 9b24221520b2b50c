"""Every family's table of spaces against transformers' own modules: what is in a group is a symmetry, and no more."""

import dataclasses

import pytest
import torch

from alignment import Maps, find_family, fold, unfold, verify
from alignment.maps import Index, Matrix, Turn
from alignment.spaces import Spaces
from alignment.verify import double
from fusion import words
from tests.networks import CASES, NETWORKS, network

POST = ("bert", "opt-2")  # every norm writes the stream


def ids(case: tuple[str, int]) -> str:
    return "-".join(map(str, case))


def moved(maps: Maps, tensors, outputs) -> float:
    """How far forced maps move the logits, relative to the largest."""
    reference = outputs(tensors)
    return float((outputs(maps.carry(tensors)) - reference).abs().max() / reference.abs().max())


def test_every_family_is_tried():
    assert sorted(NETWORKS) == [word.word for word in words.list_room("families")]


@pytest.mark.parametrize("folded", [False, True], ids=["as given", "folded"])
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_random_symmetries_keep_the_function(case, folded):
    if folded and (case[0] in POST or ids(case) in POST):
        with pytest.raises(ValueError, match="no gain of this .* can be folded"):
            network(*case, folded=True)
        return
    config, tensors, outputs = network(*case, folded=folded)
    spaces = find_family(config)
    verify(outputs, tensors, spaces, seeds=1)  # each space alone, and all at once, in float64
    narrow = {name: tensor.float() for name, tensor in tensors.items()}
    assert moved(spaces.random_symmetry(7), narrow, outputs) < 1e-4
    for seed in range(3):
        spaces.random_symmetry(seed).check(spaces)


@pytest.mark.parametrize("case", [case for case in CASES if case[0] not in POST and ids(case) not in POST], ids=ids)
def test_folding_keeps_the_function_and_can_be_undone(case):
    config, tensors, outputs = network(*case)
    with double():
        reference = outputs(tensors)
        after = network(*case, folded=True)[2]
        folded, described = fold(tensors, config, untie=True)
        assert float((after(folded) - reference).abs().max()) < 1e-12
        plain, again = unfold(folded, described, tensors, tie=bool(config.get("tie_word_embeddings")))
        assert float((outputs({name: plain[name] for name in tensors}) - reference).abs().max()) < 1e-12
    assert bool(again.get("tie_word_embeddings")) == bool(config.get("tie_word_embeddings"))
    for name, tensor in tensors.items():
        torch.testing.assert_close(plain[name], tensor, rtol=1e-12, atol=1e-12)


def test_a_tied_head_is_untied_only_when_asked():
    config, tensors, _ = network("llama", 1)
    with pytest.raises(ValueError, match="lm_head.weight is tied to model.embed_tokens.weight.*untie=True"):
        fold(tensors, config)
    folded, described = fold(tensors, config, final=False)
    assert "lm_head.weight" not in folded and described["tie_word_embeddings"]
    assert find_family(described).by_name["residual"].group == "signed permutation"
    folded, described = fold(tensors, config, untie=True)
    assert "lm_head.weight" in folded and not described["tie_word_embeddings"]
    assert find_family(described).by_name["residual"].group == "orthogonal"


def test_a_last_norm_without_reader_is_the_output():
    config, tensors, _ = network("vit")
    headless = {name: tensor for name, tensor in tensors.items() if not name.startswith("classifier")}
    folded, described = fold(headless, config)
    assert folded["vit.layernorm.weight"].equal(tensors["vit.layernorm.weight"])
    assert folded["vit.layers.0.layernorm_before.weight"].eq(1).all()
    assert find_family(described).by_name["residual"].group == "permutation"


def test_a_gain_of_zero_is_folded_but_not_taken_out_again():
    config, tensors, outputs = network("llama")
    tensors["model.norm.weight"][3] = 0
    folded, described = fold(tensors, config)
    with double():
        torch.testing.assert_close(outputs(folded), outputs(tensors), rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="model.norm.weight has a gain of 0"):
        unfold(folded, described, tensors)


def one(spaces: Spaces, name: str, map) -> Maps:
    return Maps(spaces, spaces, {name: map})


def swapped(size: int, *lead: int) -> torch.Tensor:
    """A permutation that swaps the first two units."""
    index = torch.arange(size)
    index[:2] = torch.tensor([1, 0])
    return index.expand(*lead, size).clone()


def test_heads_under_rotary_embeddings_keep_their_order_inside():
    config, tensors, outputs = network("llama")
    spaces = find_family(config)
    size = spaces.by_name["layers.0.qk"].size
    for map in (Index(swapped(size, 2)), Index(torch.tensor([1, 0, 2, 4, 3, 5]).expand(2, 6).clone())):
        maps = one(spaces, "layers.0.qk", map)  # two coordinates, two whole pairs
        with pytest.raises(ValueError, match="layers.0.qk.*rotary embeddings.*not move"):
            maps.check(spaces)
        with double():
            assert moved(maps, tensors, outputs) > 1e-3
    mirror = torch.eye(size, dtype=torch.float64).expand(2, size, size).clone()
    mirror[:, 0, 0] = -1  # of one coordinate, not of its pair
    maps = one(spaces, "layers.0.qk", Matrix(mirror, mirror))
    with pytest.raises(ValueError, match="layers.0.qk.*rotary embeddings"):
        maps.check(spaces)
    with double():
        assert moved(maps, tensors, outputs) > 1e-3


def test_norms_on_queries_and_keys_leave_pairs_a_sign():
    config, tensors, outputs = network("qwen3")
    spaces = find_family(config)
    maps = one(spaces, "layers.0.qk", Turn(torch.polar(torch.ones(2, 4).double(), torch.full((2, 4), 0.3).double())))
    with pytest.raises(ValueError, match="layers.0.qk.*only change its sign"):
        maps.check(spaces)
    with double():
        assert moved(maps, tensors, outputs) > 1e-4


def test_a_gate_has_no_sign():
    config, tensors, outputs = network("llama")
    spaces = find_family(config)
    parts = tuple(
        dataclasses.replace(
            part, axes=tuple(dataclasses.replace(a, role="w") if a.role == "e" else a for a in part.axes)
        )
        if part.key == "layers.0.gate.weight"
        else part
        for part in spaces.parts
    )
    wrong = dataclasses.replace(spaces, parts=parts)
    maps = one(wrong, "layers.0.mlp", Index(torch.arange(40), torch.where(torch.arange(40) == 0, -1.0, 1.0).double()))
    with pytest.raises(
        ValueError, match="layers.0.gate.weight as a writer of 'layers.0.mlp', and it is element by element"
    ):
        maps.check(spaces)
    with double():
        assert moved(maps, tensors, outputs) > 1e-3
        assert moved(one(spaces, "layers.0.mlp", maps.maps["layers.0.mlp"]), tensors, outputs) < 1e-12
    config, tensors, outputs = network("gpt2")
    spaces = find_family(config)
    maps = one(spaces, "layers.0.mlp", Index(torch.arange(96), torch.where(torch.arange(96) == 0, -1.0, 1.0).double()))
    with pytest.raises(ValueError, match="does not pass its non-linearity"):
        maps.check(spaces)
    with double():
        assert moved(maps, tensors, outputs) > 1e-3


def test_a_relu_passes_positive_scales_only():
    config, tensors, outputs = network("opt")
    spaces = find_family(config)
    scale = torch.where(torch.arange(40) == 0, -2.0, 1.5).double()
    maps = one(spaces, "layers.0.mlp", Index(torch.arange(40), scale))
    with pytest.raises(ValueError, match="ReLU passes positive"):
        maps.check(spaces)
    with double():
        assert moved(maps, tensors, outputs) > 1e-3
        one(spaces, "layers.0.mlp", Index(torch.arange(40), scale.abs())).check(spaces)


def test_the_residual_stream_is_one_space():
    config, tensors, outputs = network("llama")
    spaces = find_family(config)
    own = dataclasses.replace(spaces.by_name["residual"], name="layers.1.residual")
    parts = tuple(
        dataclasses.replace(
            part,
            axes=tuple(dataclasses.replace(a, space=own.name) if a.space == "residual" else a for a in part.axes),
        )
        if part.key.startswith("layers.1.")
        else part
        for part in spaces.parts
    )
    wrong = dataclasses.replace(spaces, spaces=(*spaces.spaces, own), parts=parts)
    maps = one(wrong, own.name, Index(swapped(24)))
    with pytest.raises(ValueError, match="no space 'layers.1.residual'.*one space"):
        maps.check(spaces)
    with double():
        assert moved(maps, tensors, outputs) > 1e-3


def test_layer_norm_keeps_the_mean_and_gains_do_not_rotate():
    config, tensors, outputs = network("gpt2", folded=True)
    spaces = find_family(config)
    assert spaces.by_name["residual"].group == "orthogonal fixing ones"
    rotation = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    maps = one(spaces, "residual", Matrix(rotation, rotation.mT.contiguous()))
    with pytest.raises(ValueError, match="residual.*LayerNorm subtracts the mean"):
        maps.check(spaces)
    with double():
        assert moved(maps, tensors, outputs) > 1e-3
    config, tensors, _ = network("llama")
    spaces = find_family(config)
    maps = one(spaces, "residual", maps.maps["residual"])
    with pytest.raises(ValueError, match="fold them to rotate"):
        maps.check(spaces)
    with pytest.raises(ValueError, match="do not rotate: fold them"):
        maps.carry(tensors)


def test_heads_with_slopes_stay_in_place():
    config, tensors, outputs = network("bloom")
    spaces = find_family(config)
    maps = one(spaces, "layers.0.kv", Index(swapped(3)))
    with pytest.raises(ValueError, match="layers.0.kv.*nothing of it may move"):
        maps.check(spaces)
    with double():
        assert moved(maps, tensors, outputs) > 1e-3


def test_the_verifier_finds_a_wrong_table():
    config, tensors, outputs = network("bloom")
    spaces = find_family(config)
    free = tuple(dataclasses.replace(s, group="permutation") if s.name == "layers.1.kv" else s for s in spaces.spaces)
    with pytest.raises(ValueError, match="no symmetry of this bloom network.*layers.1.kv"):
        verify(outputs, tensors, dataclasses.replace(spaces, spaces=free))
    with pytest.raises(ValueError, match="verified in float64"):
        verify(outputs, {name: tensor.float() for name, tensor in tensors.items()}, spaces)


@pytest.mark.parametrize("case", [("llama", 0), ("phi3", 1), ("mixtral", 0)], ids=ids)
def test_generation_with_a_cache_and_long_positions_stays_the_same(case):
    import transformers

    config, tensors, _ = network(*case, folded=True)
    carried = find_family(config).random_symmetry(3).carry(tensors)
    name, config_name, variants = NETWORKS[case[0]]
    made = []
    for given in (tensors, carried):
        described = getattr(transformers, config_name)(**{**variants[case[1]], "tie_word_embeddings": False})
        described._experts_implementation = "eager"
        model = getattr(transformers, name)(described).double().eval()
        model.load_state_dict(given)
        prompt = torch.arange(2, 12)[None]
        with double(), torch.no_grad():
            made.append(model.generate(prompt, max_new_tokens=60, do_sample=False, pad_token_id=0, eos_token_id=None))
    assert made[0].equal(made[1])


def test_experts_a_tensor_each():
    for family, block, stems in (
        ("mixtral", "block_sparse_moe", ("w1", "w3", "w2")),
        ("qwen3_moe", "mlp", ("gate_proj", "up_proj", "down_proj")),
    ):
        config, tensors, outputs = network(family)
        spaces = find_family(config)
        apart = split(tensors, block, stems)
        assert not [name for name in apart if name.endswith("gate_up_proj")]
        spelled = find_family(config, list(apart))
        spelled.check(apart)
        assert spelled == spaces.of(apart) and spelled.rank == spaces.rank
        maps = spaces.random_symmetry(1)
        carried, stacked = maps.carry(apart), split(maps.carry(tensors), block, stems)
        assert carried.keys() == stacked.keys() == apart.keys()
        close(carried, stacked)
        close(fold(apart, config)[0], split(fold(tensors, config)[0], block, stems))
        called = spaces.relabel({1: 0})
        assert called.of(apart) == spelled.relabel({1: 0}) and called.rank == called.of(apart).rank


def close(one, other):
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        torch.testing.assert_close(one[name], tensor, rtol=1e-12, atol=1e-12)


def split(tensors, block: str, stems: tuple[str, str, str]):
    """Experts as files have them."""
    found = {}
    for name, tensor in tensors.items():
        at, _, rest = name.partition(".mlp.")
        if rest == "experts.gate_up_proj":
            for number, both in enumerate(tensor):
                gate, up = both.chunk(2)
                found[f"{at}.{block}.experts.{number}.{stems[0]}.weight"] = gate
                found[f"{at}.{block}.experts.{number}.{stems[1]}.weight"] = up
        elif rest == "experts.down_proj":
            for number, down in enumerate(tensor):
                found[f"{at}.{block}.experts.{number}.{stems[2]}.weight"] = down
        elif rest == "gate.weight":
            found[f"{at}.{block}.gate.weight"] = tensor
        else:
            found[name] = tensor
    return found


def test_prefixes_and_older_names():
    config, tensors, _ = network("gpt2")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare["h.0.attn.bias"] = torch.ones(1, 1, 32, 32)
    carried = find_family(config).random_symmetry(0).carry(bare)
    assert carried.keys() == bare.keys() and carried["h.0.attn.bias"].equal(bare["h.0.attn.bias"])
    config, tensors, _ = network("vit")
    changes = (
        (".layers.", ".encoder.layer."),
        (".attention.q_proj", ".attention.attention.query"),
        (".attention.k_proj", ".attention.attention.key"),
        (".attention.v_proj", ".attention.attention.value"),
        (".attention.o_proj", ".attention.output.dense"),
        (".mlp.fc1", ".intermediate.dense"),
        (".mlp.fc2", ".output.dense"),
    )
    old = {}
    for name, tensor in tensors.items():
        for new, before in changes:
            name = name.replace(new, before)
        old[name] = tensor
    assert find_family(config).random_symmetry(0).carry(old).keys() == old.keys()


def test_poolers_pass_signs():
    import transformers

    described = transformers.BertConfig(
        vocab_size=61, hidden_size=24, num_hidden_layers=1, num_attention_heads=3, intermediate_size=40, num_labels=4
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(described).double().eval()
    tensors = {name: torch.randn_like(tensor) * 0.3 for name, tensor in model.state_dict().items()}

    def outputs(given):
        model.load_state_dict(given)
        with torch.no_grad():
            return model(torch.arange(2, 10)[None]).logits

    spaces = find_family({**described.to_dict(), "tie_word_embeddings": True}, list(tensors))
    assert spaces.by_name["pooler"].group == "signed permutation"
    verify(outputs, tensors, spaces)


def test_configs_may_be_objects():
    import transformers

    described = transformers.LlamaConfig(**NETWORKS["llama"][2][1])
    _, tensors, _ = network("llama", 1)
    folded, after = fold(tensors, described, untie=True)
    assert (
        isinstance(after, transformers.LlamaConfig) and not after.tie_word_embeddings and described.tie_word_embeddings
    )
    spaces = find_family(after)
    assert spaces.by_name["residual"].group == "orthogonal"
    model = transformers.LlamaForCausalLM(after).double()
    model.load_state_dict(spaces.random_symmetry(0).carry(folded))


def test_bad_input_gets_a_sentence():
    with pytest.raises(ValueError, match="no family 'lama'.*did you mean 'llama'.*alignment.trace"):
        find_family({"model_type": "lama"})
    with pytest.raises(ValueError, match="config.text_config, of family 'gemma3_text'"):
        find_family({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}})
    with pytest.raises(ValueError, match="no model_type"):
        find_family({})
    with pytest.raises(ValueError, match="a llama network has no 'hidden_size'"):
        find_family({"model_type": "llama"})
