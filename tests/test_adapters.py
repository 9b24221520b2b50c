"""Adapters on a base are what PEFT makes of them, and merged adapters are the sums they should be."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fusion import recipe, sources
from fusion._adapter_files import read_adapter
from fusion._adapter_merge import merge_adapters
from fusion._adapters import Adapted, open_adapter
from fusion.checkpoint import Checkpoint, open_source
from fusion.job import resolve_model, source_model
from fusion.merge._draw import Draw
from fusion.merge._factors import best, of_dense
from fusion.merge.concat import concat
from fusion.merge.lora_lego import lora_lego
from fusion.plan import plan
from fusion.recipe import ModelRef

peft = pytest.importorskip("peft")

LLAMA = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "vocab_size": 300}
QV = ["q_proj", "v_proj"]


def network(config: dict, seed: int = 0):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    fields = dict(config)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(fields.pop("model_type"), **fields)).eval()


def save_base(folder: Path, config: dict, **fields) -> Path:
    network(config | fields).save_pretrained(folder)
    return folder


def adapter(base: Path, folder: Path, seed: int = 1, **fields):
    """An adapter with random factors in `folder`, and the model it was saved from."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": QV, "task_type": "CAUSAL_LM", **fields})
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * (0.3 if "lora" in name else 0.1))
    model.save_pretrained(folder)
    return model


def whole(source) -> dict[str, torch.Tensor]:
    """All tensors of a source."""
    out = {}
    for name, entry in source.entries.items():
        flat = torch.empty(entry.numel, dtype=entry.dtype)
        source.read(name, 0, entry.numel, flat)
        out[name] = flat.reshape(entry.shape)
    return out


def agree(adapted: Adapted, model) -> None:
    """The adapted source holds what merge_and_unload makes, within float32 rounding, and nothing else."""
    merged = model.merge_and_unload().state_dict()
    ours = whole(adapted)
    assert ours.keys() == {name for name in merged if name in ours or "lm_head" not in name}
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, merged[name].float(), rtol=2e-6, atol=2e-6)


CASES = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "v_proj", "down_proj"],
        "rank_pattern": {"v_proj": 2, r"layers.1.mlp.down_proj": 7},
        "alpha_pattern": {"v_proj": 3, r".*\.0\.self_attn\.q_proj": 32},
    },
    "patterns and rslora": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}, "use_rslora": True},
    "head and embedding": {"target_modules": ["embed_tokens", "lm_head", "o_proj"]},
    "saved modules": {"modules_to_save": ["lm_head", "norm"]},
    "gaussian": {"init_lora_weights": "gaussian", "lora_dropout": 0.1},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("case", CASES)
def test_llama_is_what_peft_merges(case, tmp_path):
    base = save_base(tmp_path / "base", LLAMA)
    model = adapter(base, tmp_path / "adapter", **CASES[case])
    agree(open_adapter(tmp_path / "adapter", Checkpoint.open(base)), model)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_are_replaced(bias, tmp_path):
    base = save_base(tmp_path / "base", LLAMA, attention_bias=True)
    model = adapter(base, tmp_path / "adapter", bias=bias)
    source = open_adapter(tmp_path / "adapter", Checkpoint.open(base))
    assert any(name.endswith("q_proj.bias") for name in source._replaced)
    agree(source, model)


@pytest.mark.parametrize("modules", [["c_attn"], ["c_attn", "c_proj"], ["c_proj", "wte"], ["attn.c_proj"]])
@pytest.mark.parametrize("told", [True, False])
def test_gpt2_weights_are_transposed(modules, told, tmp_path):
    base = save_base(tmp_path / "base", GPT2 | {"tie_word_embeddings": False})
    model = adapter(base, tmp_path / "adapter", target_modules=modules, fan_in_fan_out=True)
    file = tmp_path / "adapter" / "adapter_config.json"
    if not told and modules != ["attn.c_proj"]:  # a square matrix alone can only be told apart by what is said
        file.write_text(json.dumps(json.loads(file.read_text()) | {"fan_in_fan_out": False}))
    agree(open_adapter(tmp_path / "adapter", Checkpoint.open(base)), model)


