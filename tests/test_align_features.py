"""Step align by activations: planted units are found by what they do, across tokenizers too; spaces that may move."""

import json
import re
import resource
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignment import find_family
from alignment.features.activations import Pair as Batch
from alignment.maps import Index, Maps
from alignment.tokens import shared_boundaries
from fusion import sources
from fusion._align import pair_of
from fusion._estimate import estimate
from fusion._features import described, paired
from fusion.data import encode
from fusion.job import Job
from fusion.plan import plan
from fusion.recipe import load
from tests.test_align_step import config_of, logits, make, recipe_of, run, scrambled
from tests.tokenizers import TEXT

DATA = "data:\n  text: {path: ./t.txt, format: text, max_bytes: 400}\n  little: {path: ./l.txt, format: text}\n"


def edited(directory: Path, **tensors: torch.Tensor) -> None:
    """Puts tensors of these names (dots for two underscores) into a checkpoint."""
    file = directory / "model.safetensors"
    found = load_file(file) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: one.contiguous() for name, one in found.items()}, file, {"format": "pt"})


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """a, twin (a scrambled), renumbered (twin, whose tokens have other numbers), other (other tokens), gpt, deep."""
    folder = tmp_path_factory.mktemp("models")
    make(folder, "a")
    scrambled(folder, "a", "twin")
    shutil.copytree(folder / "twin", folder / "renumbered")
    content = json.loads((folder / "twin" / "tokenizer.json").read_text())
    size = len(content["model"]["vocab"])
    first = size - 40  # the last 40 tokens in reverse; special ones come before
    order = [*range(first), *reversed(range(first, size))]
    special = {one["id"] for one in content["added_tokens"]}
    order = [n if n in special or order[n] in special else order[n] for n in range(size)]
    content["model"]["vocab"] = {token: order[number] for token, number in content["model"]["vocab"].items()}
    (folder / "renumbered" / "tokenizer.json").write_text(json.dumps(content))
    tensors = load_file(folder / "twin" / "model.safetensors")
    rows = torch.tensor(order + list(range(size, len(tensors["lm_head.weight"])))).argsort()
    edited(
        folder / "renumbered",
        model__embed_tokens__weight=tensors["model.embed_tokens.weight"][rows],
        lm_head__weight=tensors["lm_head.weight"][rows],
    )
    make(folder, "other", ["entirely different words: zebra quartz"] * 4)
    make(folder, "deep", num_hidden_layers=3)
    (folder / "t.txt").write_text("\n\n".join(TEXT * 3))
    (folder / "l.txt").write_text("Few.")
    return folder


def job_of(models: Path, tmp_path: Path) -> Job:
    return Job("new", tmp_path, load(recipe_of(models, "  - align: {out: new, target: a, donor: twin}\n", DATA)))


def test_planted_units_are_found_by_what_they_do(models, tmp_path):
    job = job_of(models, tmp_path)
    pair = pair_of(job, "a", "twin", False)
    found = described(job, pair, "activations", "text", None)
    layered = {f"layers.{number}.{name}" for number in (0, 1) for name in ("kv", "mlp")}
    assert set(found.tables) == {"residual", *layered} and found.tokens > 200
    maps = find_family(config_of(models / "a")).random_symmetry(1).maps
    heads, queries, planted = (maps[f"layers.1.{name}"] for name in ("kv", "q", "mlp"))
    assert isinstance(heads, Index) and isinstance(queries, Index) and isinstance(planted, Index)
    looks = found.tables["layers.1.kv"]  # (groups, queries, groups, queries), target by donor
    for group, own in enumerate(heads.index.tolist()):
        for query, its in enumerate(queries.index[group].tolist()):
            assert looks[own, its, group, query] == pytest.approx(1.0, abs=1e-4)
    assert looks.flatten(2).flatten(0, 1).gt(0.99).sum() == 4
    table = found.tables["layers.1.mlp"]
    torch.testing.assert_close(table.abs().max(1).values, torch.ones(24))
    assert table.abs().argmax(1)[planted.index].equal(torch.arange(24))


def test_a_scrambled_copy_comes_back(models, tmp_path):
    made = run(models, "target: a, donor: twin, features: activations, data: text", tmp_path, DATA)
    for name, tensor in load_file(models / "a" / "model.safetensors").items():
        torch.testing.assert_close(load_file(made / "model.safetensors")[name], tensor, rtol=1e-3, atol=1e-4)
    metrics = json.loads((made / "metrics.json").read_text())
    assert metrics["features"] == "activations" and metrics["dead"]["layers.0.mlp"] == [0, 0]
    assert metrics["tokens"] > 200 and metrics["distance"]["aligned"] < 1e-3


