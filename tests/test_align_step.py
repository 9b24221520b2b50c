"""The step align: a scrambled copy comes back, merges, is a model; widths, depths, ties; sentences for bad input."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignment import Maps, find_family
from fusion import sources
from fusion.job import Job
from fusion.plan import plan
from fusion.recipe import load
from fusion.steps.align import align
from fusion.steps.merge import merge
from recipes.scramble import scramble
from tests.tokenizers import TEXT, build

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 4}


def make(folder: Path, name: str, text: list[str] = TEXT, **config) -> Path:
    """A tiny llama with a tokenizer trained on a text."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = build("byte_level", text, 400)
    backend.add_special_tokens(["<s>", "</s>"])
    tokens = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    ids = {"bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id, "pad_token_id": None}
    torch.manual_seed(sum(map(ord, name)))
    sizes = {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": False, **config}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens), **sizes, **ids)).save_pretrained(folder / name)
    tokens.save_pretrained(folder / name)
    return folder / name


def scrambled(folder: Path, name: str, new: str) -> None:
    """A copy of a model in other units: the same function."""
    recipe = load(recipe_of(folder, f"  - recipes.scramble: {{out: {new}, model: {name}}}\n"))
    (folder / new).mkdir()
    scramble(Job(new, folder / new, recipe), out=new, model=name, seed=1)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """a, twin (a scrambled), tied, tied_twin, other, wide, deep. A folder."""
    folder = tmp_path_factory.mktemp("models")
    make(folder, "a")
    make(folder, "tied", tie_word_embeddings=True)
    for name, twin in (("a", "twin"), ("tied", "tied_twin")):
        config = json.loads((folder / name / "config.json").read_text())
        tensors = load_file(folder / name / "model.safetensors")
        gains = [key for key in tensors if "norm" in key]
        generator = torch.Generator().manual_seed(5)
        tensors |= {key: tensors[key] + 0.3 * torch.rand(tensors[key].shape, generator=generator) for key in gains}
        save_file(tensors, folder / name / "model.safetensors", {"format": "pt"})
        assert config["model_type"] == "llama"
        scrambled(folder, name, twin)
    make(folder, "wide", intermediate_size=48)
    make(folder, "deep", num_hidden_layers=3)
    return folder


def recipe_of(folder: Path, steps: str, data: str = "") -> Path:
    paths = ", ".join(f"{one.name}: {{path: ./{one.name}}}" for one in sorted(folder.iterdir()) if one.is_dir())
    file = folder / "r.yaml"
    file.write_text(f"models: {{{paths}}}\n{data}steps:\n{steps}")
    return file


def run(folder: Path, fields: str, tmp_path: Path, data: str = "") -> Path:
    """The directory that an align step with these fields leaves."""
    file = recipe_of(folder, f"  - align: {{out: new, {fields}}}\n", data)
    planned = plan(load(file), tmp_path / "runs").steps[0]
    made = tmp_path / "made"
    made.mkdir(parents=True)
    align(Job("new", made, load(file), place="steps[0].align"), **planned.arguments)
    return made


def logits(directory: Path) -> torch.Tensor:
    model = sources.load_model(directory)
    with torch.no_grad():
        return model(torch.arange(4, 60)[None]).logits


@pytest.mark.parametrize("match", ["hungarian", "{sinkhorn: {epsilon: 0.01}}"])
def test_a_scrambled_copy_comes_back_and_merges(models, tmp_path, match):
    made = run(models, f"target: a, donor: twin, match: {match}", tmp_path)
    target, carried = load_file(models / "a" / "model.safetensors"), load_file(made / "model.safetensors")
    assert carried.keys() == target.keys()
    for name, tensor in target.items():
        torch.testing.assert_close(carried[name], tensor, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(made), logits(models / "twin"), rtol=1e-3, atol=1e-4)
    assert (made / "tokenizer.json").read_bytes() == (models / "a" / "tokenizer.json").read_bytes()
    found = json.loads((made / "metrics.json").read_text())
    assert found["folded"] and found["from_target"] == {} and found["left_out"] == []
    assert found["distance"]["aligned"] < 1e-4 < 0.1 < found["distance"]["naive"]
    assert found["spaces"]["layers.0.mlp"]["matched"] == 1.0
    Maps.load(made / "extras" / "maps.safetensors").check(
        find_family({**config_of(models / "a"), "norms_folded": True})
    ) if (match == "hungarian") else None
    file = recipe_of(models, "  - merge: {out: soup, method: linear, models: {a: 0.5, new: 0.5}}\n")
    soup = tmp_path / "soup"
    soup.mkdir()
    job = Job("soup", soup, load(file), place="steps[0].merge", outputs={"new": made})
    merge(job, out="soup", method="linear", models={"a": 0.5, "new": 0.5})
    torch.testing.assert_close(logits(soup), logits(models / "a"), rtol=1e-3, atol=1e-4)


def config_of(directory: Path) -> dict:
    return json.loads((directory / "config.json").read_text())


def test_a_tied_head_stays_tied_or_is_untied_when_asked(models, tmp_path):
    made = run(models, "target: tied, donor: tied_twin", tmp_path)
    assert not json.loads((made / "metrics.json").read_text())["folded"]
    assert config_of(made)["tie_word_embeddings"] and "lm_head.weight" not in load_file(made / "model.safetensors")
    torch.testing.assert_close(logits(made), logits(models / "tied_twin"), rtol=1e-3, atol=1e-4)
    shutil.rmtree(made)
    made = run(models, "target: tied, donor: tied_twin, untie: true", tmp_path)
    config, tensors = config_of(made), load_file(made / "model.safetensors")
    assert config["tie_word_embeddings"] is False and "lm_head.weight" in tensors and "norms_folded" not in config
    torch.testing.assert_close(logits(made), logits(models / "tied_twin"), rtol=1e-3, atol=1e-4)


def test_a_narrow_donor_fills_a_wide_target(models, tmp_path):
    made = run(models, "target: wide, donor: twin, match: emd", tmp_path)
    assert {name: t.shape for name, t in load_file(made / "model.safetensors").items()} == {
        name: t.shape for name, t in load_file(models / "wide" / "model.safetensors").items()
    }
    torch.testing.assert_close(logits(made), logits(models / "a"), rtol=1e-3, atol=1e-4)  # 24 to 48 is exact
    space = json.loads((made / "metrics.json").read_text())["spaces"]["layers.0.mlp"]
    assert space["units"] == 48 and space["donor_units"] == 24 and space["marginal_error"] < 1e-6
    shutil.rmtree(made)
    made = run(models, "target: wide, donor: twin", tmp_path)  # hungarian: the others stay the target's
    found = json.loads((made / "metrics.json").read_text())
    assert found["units_from_target"] == {"layers.0.mlp": 24, "layers.1.mlp": 24}


def test_layers_are_compared_on_data(models, tmp_path):
    (models / "t.txt").write_text("\n\n".join(TEXT * 3))
    data = "data:\n  text: {path: ./t.txt, format: text, max_bytes: 200}\n"
    made = run(models, "target: deep, donor: twin, data: text", tmp_path, data)
    found = json.loads((made / "metrics.json").read_text())
    assert 1 <= len(found["layers"]) <= 2
    assert any(key.startswith("layers.") for key in found["from_target"])
    assert len(load_file(made / "model.safetensors")) == len(load_file(models / "deep" / "model.safetensors"))
    sources.load_model(made)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ("target: a, donor: twin, match: hungarain", "unknown match word 'hungarain'|did you mean 'hungarian'"),
        ("target: a, donor: twin, match: procrustes", "align.match: procrustes is what spaces that rotate take"),
        ("target: a, donor: twin, match: {sinkhorn: {epsilom: 1}}", "no parameter 'epsilom'; did you mean 'epsilon'"),
        ("target: a, donor: twin, sweeps: 0", "sweeps: it is 0"),
        ("target: a, donor: twin, untie: true", "untie: the head of a is not tied"),
        ("target: deep, donor: a", "deep has 3 layers and a 2; give data"),
        ("target: a, donor: tied", "no such thing"),
    ],
)
def test_bad_input_gets_a_sentence_while_planning(models, tmp_path, fields, sentence):
    file = recipe_of(models, f"  - align: {{out: new, {fields}}}\n")
    if sentence == "no such thing":  # another number of heads is no mistake
        plan(load(file), tmp_path)
        return
    with pytest.raises(ValueError, match=sentence):
        plan(load(file), tmp_path)


