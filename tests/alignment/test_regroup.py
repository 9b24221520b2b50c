"""Key-value heads in other numbers: copies compute the same, means of copies in any coordinates are the original."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

from alignment import find_family
from alignment.regroup import regroup
from alignment.verify import double
from tests.networks import NETWORKS, build, logits, network

ROOT = Path(__file__).resolve().parents[2]
GROUPED = ["llama", "qwen2", "qwen3", "gemma2", "phi3", "mixtral"]


def outputs(family, variant, tensors, groups):
    import transformers

    name, config_name, variants = NETWORKS[family]
    config = getattr(transformers, config_name)(**{**variants[variant], "num_key_value_heads": groups})
    with double():
        return logits(build(name, config), tensors)


@pytest.mark.parametrize("family", GROUPED)
def test_copies_compute_the_same_and_come_back(family):
    config, tensors, original = network(family)
    with double():
        reference = original(tensors)
    more, grown = regroup(tensors, config, 4)
    assert grown["num_key_value_heads"] == 4
    find_family(grown).check(more)
    torch.testing.assert_close(outputs(family, 0, more, 4), reference, rtol=1e-9, atol=1e-9)
    scrambled = find_family(grown).random_symmetry(3).carry(more)
    fewer, back = regroup(scrambled, grown, 2)
    assert back["num_key_value_heads"] == 2
    torch.testing.assert_close(outputs(family, 0, fewer, 2), reference, rtol=1e-8, atol=1e-8)


def test_a_dead_rotary_pair_leaves_no_nan():
    config, tensors, _ = network("llama")
    key = next(name for name in tensors if name.endswith("k_proj.weight"))
    half = config["hidden_size"] // config["num_attention_heads"] // 2  # rows of a head's pair are so far apart
    for first in (0, 2 * half):  # of the first head, of the second
        dead = {**tensors, key: tensors[key].clone()}
        dead[key][[first, first + half]] = 0
        fewer, _ = regroup(dead, config, 1)
        assert all(bool(torch.isfinite(tensor).all()) for tensor in fewer.values())


@pytest.mark.real
@pytest.mark.slow
def test_a_real_network_survives_copies_and_not_means_of_unlike_heads(smollm2):
    config = json.loads((smollm2 / "config.json").read_text())
    tensors = {name: one.float() for name, one in load_file(smollm2 / "model.safetensors").items()}
    text = (ROOT / "recipes" / "data" / "austen.txt").read_text(encoding="utf-8")[5000:11000]
    ids = torch.tensor([Tokenizer.from_file(str(smollm2 / "tokenizer.json")).encode(text).ids[:1024]])

    def nats(given, groups):
        from transformers import LlamaConfig, LlamaForCausalLM

        kept = {name: one for name, one in config.items() if name not in ("architectures", "torch_dtype", "dtype")}
        model = LlamaForCausalLM(LlamaConfig(**{**kept, "num_key_value_heads": groups})).eval()
        model.load_state_dict({**given, "lm_head.weight": given["model.embed_tokens.weight"]})
        with torch.no_grad():
            return float(model(ids, labels=ids).loss)

    whole = nats(tensors, 3)
    more, grown = regroup(tensors, config, 9)
    scrambled = find_family(grown, frozenset(more)).random_symmetry(0).carry(more)
    assert nats(more, 9) == pytest.approx(whole, abs=1e-4)
    assert nats(regroup(scrambled, grown, 3)[0], 3) == pytest.approx(whole, abs=1e-3)
    few = nats(regroup(tensors, config, 1)[0], 1)
    plain = {
        name: one.view(3, 64, -1).mean(0) if "k_pr" in name or "v_pr" in name else one for name, one in tensors.items()
    }
    print(f"nats a token: {whole:.3f}, one group {few:.3f}, its plain mean {nats(plain, 1):.3f}")
    assert few > whole + 3  # without training it is ruined, and so is the plain mean


def test_bad_input_gets_a_sentence():
    config, tensors, _ = network("llama")
    with pytest.raises(ValueError, match="regroup: 2 groups of 4 heads become 1, 2, 4, not 3"):
        regroup(tensors, config, 3)
    with pytest.raises(ValueError, match="a gpt2 network has no num_key_value_heads"):
        regroup({}, {"model_type": "gpt2"}, 2)
