"""Every shipped recipe loads; the quickstart's path and the papers' recipes (with tiny models) run from end to end."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fusion import recipe, sources
from fusion.run import main

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
COMMON: dict[str, Any] = {"vocab_size": 700}
GATED: dict[str, Any] = {
    **COMMON,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}
# What stands in for a hub model: the same architecture, a tokenizer of the same kind, two layers.
TINY: dict[str, tuple[dict[str, Any], str, int]] = {
    "meta-llama/Llama-2-7b-hf": ({"model_type": "llama", **GATED}, "unigram", 600),
    "openlm-research/open_llama_7b_v2": ({"model_type": "llama", **GATED}, "unigram", 500),
    "mosaicml/mpt-7b": (
        {"model_type": "mpt", "d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 256, **COMMON},
        "bpe",
        500,
    ),
    "Qwen/Qwen2.5-Math-1.5B-Instruct": ({"model_type": "qwen2", **GATED}, "bpe", 500),
    "Qwen/Qwen2.5-1.5B-Instruct": ({"model_type": "qwen2", **GATED}, "bpe", 500),
}
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}\n{% endfor %}"
SHORT = {"max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    text = (ROOT / "recipes" / "data" / "austen.txt").read_text(encoding="utf-8")
    return [" ".join(part.split()) for part in text.split("\n\n") if 80 < len(part) < 400][:48]


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory: pytest.TempPathFactory, sentences: list[str]) -> Path:
    """A directory for each hub model."""
    folder = tmp_path_factory.mktemp("models")
    for number, (hub, (config, kind, size)) in enumerate(TINY.items()):
        made = recipe.ModelRef(hub, config=config, tokenizer={"train": kind, "vocab_size": size, "data": "text"})
        # a sentence less each time, so that no two tokenizers agree
        source = sources.resolve(hub, made, folder / "cache", folder, lambda _, n=number: sentences[n:])
        directory = folder / hub.replace("/", "--")
        shutil.copytree(source, directory)
        tokenizer = sources.load_tokenizer(directory)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(directory)
    return folder


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


def substituted(file: Path, folder: Path, models: Path, sentences: list[str]) -> Path:
    """The recipe with its hub models and texts replaced, three steps a training, and nothing else changed."""
    tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    tree["models"] = {
        name: {"path": str(models / entry["hub"].replace("/", "--"))} for name, entry in tree["models"].items()
    }
    chat = any(entry.get("column") == "messages" for entry in tree["data"].values())
    rows = [
        {"messages": [{"role": "user", "content": text[:60]}, {"role": "assistant", "content": text[60:]}]}
        if chat
        else {"text": text}
        for text in sentences
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, entry in tree["data"].items():
        split = "train[40:]" if name == "held_out" else "train[:40]"
        tree["data"][name] = {"path": "rows.jsonl", "format": "json", "split": split, "column": entry["column"]}
    for step in tree["steps"]:
        for fields in step.values():
            fields.update({"max_length": 256} if "max_length" in fields else {})
            if "train" in fields:
                fields["train"] = {k: v for k, v in fields["train"].items() if k != "num_train_epochs"} | SHORT
                fields["train"]["bf16"] = False
    (folder / file.name).write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return folder / file.name


@pytest.mark.parametrize("file", sorted((ROOT / "recipes" / "papers").glob("*.yaml")), ids=lambda file: file.stem)
def test_papers_run_with_tiny_models(file, tmp_path, tiny_models, sentences):
    small = substituted(file, tmp_path, tiny_models, sentences)
    assert main([str(small), "--out", str(tmp_path / "runs")]) == 0
    made = tmp_path / "runs" / file.stem
    steps = recipe.load(file).steps
    fused = next(step for step in steps if step.verb == "distill")
    log = [json.loads(line) for line in (made / fused.out / "log.jsonl").read_text().splitlines()]
    assert log[-1]["step"] == 3 and log[-1]["target_share"] > 0.1
    metrics = json.loads((made / steps[-1].out / "metrics.json").read_text())["models"]
    assert set(metrics) == set(steps[-1].fields["models"])
    report = json.loads((made / "report.json").read_text())
    assert fused.out in json.dumps(report)
    shutil.rmtree(tmp_path / "runs")
