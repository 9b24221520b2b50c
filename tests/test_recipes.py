"""Every shipped recipe loads and is found by its name; the quickstart's path runs from end to end."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fusion import recipe, sources

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipes_load_and_are_found_by_name(file):
    loaded = recipe.load(file)
    assert loaded.result in [step.out for step in loaded.steps]
    name = str(file.relative_to(ROOT / "recipes").with_suffix(""))
    assert recipe.locate("recipes", name) == file
    assert file.read_text().startswith("# "), "a recipe says what it shows"


def test_the_quickstart_reads_nothing_but_itself():
    """No hub and no file outside recipes/, so that it runs from a wheel."""
    for name in ("quickstart", "smoke"):
        loaded = recipe.load(name)
        assert all(model.config is not None for model in loaded.models.values())
        for data in loaded.data.values():
            assert data.hub is None
            if data.path not in (None, "stdlib:"):
                assert (ROOT / "recipes") in (loaded.base / str(data.path)).resolve().parents


def test_shipped_text_is_small():
    assert sum(file.stat().st_size for file in (ROOT / "recipes" / "data").iterdir()) < 1_000_000


def test_smoke_runs_in_a_fresh_process(tmp_path):
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "fusion.run", "smoke", "--out", "runs"]
    first = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300)
    assert first.returncode == 0, first.stdout + first.stderr
    made = tmp_path / "runs" / "smoke"
    assert {"coder", "coder_says", "fused", "continued", "result"} <= {link.name for link in made.iterdir()}
    assert os.path.samefile(made / "result", made / "fused")
    assert "fused" in (made / "report.html").read_text() and json.loads((made / "report.json").read_text())
    model, tokenizer = sources.load_model(made / "result"), sources.load_tokenizer(made / "result")
    ids = tokenizer("It is a truth", return_tensors="pt")["input_ids"]
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]
    again = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and again.stdout.count("done before") == len(recipe.load("smoke").steps)