@pytest.mark.parametrize("fields", [{"target_modules": ["embed_tokens", "q_proj"]}, {"modules_to_save": ["lm_head"]}])
def test_a_tied_base_gets_a_head_of_its_own(fields, tmp_path):
    """The adapted model as it runs, whose two embeddings are no longer one: merging into the tied one changes both."""
    from transformers import AutoModelForCausalLM

    from fusion._composed import written

    base = save_base(tmp_path / "base", LLAMA, tie_word_embeddings=True)
    model = adapter(base, tmp_path / "adapter", **fields)
    source = open_adapter(tmp_path / "adapter", Checkpoint.open(base))
    assert source.config["tie_word_embeddings"] is False and "lm_head.weight" in source.entries
    ids = torch.arange(12).unsqueeze(0)
    ours = AutoModelForCausalLM.from_pretrained(written(source, tmp_path / "cache"))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


def test_a_resized_vocabulary(tmp_path):
    from transformers import AutoModelForCausalLM

    base = save_base(tmp_path / "base", LLAMA)
    grown = AutoModelForCausalLM.from_pretrained(base)
    grown.resize_token_embeddings(303)
    grown.save_pretrained(tmp_path / "grown")
    model = adapter(tmp_path / "grown", tmp_path / "adapter", modules_to_save=["embed_tokens", "lm_head"])
    source = open_adapter(tmp_path / "adapter", Checkpoint.open(base))
    assert source.config["vocab_size"] == 303
    agree(source, model)


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_a_base_saved_as_the_bare_body_or_whole(config, tmp_path):
    """Names with and without `model.` or `transformer.` are the same modules."""
    base = save_base(tmp_path / "base", config | {"tie_word_embeddings": False})
    prefix = "model." if config is LLAMA else "transformer."
    modules = QV if config is LLAMA else ["c_attn"]
    model = adapter(base, tmp_path / "adapter", target_modules=modules, fan_in_fan_out=config is GPT2)
    (tmp_path / "bare").mkdir()
    bare = {name.removeprefix(prefix): tensor for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(bare, tmp_path / "bare" / "model.safetensors")
    (tmp_path / "bare" / "config.json").write_text((base / "config.json").read_text())
    ours = whole(open_adapter(tmp_path / "adapter", Checkpoint.open(tmp_path / "bare")))
    merged = model.merge_and_unload().state_dict()
    for name, tensor in ours.items():
        full = name if name in merged else prefix + name
        torch.testing.assert_close(tensor, merged[full], rtol=2e-6, atol=2e-6)
    body = {  # and an adapter of the body alone
        key.replace(f"base_model.model.{prefix}", "base_model.model."): tensor
        for key, tensor in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items()
    }
    save_file(body, tmp_path / "adapter" / "adapter_model.safetensors")
    for other in (base, tmp_path / "bare"):
        again = whole(open_adapter(tmp_path / "adapter", Checkpoint.open(other)))
        for name, tensor in ours.items():
            assert torch.equal(again[name if name in again else prefix + name], tensor)


def test_regions_have_the_same_bits_wherever_they_begin(tmp_path):
    base = save_base(tmp_path / "base", LLAMA, hidden_size=48, intermediate_size=700, vocab_size=1000)
    adapter(base, tmp_path / "adapter", target_modules=["down_proj", "q_proj", "embed_tokens"])
    source = open_adapter(tmp_path / "adapter", Checkpoint.open(base))
    draw = torch.Generator().manual_seed(0)
    for name, tensor in whole(source).items():
        entry, flat = source.entries[name], tensor.flatten()
        for _ in range(8):
            start, stop = sorted(torch.randint(0, entry.numel + 1, (2,), generator=draw).tolist())
            part = torch.empty(stop - start, dtype=entry.dtype)
            source.read(name, start, stop, part)
            assert torch.equal(part, flat[start:stop]), name


def test_half_precision_bases_are_added_to_in_float32(tmp_path):
    base = tmp_path / "base"
    network(LLAMA).bfloat16().save_pretrained(base)
    adapter(base, tmp_path / "adapter")
    source = open_adapter(tmp_path / "adapter", Checkpoint.open(base))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert source.entries[name].dtype == torch.float32 and source.entries[name].stored == torch.bfloat16
    assert source.entries["model.norm.weight"].dtype == torch.bfloat16
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    key = "base_model.model." + name.removesuffix("weight")
    a, b = factors[key + "lora_A.weight"].float(), factors[key + "lora_B.weight"].float()
    expected = load_file(base / "model.safetensors")[name].float() + 1.5 * b @ a  # 6 / 4
    torch.testing.assert_close(whole(source)[name], expected, rtol=1e-6, atol=1e-6)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A base, and an adapter on it, to be spoilt."""
    folder = tmp_path_factory.mktemp("plain")
    base = save_base(folder / "base", LLAMA)
    adapter(base, folder / "adapter")
    return base, folder / "adapter"


def spoilt(plain, tmp_path, **changes) -> Path:
    folder = tmp_path / "spoilt"
    folder.mkdir()
    config = json.loads((plain[1] / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))
    (folder / "adapter_model.safetensors").write_bytes((plain[1] / "adapter_model.safetensors").read_bytes())
    return folder


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"peft_type": "IA3"}, "type IA3; only LoRA"),
        ({"init_lora_weights": "pissa"}, "'pissa' changed the base's own weights"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base's own weights"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, "changed the base's own weights"),
        ({"lora_bias": True}, "option lora_bias"),
        ({"kasa_config": {"beta": 1}}, "option kasa_config"),
        ({"trainable_token_indices": [1, 2]}, "option trainable_token_indices"),
        ({"target_parameters": ["experts"]}, "option target_parameters"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "option layer_replication"),
        ({"alora_invocation_tokens": [3]}, "option alora_invocation_tokens"),
        ({"an_option_of_next_year": 1.5}, "option an_option_of_next_year"),
        ({"r": 5}, "a rank of 5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_plain_lora_is_refused(changes, sentence, plain, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        read_adapter(spoilt(plain, tmp_path, **changes))


def test_real_dora_and_biases_of_lora_are_seen_in_the_tensors_too(plain, tmp_path):
    for number, fields in enumerate([{"use_dora": True}, {"lora_bias": True}]):
        folder = tmp_path / str(number)
        adapter(plain[0], folder, **fields)
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"use_dora": False, "lora_bias": False}))
        with pytest.raises(ValueError, match="is not of plain LoRA"):
            read_adapter(folder)


def test_the_wrong_base(plain, tmp_path):
    wide = save_base(tmp_path / "wide", LLAMA, hidden_size=32)
    with pytest.raises(ValueError, match="not the base that the adapter was trained on"):
        open_adapter(plain[1], Checkpoint.open(wide))
    other = save_base(tmp_path / "other", GPT2)
    with pytest.raises(ValueError, match="has no module model.layers.0.self_attn.q_proj"):
        open_adapter(plain[1], Checkpoint.open(other))
    with pytest.raises(ValueError, match="needs the model it sits on"):
        open_adapter(plain[1], None)
    (spoilt(plain, tmp_path) / "adapter_model.safetensors").rename(tmp_path / "spoilt" / "adapter_model.bin")
    with pytest.raises(ValueError, match="can run code when read"):
        read_adapter(tmp_path / "spoilt")


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A recipe's folder: a base with a tokenizer, an adapter on it, a text."""
    folder = tmp_path_factory.mktemp("small")
    ref = ModelRef("m", config=LLAMA, tokenizer={"train": "bytes"})
    made = sources.resolve("m", ref, folder / "cache", folder, lambda name: [])
    shutil.copytree(made, folder / "base")
    adapter(folder / "base", folder / "adapter", target_modules=["q_proj", "down_proj"])
    (folder / "text.txt").write_text("it is a truth universally acknowledged\n" * 20)
    return folder


def of_recipe(folder: Path, models: dict, steps: list, **fields) -> recipe.Recipe:
    tree = {"models": models, "data": {"text": {"path": "text.txt", "format": "text"}}, "steps": steps}
    (folder / "r.yaml").write_text(yaml.safe_dump(tree | fields))
    return recipe.load(folder / "r.yaml")


TUNED = {"target": {"path": "./base"}, "tuned": {"path": "./adapter", "base": "target"}}
EVALUATE = [{"evaluate": {"out": "e", "models": ["target", "tuned"], "metrics": ["bits_per_byte"], "data": "text"}}]


def test_a_recipe_with_an_adapter_plans_and_runs(small, tmp_path):
    """The adapted model reads otherwise than its base, and as peft's merged one does."""
    from fusion import run

    loaded = of_recipe(small, TUNED, EVALUATE)
    planned = plan(loaded, tmp_path)
    key = planned["e"].key
    assert run.main([str(loaded.path), "--out", str(tmp_path)]) == 0
    result = json.loads((plan(loaded, tmp_path)["e"].directory / "metrics.json").read_text())
    merged = adapter(small / "base", small / "unused", target_modules=["q_proj", "down_proj"]).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    shutil.copy(small / "base" / "tokenizer.json", tmp_path / "merged")
    shutil.copy(small / "base" / "tokenizer_config.json", tmp_path / "merged")
    other = of_recipe(small, {**TUNED, "tuned": {"path": str(tmp_path / "merged")}}, EVALUATE)
    assert run.main([str(other.path), "--out", str(tmp_path)]) == 0
    expected = json.loads((plan(other, tmp_path)["e"].directory / "metrics.json").read_text())
    ours, theirs = (
        [one["models"][m]["bits_per_byte"]["text"]["bits_per_byte"] for m in ("target", "tuned")]
        for one in (result, expected)
    )
    assert ours == pytest.approx(theirs, rel=1e-5) and abs(ours[0] - ours[1]) > 1e-3

    loaded = of_recipe(small, TUNED, EVALUATE)  # what the key depends on: the adapter's numbers and its base's
    assert plan(loaded, tmp_path)["e"].key == key
    for file in (small / "adapter" / "adapter_model.safetensors", small / "base" / "model.safetensors"):
        before = file.read_bytes()
        file.write_bytes(before[:-4] + b"\0\0\0\0")
        assert plan(loaded, tmp_path)["e"].key != key
        file.write_bytes(before)
    assert plan(loaded, tmp_path)["e"].key == key


@pytest.mark.parametrize(
    ("models", "sentence"),
    [
        ({"target": {"path": "./base"}, "tuned": {"path": "./adapter"}}, "name the model it sits on: base: NAME"),
        ({"target": {"path": "./base"}, "tuned": {"path": "./adapter", "base": "traget"}}, "did you mean 'target'"),
        ({"target": {"path": "./base", "base": "tuned"}, "tuned": {"path": "./base"}}, "training checkpoint only"),
        (
            {"tuned": {"path": "./adapter", "base": "target"}, "target": {"path": "./adapter", "base": "tuned"}},
            "circle",
        ),
    ],
)
def test_references_that_do_not_hold(models, sentence, small, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        plan(of_recipe(small, models, EVALUATE), tmp_path)


def test_an_adapter_on_an_adapter(small, tmp_path):
    """Each adds to what is below it."""
    adapter(small / "base", small / "second", seed=9, target_modules=["q_proj"])
    models = {**TUNED, "twice": {"path": "./second", "base": "tuned"}}
    loaded = of_recipe(
        small, models, [{"evaluate": {"models": ["twice"], "metrics": ["bits_per_byte"], "data": "text"}}]
    )
    plan(loaded, tmp_path)
    top, middle = whole(source_model(loaded, "twice", tmp_path)), whole(source_model(loaded, "tuned", tmp_path))
    added = deltas(small / "second")
    for name, tensor in top.items():
        delta = added.get(name.removesuffix(".weight"), torch.zeros(()))
        torch.testing.assert_close(tensor - middle[name], delta.expand_as(tensor), rtol=1e-4, atol=1e-6)
    directory = resolve_model(loaded, "twice", tmp_path / "cache")
    assert (directory / "tokenizer.json").is_file()
    assert all(torch.equal(t, top[n]) for n, t in load_file(directory / "model.safetensors").items())


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    """Scaled B A of every module, from the files."""
    found, tensors = read_adapter(folder), load_file(folder / "adapter_model.safetensors")
    return {m: tensors[p.b].float().flatten(1) @ tensors[p.a].float() * p.scale for m, p in found.pairs.items()}


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A base and three adapters: other ranks, one rank-stabilised, one on fewer modules."""
    folder = tmp_path_factory.mktemp("three")
    base = save_base(folder / "base", LLAMA)
    adapter(base, folder / "a", 1, r=3, target_modules=["q_proj", "down_proj"])
    adapter(base, folder / "b", 2, r=5, use_rslora=True, lora_alpha=20, target_modules=["q_proj", "down_proj"])
    adapter(base, folder / "c", 3, r=2, target_modules=["q_proj"])
    return base, {name: folder / name for name in "abc"}


def weighted(adapters, weights) -> dict[str, torch.Tensor]:
    out: dict[str, torch.Tensor] = {}
    for weight, folder in zip(weights, adapters.values()):
        for module, delta in deltas(folder).items():
            out[module] = out.get(module, 0) + weight * delta
    return out


def close(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert ours.keys() == expected.keys()
    for module in expected:
        torch.testing.assert_close(ours[module], expected[module], rtol=tolerance, atol=tolerance)


def test_concat_is_the_exact_sum_and_peft_loads_it(three, tmp_path):
    """PEFT's own combination keeps use_rslora, and scales the sum by sqrt(rank) too much; this one does not."""
    from transformers import AutoModelForCausalLM

    base, adapters = three
    weights = [0.5, -0.25, 2.0]
    merge_adapters("concat", adapters, tmp_path / "out", weights=weights)
    expected = weighted(adapters, weights)
    close(deltas(tmp_path / "out"), expected)
    found = read_adapter(tmp_path / "out")
    assert {m.rpartition(".")[2]: p.rank for m, p in found.pairs.items()} == {"q_proj": 10, "down_proj": 8}
    assert {p.scale for p in found.pairs.values()} == {1.0}
    assert not found.config["use_rslora"]
    plain = AutoModelForCausalLM.from_pretrained(base).state_dict()
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    merged = model.merge_and_unload().state_dict()
    for module, delta in expected.items():
        torch.testing.assert_close(merged[f"{module}.weight"] - plain[f"{module}.weight"], delta, rtol=1e-4, atol=1e-5)
    changed = {name for name in plain if not torch.equal(merged[name], plain[name])}
    assert changed == {f"{module}.weight" for module in expected}


def test_the_command_line_merges_adapters(three, tmp_path):
    from click.testing import CliRunner

    from fusion.cli import main

    def call(method: str, *more: str, out: str):
        models = ("--model", f"{adapters['a']}:0.5", "--model", str(adapters["b"]))
        return CliRunner().invoke(main, ["merge", method, *models, *more, "--out", str(tmp_path / out)])

    base, adapters = three
    assert "out: an adapter of 2" in call("concat", out="out").output
    close(deltas(tmp_path / "out"), weighted({name: adapters[name] for name in "ab"}, [0.5, 1.0]))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: peft" in card and "2 adapters merged by `concat`" in card and "weight: 0.5" in card
    assert call("ties", "--param", "rank=2", out="low").exit_code == 0
    assert {pair.rank for pair in read_adapter(tmp_path / "low").pairs.values()} == {2}
    refused = call("concat", "--only", "*q_proj*", out="none")
    assert refused.exit_code == 1 and "--only: adapters merge into an adapter" in refused.output
    refused = call("concat", "--base", str(base), out="none")
    assert refused.exit_code == 1 and "give it adapters alone, without a base" in refused.output
    assert not (tmp_path / "none").exists()


def test_an_adapter_is_compressed_with_its_bases_tokenizer(tmp_path):
    from fusion._compressed import compress, open_compressed

    base = save_base(tmp_path / "base", LLAMA)
    (base / "tokenizer.json").write_text("{}")
    adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    below = open_source(base)
    model = open_adapter(tmp_path / "adapter", below)
    packed = compress("one_bit", model, below, tmp_path / "packed")
    assert not (tmp_path / "packed" / "adapter_config.json").exists(), "it would be read as one"
    assert (tmp_path / "packed" / "tokenizer.json").read_text() == "{}"
    assert open_compressed(tmp_path / "packed", below).entries.keys() == packed.entries.keys()


def test_rslora_adapters_of_one_kind_keep_their_scale(tmp_path):
    from transformers import AutoModelForCausalLM

    base = save_base(tmp_path / "base", LLAMA)
    folders = {}
    for seed in (1, 2):
        folders[str(seed)] = tmp_path / str(seed)
        adapter(base, folders[str(seed)], seed, use_rslora=True, r=4, lora_alpha=8)
    merge_adapters("concat", folders, tmp_path / "out", weights=[0.5, 0.5])
    expected = weighted(folders, [0.5, 0.5])
    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "out")
    plain = load_file(base / "model.safetensors")
    for name, tensor in model.merge_and_unload().state_dict().items():
        if name.removesuffix(".weight") in expected:
            delta = expected[name.removesuffix(".weight")]
            torch.testing.assert_close(tensor - plain[name], delta, rtol=1e-4, atol=1e-5)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 8 and sorted(config["target_modules"]) == QV


def test_less_rank_is_the_closest_there_is(three, tmp_path):
    """Eckart and Young: the error of rank r is what the other singular values hold."""
    _, adapters = three
    merge_adapters("concat", adapters, tmp_path / "out", rank=3)
    expected = weighted(adapters, [1.0] * 3)
    for module, delta in deltas(tmp_path / "out").items():
        assert torch.linalg.matrix_rank(delta) == 3
        sizes = torch.linalg.svdvals(expected[module])
        torch.testing.assert_close((delta - expected[module]).norm(), sizes[3:].norm(), rtol=1e-4, atol=1e-5)


def test_elementwise_methods_work_on_updates(three, tmp_path):
    from fusion.merge import merge_tensors

    _, adapters = three
    each = [deltas(folder) for folder in adapters.values()]
    weights = [1.0, 0.5, 0.25]
    merge_adapters("ties", adapters, tmp_path / "out", weights=weights, rank=16, params={"density": 0.4})
    expected = {}
    for module, delta in each[0].items():
        zeros = torch.zeros_like(delta)
        tensors = [one.get(module, zeros) for one in each]
        expected[module] = merge_tensors("ties", tensors, base=zeros, weights=weights, density=0.4)
    close(deltas(tmp_path / "out"), expected)
    merge_adapters("task_arithmetic", adapters, tmp_path / "sum", weights=weights, params={"scale": 2.0}, rank=16)
    close(deltas(tmp_path / "sum"), {m: 2 * d for m, d in weighted(adapters, weights).items()})
    merge_adapters("linear", adapters, tmp_path / "short")
    assert {p.rank for p in read_adapter(tmp_path / "short").pairs.values()} == {5}


def test_embeddings_and_transposed_weights_merge_as_they_apply(tmp_path):
    """The merged adapter on the base is the base plus the weighted sum of what each adds."""
    base = save_base(tmp_path / "base", GPT2 | {"tie_word_embeddings": False})
    below = whole(Checkpoint.open(base))
    folders, sums = {}, {}
    for seed, weight in ((1, 0.7), (2, 0.3)):
        folders[str(seed)] = tmp_path / str(seed)
        adapter(base, folders[str(seed)], seed, target_modules=["wte", "c_attn", "c_proj"], fan_in_fan_out=True)
        for name, tensor in whole(open_adapter(folders[str(seed)], Checkpoint.open(base))).items():
            sums[name] = sums.get(name, below[name]) + weight * (tensor - below[name])
    for folder in folders.values():  # what peft saves beside a targeted embedding: the embedding itself
        file = folder / "adapter_model.safetensors"
        save_file({k: v for k, v in load_file(file).items() if "lora_" in k}, file)
    merge_adapters("concat", folders, tmp_path / "out", weights=[0.7, 0.3])
    for name, tensor in whole(open_adapter(tmp_path / "out", Checkpoint.open(base))).items():
        torch.testing.assert_close(tensor, sums[name], rtol=1e-5, atol=1e-5)


def test_adapters_that_do_not_go_together(three, plain, tmp_path):
    base, adapters = three
    wide = save_base(tmp_path / "wide", LLAMA, hidden_size=32)
    adapter(wide, tmp_path / "wider", target_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"a has factors of \(\(16,\), \(16,\)\) around their rank|wider has factors"):
        merge_adapters("concat", {**adapters, "wider": tmp_path / "wider"}, tmp_path / "out")
    adapter(base, tmp_path / "saved", modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="replaces whole tensors"):
        merge_adapters("concat", {"saved": tmp_path / "saved"}, tmp_path / "out")
    with pytest.raises(ValueError, match="concat: 2 weights for 3 models"):
        merge_adapters("concat", adapters, tmp_path / "out", weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="no parameter 'ranks'; did you mean 'rank'"):
        merge_adapters("concat", adapters, tmp_path / "out", params={"ranks": 3})
    with pytest.raises(ValueError, match="did you mean 'concat'"):
        merge_adapters("concatt", adapters, tmp_path / "out")
    for method, rank in (("concat", 0), ("linear", 2.5), ("linear", "x")):
        with pytest.raises(ValueError, match="rank: a whole number from 1 on is needed here"):
            merge_adapters(method, adapters, tmp_path / "out", rank=rank)
    spread = shutil.copytree(adapters["b"], tmp_path / "spread")
    tensors = load_file(spread / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = torch.nan
    save_file(tensors, spread / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="of 'spread' has NaN or infinity in its factors"):
        merge_adapters("concat", {**adapters, "spread": spread}, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="exists"):
        merge_adapters("concat", adapters, tmp_path / "out")


def test_best_factors_of_tall_stacks_and_of_zeros():
    """More ranks than rows, and nothing at all."""
    torch.manual_seed(0)
    a, b = torch.randn(9, 6), torch.randn(4, 9)
    for rank in (1, 3, 4, 9):
        small_a, small_b = best((a, b), rank)
        u, s, v = torch.linalg.svd(b @ a, full_matrices=False)
        torch.testing.assert_close(small_b @ small_a, (u[:, :rank] * s[:rank]) @ v[:rank], rtol=1e-5, atol=1e-5)
        dense_a, dense_b = of_dense(b @ a, rank)
        torch.testing.assert_close(dense_b @ dense_a, small_b @ small_a, rtol=1e-5, atol=1e-5)
        dense_a, dense_b = of_dense((b @ a).T.contiguous(), rank)
        torch.testing.assert_close((dense_b @ dense_a).T, small_b @ small_a, rtol=1e-5, atol=1e-5)
    for zeros in of_dense(torch.zeros(3, 4), 2):
        assert bool(torch.isfinite(zeros).all()) and not bool(zeros.any())
    zero_a, zero_b = best((torch.zeros(2, 6), torch.zeros(4, 2)), 1)
    assert torch.equal(zero_b @ zero_a, torch.zeros(4, 6))


def lego(factors, weights=None, seed=0, **params):
    return lora_lego(factors, torch.tensor(weights or [1.0] * len(factors)), draw=Draw(seed, "m", 0, 1), **params)


def test_lego_by_hand():
    """Two clusters along the first axis of A; each centre gets the mean norm of its two members, then sqrt(2 / 2)."""
    first = torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[4.0, 0.0]])  # units (3,0,4) and (0,1,0)
    second = torch.tensor([[3.0, 0.0], [0.0, -2.0]]), torch.tensor([[-4.0, 0.0]])  # units (3,0,-4) and (0,-2,0)
    a, b = lego([first, second], rank=4)
    torch.testing.assert_close(b @ a, (first[1] @ first[0] + second[1] @ second[0]) * (2 / 4) ** 0.5)
    near = torch.tensor([[3.0, 0.0], [0.0, 3.0]]), torch.tensor([[4.0, 0.0]])  # units (3,0,4) and (0,3,0)
    a, b = lego([first, near], rank=2)
    # (3,0,4) twice: itself, norm 5; (0,1,0) with (0,3,0): direction (0,1,0), mean norm 2
    units = sorted(torch.cat([a, b.T], 1).tolist())
    torch.testing.assert_close(torch.tensor(units), torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, 4.0]]))
    a, b = lego([first, near], weights=[3.0, 1.0], rank=2)  # weights count in the mean: (3 * 1 + 3) / 4 = 1.5
    torch.testing.assert_close(min(torch.cat([a, b.T], 1).tolist()), [0.0, 1.5, 0.0])
    a, b = lego([first, near], rank=1)
    assert len(a) == 1
    total = torch.tensor([[3.0, 0, 4], [0, 1, 0], [3, 0, 4], [0, 3, 0]])
    centre = total.mean(0) / total.mean(0).norm() * total.norm(dim=1).mean()
    torch.testing.assert_close(b @ a, centre[2:, None] * centre[None, :2] * 2**0.5)