def test_other_tokens_are_paired_and_their_rows_stay_the_targets(models, tmp_path):
    made = run(models, "target: a, donor: renumbered, features: activations, data: text", tmp_path, DATA)
    torch.testing.assert_close(logits(made), logits(models / "a"), rtol=1e-3, atol=1e-4)
    metrics = json.loads((made / "metrics.json").read_text())
    assert set(metrics["from_target"]) == {"embed.weight", "head.weight"}
    assert (made / "tokenizer.json").read_bytes() == (models / "a" / "tokenizer.json").read_bytes()
    job = job_of(models, tmp_path)
    pair = pair_of(job, "a", "other", False, text=True)
    batches = list(paired(job, pair, "text", "read"))
    assert len(batches) > 3 and all(isinstance(one, Batch) for one in batches)
    both = [encode(sources.load_tokenizer(models / name), job.documents("text")[0]) for name in ("a", "other")]
    i, j = shared_boundaries(both[0].ends[:256], both[1].ends[:256])
    assert batches[0].target["input_ids"][0].tolist() == both[0].ids[:256].tolist()
    assert batches[0].target_rows.tolist() == i.tolist() and batches[0].donor_rows.tolist() == j.tolist()
    assert len(i) < len(both[0].ids) and len(both[0].ids) != len(both[1].ids)


@pytest.mark.parametrize(("memory", "passes"), [(1, 7), (5000, 5), (9217, 3)])
def test_in_less_memory_the_numbers_are_the_same(models, tmp_path, monkeypatch, memory, passes):
    """Five places of the stream of 16 units take 2,048 bytes each, and then two of 24 neurons 4,608."""
    job = job_of(models, tmp_path)
    pair = pair_of(job, "a", "twin", False)
    whole, reads = described(job, pair, "activations", "text", None), []

    def counted(*given, **more):
        reads.append(given[3])
        return paired(*given, **more)

    monkeypatch.setattr("fusion._features.paired", counted)
    found = described(job, pair, "activations", "text", None, memory)
    assert found.dead == whole.dead and found.tokens == whole.tokens and found.tables.keys() == whole.tables.keys()
    assert all(one.equal(whole.tables[name]) for name, one in found.tables.items())
    assert reads.count("activations") == passes and not any(tmp_path.iterdir())


def test_of_other_depth_layers_and_units_are_compared_on_data(models, tmp_path):
    made = run(models, "target: deep, donor: twin, features: activations, data: text", tmp_path, DATA)
    found = json.loads((made / "metrics.json").read_text())
    assert 1 <= len(found["layers"]) <= 2
    assert {f"layers.{own}.mlp" for own in found["layers"]} | {"residual"} == set(found["dead"])
    sources.load_model(made)


@pytest.mark.parametrize("features", ["weights", "activations"])
def test_only_the_spaces_asked_for_move(models, tmp_path, features):
    folder = tmp_path / "models"
    shutil.copytree(models, folder)
    tensors, config = load_file(folder / "a" / "model.safetensors"), config_of(folder / "a")
    spaces = find_family(config)
    moved = {name: map for name, map in spaces.random_symmetry(3).maps.items() if name.endswith("mlp")}
    edited(folder / "twin", **{n.replace(".", "__"): t for n, t in Maps(spaces, spaces, moved).carry(tensors).items()})
    data = ", data: text" if features != "weights" else ""
    asked = f"target: a, donor: twin, features: {features}, spaces: ['layers.*.mlp']{data}"
    carried = load_file(run(folder, asked, tmp_path, DATA) / "model.safetensors")
    for name, tensor in tensors.items():
        if ".mlp." in name:
            torch.testing.assert_close(carried[name], tensor, rtol=1e-4, atol=1e-5)
        else:
            assert carried[name].equal(tensor)
    shutil.rmtree(tmp_path / "made")
    made = run(folder, "target: a, donor: twin, spaces: [residual]", tmp_path)
    assert set(json.loads((made / "metrics.json").read_text())["spaces"]) == {"residual"}
    torch.testing.assert_close(logits(made), logits(folder / "a"), rtol=1e-3, atol=1e-4)


def test_planning_says_what_is_wrong(models, tmp_path):
    for fields, sentence in {
        "features: activations": "features 'activations' are read off data; give: data",
        "features: activatoins": "unknown feature 'activatoins'; did you mean 'activations'",
        "features: {activations: {kind: cosine}}, data: text": "kind: 'correlation' or 'product' is needed",
        "spaces: ['layers.*.mpl']": r"no space is called like 'layers.\*.mpl'; did you mean 'layers.\d.mlp'",
    }.items():
        file = recipe_of(models, f"  - align: {{out: new, target: a, donor: twin, {fields}}}\n", DATA)
        with pytest.raises(ValueError, match=sentence):
            plan(load(file), tmp_path)
    folder = tmp_path / "models"
    shutil.copytree(models, folder)
    (folder / "twin" / "config.json").write_text(json.dumps({**config_of(models / "twin"), "model_type": "bert"}))
    file = recipe_of(folder, "  - align: {out: new, target: a, donor: twin, features: activations, data: text}\n", DATA)
    with pytest.raises(ValueError, match="'activations' are those of language models on text, and twin is none"):
        plan(load(file), tmp_path)


