"""The field repair of the step align: means of several units vary as their units do on average; permutations stay."""

import json
import math
from functools import partial, wraps

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from alignment import Maps, align, find_family
from alignment.maps import Plan
from alignment.match.sinkhorn import sinkhorn
from alignment.repair import carried, output_moments, restore
from fusion import sources
from fusion._align import pair_of
from fusion._features import LOOKS, paired
from fusion.job import Job
from fusion.plan import plan
from fusion.recipe import load
from tests.networks import build
from tests.test_align_step import make, recipe_of, run, scrambled
from tests.tokenizers import TEXT

DATA = "data:\n  text: {path: ./t.txt, format: text, max_bytes: 400}\n"
SOFT = "match: {sinkhorn: {epsilon: 0.1}}"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """a, twin (a scrambled), wide (twice the neurons). A folder."""
    folder = tmp_path_factory.mktemp("models")
    make(folder, "a", initializer_range=0.2)
    scrambled(folder, "a", "twin")
    make(folder, "wide", intermediate_size=48)
    (folder / "t.txt").write_text("\n\n".join(TEXT * 2))
    return folder


def weights(made):
    return load_file(made / "model.safetensors")


def test_means_of_units_vary_as_their_units_do(models, tmp_path, monkeypatch):
    fields = f"target: wide, donor: twin, {SOFT}, data: text"
    plain = run(models, f"{fields}, repair: false", tmp_path / "false", DATA)
    runs, block = [], LlamaDecoderLayer.forward
    counted = wraps(block)(lambda *args, **given: (runs.append(1), block(*args, **given))[1])
    monkeypatch.setattr(LlamaDecoderLayer, "forward", counted)
    made = run(models, f"{fields}, repair: true", tmp_path / "true", DATA)
    monkeypatch.undo()
    recipe = load(recipe_of(models, "  - align: {out: new, target: wide, donor: twin}\n", DATA))
    job = Job("new", tmp_path, recipe)
    batches = list(paired(job, pair_of(job, "wide", "twin", False), "text", "read", tokens=LOOKS))
    inputs = [one.target for one in batches]
    # two blocks: the donor's, the target's as they are, three layers of each, and the first one restored
    assert len(runs) == (2 + 2 + 6 + 1) * len(batches)
    moments = {name: output_moments(sources.load_model(one), inputs) for name, one in (("plain", plain), ("new", made))}
    donor = output_moments(sources.load_model(models / "twin"), [one.donor for one in batches])
    maps = Maps.load(made / "extras" / "maps.safetensors").maps
    for number in range(2):
        map = maps[f"layers.{number}.mlp"]
        assert isinstance(map, Plan)
        for projection, shares in (("up_proj", map.write.abs()), ("gate_proj", map.even)):
            name = f"model.layers.{number}.mlp.{projection}"
            wanted = shares @ donor[name][1]
            torch.testing.assert_close(moments["new"][name][1], wanted, rtol=1e-4, atol=1e-9)
            assert (moments["plain"][name][1] < wanted).all()
        name = f"model.layers.{number}.mlp.down_proj"  # into a stream that rotates
        norms = [one[name][1].norm() for one in (moments["new"], donor)]
        torch.testing.assert_close(*norms, rtol=1e-4, atol=1e-9)
    factors = json.loads((made / "metrics.json").read_text())["repaired"]
    assert len(factors) == 6 and factors["model.layers.0.mlp.up_proj"] > 1
    before, after = weights(plain), weights(made)
    assert {name for name, one in before.items() if not one.equal(after[name])} == {f"{one}.weight" for one in factors}


def test_permutations_stay_bit_by_bit_and_couplings_that_are_one_nearly(models, tmp_path):
    fields = "target: a, donor: twin, data: text"
    plain, made = (run(models, f"{fields}, repair: {one}", tmp_path / one, DATA) for one in ("false", "true"))
    assert all(one.equal(weights(made)[name]) for name, one in weights(plain).items())
    assert json.loads((made / "metrics.json").read_text())["repaired"] == {}
    made = run(models, f"{fields}, match: emd, repair: true", tmp_path / "coupled", DATA)
    factors = json.loads((made / "metrics.json").read_text())["repaired"]
    assert len(factors) == 6 and all(math.isclose(one, 1, abs_tol=1e-6) for one in factors.values()), factors


def test_of_layers_with_biases_means_move_too():
    """GPT-2, whose layers store their weights (in, out), into half of its neurons."""
    ids = [torch.randint(0, 61, (4, 30), generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    sizes = {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 32, "initializer_range": 0.3}
    torch.manual_seed(0)
    configs = [transformers.GPT2Config(**sizes, n_inner=width) for width in (48, 96)]
    target, donor = (build("GPT2LMHeadModel", config) for config in configs)
    for parameter in donor.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    states = [dict(one.state_dict()) for one in (target, donor)]
    spaces = [find_family(config.to_dict(), frozenset(one)) for config, one in zip(configs, states)]
    found = align(states[0], states[1], *spaces, match=partial(sinkhorn, epsilon=0.1))
    target.load_state_dict(found.carry(states[1], into=states[0]))
    goals = carried(found, target, donor, ids)
    assert len(goals) == 4
    factors = restore(target, goals, ids)
    after, before = (output_moments(one, ids, list(goals)) for one in (target, donor))
    for number in range(2):
        name = f"transformer.h.{number}.mlp.c_fc"
        map = found.maps[f"layers.{number}.mlp"]
        assert isinstance(map, Plan) and factors[name] > 1.05
        for own, other in zip(after[name], before[name]):
            torch.testing.assert_close(own, map.even @ other)


def test_it_needs_data(models, tmp_path):
    with pytest.raises(ValueError, match="repair: deviations are measured on data; give: data"):
        plan(load(recipe_of(models, "  - align: {out: n, target: a, donor: twin, repair: true}\n", DATA)), tmp_path)
