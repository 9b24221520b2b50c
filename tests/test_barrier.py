"""The metric barrier: by hand on a straight line, on scrambled twins; and the recipe that shows it runs."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from fusion import recipe, run, sources
from fusion.data import Document
from fusion.metrics.barrier import barrier
from fusion.metrics.bits_per_byte import bits_per_byte
from fusion.plan import plan
from tests.test_align_step import make, scrambled

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "align_apart.yaml"
TEXTS = [Document.of("The quick brown fox jumps over the lazy dog."), Document.of("There they are, others follow.")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("barrier")
    make(made, "a")
    scrambled(made, "a", "twin")
    make(made, "wide", intermediate_size=48)
    return made


def measured(folder: Path, name: str, target: str, **params):
    model, tokenizer = sources.load_model(folder / name), sources.load_tokenizer(folder / name)
    before = {key: one.clone() for key, one in model.state_dict().items()}
    found = barrier(
        model, tokenizer, TEXTS, target=target, open_model=lambda given: sources.load_model(folder / given), **params
    )
    assert all(one.equal(before[key]) for key, one in model.state_dict().items())
    return found


def test_ends_middle_and_rise(folder):
    found = measured(folder, "twin", "a", points=5)
    shares, losses = zip(*found["curve"])
    assert shares == (0.0, 0.25, 0.5, 0.75, 1.0)
    for place, name in ((0, "a"), (-1, "twin")):
        own = bits_per_byte(sources.load_model(folder / name), sources.load_tokenizer(folder / name), TEXTS)
        assert losses[place] == pytest.approx(own["bits_per_byte"], rel=1e-6)
    rises = [one - (1 - share) * losses[0] - share * losses[-1] for share, one in found["curve"]]
    assert found["barrier"] == pytest.approx(max(0.0, *rises)) and found["middle"] == losses[2]
    even = measured(folder, "twin", "a", points=2)
    assert even["barrier"] == 0 and even["middle"] == pytest.approx(found["middle"])


def test_no_barrier_to_oneself(folder):
    found = measured(folder, "a", "a")
    assert found["barrier"] == 0 and found["middle"] == found["curve"][0][1]


def test_bad_input_gets_a_sentence(folder, tmp_path):
    with pytest.raises(ValueError, match="points counts both ends"):
        measured(folder, "a", "twin", points=1)
    with pytest.raises(ValueError, match="has shapes .* only models of one architecture lie on a line"):
        measured(folder, "a", "wide", points=3)
    (folder / "t.txt").write_text("One line of text.\n")
    file = folder / "r.yaml"
    file.write_text(
        "models: {a: {path: ./a}, twin: {path: ./twin}}\ndata: {text: {path: ./t.txt}}\nsteps:\n"
        "  - evaluate: {models: [twin], metrics: [{barrier: {target: a}}], data: text}\n"
    )
    with pytest.raises(ValueError, match="barrier's target 'a' has to be one of models: twin"):
        plan(recipe.load(file), tmp_path)


def test_the_recipe_runs_on_stand_ins(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    text = RECIPE.read_text().replace("max_steps: 300", "max_steps: 3").replace("{target: a}", "{target: a, points: 3}")
    (tmp_path / "r.yaml").write_text(text.replace("per_device_train_batch_size: 16", "per_device_train_batch_size: 4"))
    shutil.copyfile(RECIPE.parent / "data" / "austen.txt", tmp_path / "data" / "austen.txt")
    monkeypatch.chdir(tmp_path)
    code = run.main([str(tmp_path / "r.yaml"), "--out", str(tmp_path / "runs")])
    assert not code
    scores = json.loads((tmp_path / "runs" / "r" / "barriers" / "metrics.json").read_text())["models"]
    assert {len(one["barrier"]["held_out"]["curve"]) for one in scores.values()} == {2, 3}
    assert scores["a"]["barrier"]["held_out"]["barrier"] == 0
    own, carried = (scores[name]["barrier"]["held_out"]["curve"][-1][1] for name in ("b", "b_aligned"))
    assert carried == pytest.approx(own, rel=1e-4)  # alignment changes no function
    assert (tmp_path / "runs" / "r" / "b_aligned" / "extras" / "maps.safetensors").is_file()
    assert torch.isfinite(torch.tensor([one[1] for one in scores["b"]["barrier"]["held_out"]["curve"]])).all()