def test_the_estimate_of_memory_follows_the_budget(tmp_path):
    (tmp_path / "t.txt").write_text("text")
    sizes = "hidden_size: 4096, intermediate_size: 14336, num_hidden_layers: 32, vocab_size: 32000"
    large = f"{{config: {{model_type: llama, {sizes}}}, tokenizer: {{train: bpe, vocab_size: 32000, data: text}}}}"
    needs = []
    for fields in ("sweeps: 5", "features: activations, memory: 1GiB", "features: activations"):
        file = tmp_path / "r.yaml"
        file.write_text(
            f"models: {{one: {large}, two: {large}}}\ndata: {{text: {{path: ./t.txt, format: text}}}}\n"
            f"steps:\n  - align: {{out: new, target: one, donor: two, data: text, {fields}}}\n"
        )
        needs.append(estimate(plan(load(file), tmp_path))[-1].memory or 0)
    assert needs[2] - needs[1] == 3 * 2**30 and needs[0] < needs[1] - 2**30


def test_without_tokenizers_rows_correspond_by_number(models, tmp_path):
    folder = tmp_path / "models"
    shutil.copytree(models, folder)
    for name in ("a", "twin"):
        (folder / name / "tokenizer.json").unlink()
    made = run(folder, "target: a, donor: twin", tmp_path)
    torch.testing.assert_close(logits(made), logits(models / "a"), rtol=1e-3, atol=1e-4)
    (folder / "t.txt").write_text(" ".join(str(7 * one * one % 402) for one in range(500)))
    made = run(folder, "target: a, donor: twin, features: activations, data: text", tmp_path / "active", DATA)
    torch.testing.assert_close(logits(made), logits(models / "a"), rtol=1e-3, atol=1e-4)
    make(folder, "less", ["entirely different words: zebra quartz"] * 4)
    (folder / "less" / "tokenizer.json").unlink()
    for features in ("weights", "activations"):
        with pytest.raises(ValueError, match=r"a has 402 tokens and less \d+; without tokenizers, rows corresp"):
            run(folder, f"target: a, donor: less, features: {features}, data: text", tmp_path / features, DATA)


def test_data_that_tell_too_little_get_a_sentence(models, tmp_path):
    folder = tmp_path / "models"
    shutil.copytree(models, folder)
    given = "target: a, donor: twin, features: activations"
    with pytest.raises(ValueError, match=r"data: \d+ tokens of little cannot tell \d+ units of '.*' apart; give at"):
        run(folder, f"{given}, data: little", tmp_path, DATA)
    shutil.rmtree(tmp_path / "made")
    gate = "model__layers__1__mlp__gate_proj__weight"
    edited(folder / "twin", **{gate: torch.zeros(24, 16)})
    with pytest.raises(ValueError, match="all units of 'layers.1.mlp' in twin are dead: none varies on text"):
        run(folder, f"{given}, data: text", tmp_path, DATA)
    shutil.rmtree(tmp_path / "made")
    edited(folder / "twin", **{gate: torch.full((24, 16), 1e30)})
    with pytest.raises(ValueError, match=re.escape("layers.1.mlp.down_proj reads is not finite in the donor")):
        run(folder, f"{given}, data: text", tmp_path, DATA)
    shutil.rmtree(tmp_path / "made")
    (folder / "twin" / "tokenizer.json").unlink()
    (folder / "a" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="align.data: no model here has a tokenizer.*below 402 .*The quick"):
        run(folder, f"{given}, data: text", tmp_path, DATA)


def test_one_dead_unit_is_counted(models, tmp_path, capsys):
    folder = tmp_path / "models"
    shutil.copytree(models, folder)
    up = load_file(folder / "a" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    edited(folder / "a", model__layers__0__mlp__up_proj__weight=torch.cat([up[:23], 0 * up[23:]]))
    made = run(folder, "target: a, donor: twin, features: activations, data: text", tmp_path, DATA)
    assert json.loads((made / "metrics.json").read_text())["dead"]["layers.0.mlp"] == [1, 0]
    assert "Units of a that never vary on the data went by their weights: 1 of layers.0.mlp." in capsys.readouterr().out


@pytest.mark.slow
def test_a_real_network_is_found_by_what_it_does(smollm2, tmp_path, capsys):
    folder = tmp_path / "models"
    shutil.copytree(smollm2, folder / "a")
    scrambled(folder, "a", "twin")
    shutil.copyfile(Path(__file__).parents[1] / "recipes" / "data" / "austen.txt", folder / "t.txt")
    data = DATA.replace("max_bytes: 400", 'max_bytes: 1000, split: "train[:16]"')
    begun = time.perf_counter()
    made = run(folder, "target: a, donor: twin, features: activations, data: text", tmp_path, data)
    took, peak = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    found = json.loads((made / "metrics.json").read_text())
    with capsys.disabled():
        print(f"\n{found['tokens']} tokens, {took:.0f} s, {peak:.1f} GB, distance {found['distance']}")
    planted = find_family(config_of(folder / "a")).random_symmetry(1)
    maps = Maps.load(made / "extras" / "maps.safetensors").maps
    for name in found["dead"]:
        own, other = maps[name], planted.maps[name]
        assert isinstance(own, Index) and isinstance(other, Index)
        assert other.index[own.index].equal(torch.arange(len(own.index))), name
    assert found["distance"]["aligned"] < 0.01 < 1 < found["distance"]["naive"]