def test_families_and_tokens_that_do_not_correspond(models, tmp_path):
    odd = tmp_path / "models"
    shutil.copytree(models / "a", odd / "a")
    shutil.copytree(models / "a", odd / "falcon")
    config = config_of(odd / "falcon")
    (odd / "falcon" / "config.json").write_text(json.dumps({**config, "model_type": "falcon"}))
    file = recipe_of(odd, "  - align: {out: new, target: a, donor: falcon}\n")
    with pytest.raises(ValueError, match=r"align.donor: the spaces of 'falcon' are not known, those of bert, .*trace"):
        plan(load(file), tmp_path)
    make(odd, "b", ["entirely different words: zebra quartz"] * 4)
    shutil.rmtree(odd / "falcon")
    file = recipe_of(odd, "  - align: {out: new, target: a, donor: b}\n")
    made = tmp_path / "made"
    made.mkdir()
    with pytest.raises(ValueError, match="a and b have other tokens, .* retokenize: {out: ..., model: b, base: a}"):
        align(Job("new", made, load(file), place="steps[0].align"), out="new", target="a", donor="b")


def test_several_models_meet_in_one_universe(models, tmp_path):
    scrambled_again = models / "third"
    if not scrambled_again.exists():
        shutil.copytree(models / "twin", scrambled_again)
    made = run(models, "target: a, donor: twin, among: [third, a, twin]", tmp_path)
    target, carried = load_file(models / "a" / "model.safetensors"), load_file(made / "model.safetensors")
    for name, tensor in target.items():
        torch.testing.assert_close(carried[name], tensor, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(made), logits(models / "twin"), rtol=1e-3, atol=1e-4)
    found = json.loads((made / "metrics.json").read_text())
    assert found["among"] == ["third", "a", "twin"] and found["distance"]["aligned"] < 1e-4


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ("among: [a, wide]", "among: the donor 'twin' is not among a, wide"),
        ("among: [a, twin, a]", "among: 'a' is given 2 times"),
        ("among: [a, twin], match: emd", r"one for one \(hungarian\); leave out match: emd"),
        ("among: [a, twin, nobody]", "nobody"),
        ("among: [a, twin], donor: wide", "not among"),
    ],
)
def test_among_bad_input_gets_a_sentence(models, tmp_path, fields, sentence):
    donor = "" if "donor" in fields else ", donor: twin"
    file = recipe_of(models, f"  - align: {{out: new, target: a{donor}, {fields}}}\n")
    with pytest.raises(ValueError, match=sentence):
        plan(load(file), tmp_path)


def test_networks_of_other_sizes_have_no_universe(models, tmp_path):
    with pytest.raises(ValueError, match=r"a and wide are networks of other sizes \('layers.0.mlp'\), and have no uni"):
        run(models, "target: a, donor: twin, among: [a, twin, wide]", tmp_path)
    file = recipe_of(models, "  - align: {out: new, target: a, donor: wide, among: [a, wide]}\n")
    with pytest.raises(ValueError, match="align.among: a and wide are networks of other sizes"):
        plan(load(file), tmp_path)