def test_inputs_are_untouched_and_concat_of_one_is_that_one():
    torch.manual_seed(0)
    factors = [(torch.randn(r, 6), torch.randn(5, r)) for r in (1, 3)]
    before = [(a.clone(), b.clone()) for a, b in factors]
    weights = torch.tensor([1.0, 0.5])
    for rank in (None, 1, 2, 9):
        concat(factors, weights, rank=rank)
        lego(factors, rank=rank)
    assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(factors, before))
    a, b = concat(factors[1:], torch.tensor([1.0]))
    assert torch.equal(a, factors[1][0]) and torch.equal(b, factors[1][1])


def test_lego_is_deterministic_and_blind_to_order():
    torch.manual_seed(0)
    factors = [(torch.randn(r, 6), torch.randn(5, r)) for r in (3, 4, 2)]
    weights = [1.0, 0.5, 2.0]
    a, b = lego(factors, weights, rank=4)
    assert a.shape == (4, 6) and b.shape == (5, 4)
    again = lego(factors, weights, rank=4)
    assert torch.equal(a, again[0]) and torch.equal(b, again[1])
    turned = lego(factors[::-1], weights[::-1], rank=4)
    torch.testing.assert_close(turned[1] @ turned[0], b @ a)
    assert len(lego(factors)[0]) == 4  # the largest rank
    same = lego([factors[0], factors[0]], rank=6)
    assert len(same[0]) == 3  # no more clusters than different units
    torch.testing.assert_close(same[1] @ same[0], factors[0][1] @ factors[0][0])
    for bad, sentence in (([1.0, -1.0, 0.0], "none below 0"), ([0.0] * 3, "none below 0")):
        with pytest.raises(ValueError, match=sentence):
            lego(factors, bad)
    with pytest.raises(ValueError, match="at least 1"):
        lego(factors, rank=0)


def test_lego_of_adapters(three, tmp_path):
    _, adapters = three
    merge_adapters("lora_lego", adapters, tmp_path / "out", rank=4)
    merge_adapters("lora_lego", adapters, tmp_path / "again", rank=4)
    assert {p.rank for p in read_adapter(tmp_path / "out").pairs.values()} == {4}
    first, second = (tmp_path / n / "adapter_model.safetensors" for n in ("out", "again"))
    assert first.read_bytes() == second.read_bytes()
    merge_adapters("lora_lego", {"a": adapters["a"]}, tmp_path / "one")
    close(deltas(tmp_path / "one"), deltas(adapters["a"]))  # as many clusters as units: the adapter itself


def test_recipes_merge_adapters_in_place_and_among_themselves(small, tmp_path, monkeypatch):
    """With a base the adapted models merge, read without a copy; without one the adapters do."""
    monkeypatch.setenv("FUSION_CACHE", str(tmp_path / "cache"))
    from fusion import run
    from fusion.merge import merge_tensors

    adapter(small / "base", small / "other", seed=5, target_modules=["q_proj", "down_proj"], use_rslora=True)
    models = {**TUNED, "second": {"path": "./other", "base": "target"}}
    both, density = {"tuned": 1.0, "second": 0.5}, {"density": 0.5}
    steps = [
        {"merge": {"out": "soup", "method": "ties", "base": "target", "models": both, "params": density}},
        {"merge": {"out": "side", "method": "concat", "models": both}},
        {"merge": {"out": "low", "method": "ties", "models": both, "params": density, "rank": 16}},
    ]
    loaded = of_recipe(small, models, steps)
    assert run.main([str(loaded.path), "--out", str(tmp_path)]) == 0
    assert not list(tmp_path.glob("cache/composed-*")), "no copy"
    made = {planned.name: planned.directory for planned in plan(loaded, tmp_path).steps}
    each = [deltas(small / "adapter"), deltas(small / "other")]
    base, soup = load_file(small / "base" / "model.safetensors"), load_file(made["soup"] / "model.safetensors")
    sums, ties = deltas(made["side"]), deltas(made["low"])
    for name, tensor in base.items():
        module = name.removesuffix(".weight")
        if module not in each[0]:
            assert torch.equal(soup[name], tensor)
            continue
        updates = [one[module] for one in each]
        expected = merge_tensors("ties", updates, base=0 * tensor, weights=[1.0, 0.5], density=0.5)
        torch.testing.assert_close(soup[name] - tensor, expected, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(ties[module], expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(sums[module], updates[0] + 0.5 * updates[1], rtol=1e-4, atol=1e-5)
    assert (made["soup"] / "tokenizer.json").is_file()


def test_convolutions_are_what_peft_merges(tmp_path):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 5, (2, 3)), torch.nn.Conv2d(5, 4, 1))
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text("{}")
    save_file(net.state_dict(), tmp_path / "base" / "model.safetensors")
    model = peft.get_peft_model(net, peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0", "1"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(tmp_path / "adapter")
    ours = whole(open_adapter(tmp_path / "adapter", Checkpoint.open(tmp_path / "base")))
    for name, tensor in model.merge_and_unload().state_dict().items():
        torch.testing.assert_close(ours[name], tensor, rtol=2e-6, atol=2e-6)
    merge_adapters("concat", {"a": tmp_path / "adapter", "b": tmp_path / "adapter"}, tmp_path / "out", weights=[2, -1])
    again = whole(open_adapter(tmp_path / "out", Checkpoint.open(tmp_path / "base")))
    for name, tensor in ours.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-5, atol=1e-5)
