"""Merges in the report: numbers as the engine left them, sentences where something is odd, maps by layer and kind."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fusion import report
from fusion._merge_page import maps
from fusion._merge_report import Merge, percent, read_merge
from fusion.merge import merge_checkpoints
from fusion.recipe import load
from tests.test_report import EVIL, Reader

LAYERS = 3


def model(folder: Path, name: str, tensors: dict[str, torch.Tensor]) -> None:
    (folder / name).mkdir()
    save_file(tensors, folder / name / "model.safetensors")
    config = {"model_type": "llama", "num_hidden_layers": LAYERS, "vocab_size": 40, "hidden_size": 8}
    (folder / name / "config.json").write_text(json.dumps(config))


def finished(folder: Path, fields: str, metrics: dict):
    """A run of one merge step that left these metrics: (run, recipe, steps)."""
    names = [one.name for one in folder.iterdir() if one.is_dir() and one.name != "runs"]
    models = ", ".join(f"{name}: {{path: ./{name}}}" for name in names)
    (folder / "r.yaml").write_text(f"models: {{{models}}}\nsteps:\n  - merge: {{out: soup, {fields}}}\nresult: soup\n")
    recipe = load(folder / "r.yaml")
    directory = folder / "runs" / "soup-01234567"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.json").write_text(json.dumps(metrics))
    (directory / "step.json").write_text(json.dumps({"key": "01234567"}))
    (directory / "done.json").write_text(json.dumps({"seconds": 2.0}))
    return folder / "runs", recipe, [(recipe.steps[0], directory)]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """ties of two experts, merged by the engine, and the tensors that went in."""
    folder = tmp_path_factory.mktemp("real")
    draw = torch.Generator().manual_seed(0)
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    names += [f"model.layers.{i}.{kind}.weight" for i in range(LAYERS) for kind in ("mlp.up_proj", "norm")]
    base = {n: torch.randn((8,) if n.endswith("norm.weight") else (40, 8), generator=draw) for n in names}
    tensors = {"base": base}
    for name in ("a", "b"):
        tensors[name] = {n: t + 0.1 * torch.randn(t.shape, generator=draw) for n, t in base.items()}
        tensors[name]["model.norm.weight"] = base["model.norm.weight"]
    for name, one in tensors.items():
        model(folder, name, one)
    models = {name: folder / name for name in ("a", "b")}
    params = {"density": 0.5}
    done = merge_checkpoints(
        "ties", models, folder / "runs" / "soup", base=folder / "base", weights=[1, 1], params=params, threads=1
    )
    fields = "method: ties, base: base, models: {a: 1.0, b: 1.0}, params: {density: 0.5}"
    return finished(folder, fields, done.metrics), tensors


def test_numbers_are_those_of_the_tensors(real):
    (_, _, ((step, directory),)), tensors = real
    merge = read_merge(step, directory)
    deltas = {name: {n: t - tensors["base"][n] for n, t in tensors[name].items()} for name in ("a", "b")}
    flat = {name: torch.cat([t.flatten() for t in one.values()]).double() for name, one in deltas.items()}
    whole = torch.cat([t.flatten() for t in tensors["base"].values()]).double()
    # tensors here are smaller than a block, so all of them is what was sampled
    assert merge.lengths == pytest.approx([float(flat["a"].norm()), float(flat["b"].norm())], rel=1e-5)
    assert merge.cosines[0][1] == pytest.approx(float(torch.cosine_similarity(flat["a"], flat["b"], dim=0)), abs=1e-5)
    pulled = torch.cat([(deltas["a"][n] * t < 0).flatten() for n, t in deltas["b"].items() if n != "model.norm.weight"])
    assert merge.conflict == pytest.approx(float(pulled.double().mean()), abs=1e-6)  # of what was merged
    parts = {part.name: part for part in merge.parts}
    assert parts["model.norm.weight"].action == "equal" and parts["model.layers.1.norm.weight"].layer == 1
    same = 0 if parts["model.norm.weight"].norms else float(tensors["base"]["model.norm.weight"].norm())
    assert merge.base_length == pytest.approx(math.sqrt(float(whole.norm()) ** 2 - same**2), rel=1e-5)
    assert merge.kept == pytest.approx([0.5, 0.5], abs=0.01)


def test_the_page_shows_the_merge(real):
    made, _ = real
    report.write(*made)
    page = (made[0] / "report.html").read_text()
    reader = Reader(page)
    assert reader.open == [] and "script" not in reader.tags
    sentences = ["ties of a and b on base (density 0.5).", "Of 8 tensors 7 were merged", "1 are the same in all"]
    sentences += ["The weights add up to 2, not to 1. Around a base that is allowed", "How far the result moved"]
    for text in [*sentences, "Merge: soup", "Conflict of signs", "Cosine", "mlp.up_proj", "embed_tokens", "50 %"]:
        assert text in reader.text, text
    data = json.loads((made[0] / "report.json").read_text())["merges"]["soup"]
    assert data["method"] == "ties" and data["weights"] == [1.0, 1.0] and len(data["kept"]) == 2
    assert data["base"] == "base" and data["sentences"][0].startswith("The weights add up to 2")


def test_maps_have_kinds_down_and_layers_across(real):
    (_, _, ((step, directory),)), _ = real
    moved, conflict, cosine = maps(read_merge(step, directory))
    assert list(moved.rows) == ["mlp.up_proj", "norm", "model.embed_tokens"]
    assert [len(row) for row in moved.rows.values()] == [LAYERS, LAYERS, 1]
    assert all(0 < value < 1 for row in moved.rows.values() for value in row)
    assert all(-1 <= value <= 1 for row in cosine.rows.values() for value in row)
    assert conflict.limit <= 1


def tensor(name: str, layer: int | None, kind: str, **more) -> dict:
    norms, base = more.pop("norms", [1.0, 1.0]), more.pop("base_norm", 10.0)
    entry = {"name": name, "shape": [4, 4], "layer": layer, "kind": kind, "action": "merged", "numel": 16}
    entry |= {"norms": norms, "cosines": [[1.0, 0.5], [0.5, 1.0]], "moved": 1.0, "base_norm": base}
    return entry | {"conflict": 0.25, "kept": None} | more


def merge_of(folder: Path, tensors: list[dict], fields: str = "method: linear, models: [a, b]", **more) -> Merge:
    metrics = {"method": "linear", "params": {}, "models": ["a", "b"], "weights": [0.5, 0.5], "base": None} | more
    for name in ("a", "b", "c"):
        (folder / name).mkdir(exist_ok=True)
    ((step, directory),) = finished(folder, fields, metrics | {"tensors": tensors})[2]
    return read_merge(step, directory)


@pytest.mark.parametrize(
    ("more", "start"),
    [
        ({"weights": [0.5, 0.5]}, None),
        ({"weights": None}, None),
        (
            {"weights": [1.0, 0.5], "base": "/x/c", "method": "ties"},
            "The weights add up to 1.5, not to 1. Around a base that is allowed",
        ),
        ({"weights": [1.0, 1.0], "base": "/x/c"}, "The weights add up to 2, not to 1; linear divides by their sum"),
        ({"weights": [1.0, 1.0]}, "The weights add up to 2, not to 1; linear divides by their sum"),
        (
            {"weights": [1.0, 1.0], "params": {"normalize": False}},
            "The weights add up to 2, not to 1, and there is no ba",
        ),
    ],
)
def test_weights_that_do_not_add_up_get_a_sentence(tmp_path, more, start):
    found = merge_of(tmp_path, [tensor("w", None, "w")], **more).sentences
    assert found[0].startswith(start) if start else found == []


def test_strangers_and_outliers_get_a_sentence(tmp_path):
    base = {"base": "/elsewhere/c", "weights": [0.5, 0.5]}
    far = [
        tensor("w", None, "w", norms=[14.0, 1.0]),
        tensor("norm", None, "norm", numel=1, base_norm=1e9, norms=[0, 0]),
    ]
    for entry, numel in zip(far, (1600, 4), strict=True):
        entry["numel"] = numel
    (sentence,) = merge_of(tmp_path, far, **base).sentences
    assert sentence.startswith("a is as far from c as a model that has nothing to do with it (99 % of that distance)")
    apart = merge_of(tmp_path, [tensor("w", None, "w", norms=[10.0, 10.0])]).sentences
    assert apart[0].startswith("The models have nothing to do with one another")
    layers = [tensor(f"l.{n}.w", n, "w", moved=12.0 if n == 3 else 1.0) for n in range(10)]
    (sentence,) = merge_of(tmp_path, layers, **base).sentences
    assert sentence == "More than 5 times as far from the base as the median tensor (10 %): l.3.w (120 %)."


def test_without_a_base_only_distances_are_shown(tmp_path):
    """Two models are at opposite ends of their own mean, whatever they are: no cosine, no conflict."""
    entry = tensor("w", None, "w", moved=None, cosines=[[1.0, -1.0], [-1.0, 1.0]], conflict=1.0)
    (only,) = maps(merge_of(tmp_path, [entry]))
    assert only.title == "How far the models are apart" and only.rows == {"w": [0.1]}


def test_experts_share_a_row_and_zeros_draw_nothing(tmp_path):
    experts = [
        tensor(f"l.{n}.experts.{e}.up", n, f"experts.{e}.up", conflict=0.1 * e) for n in (0, 1) for e in range(4)
    ]
    moved, conflict, _ = maps(merge_of(tmp_path, experts, base="c"))
    assert list(conflict.rows) == ["experts.*.up"] and conflict.rows["experts.*.up"] == pytest.approx([0.15, 0.15])
    none = {"norms": None, "cosines": None, "moved": None, "base_norm": None, "conflict": None, "action": "copied"}
    merge = merge_of(tmp_path, [tensor("w", None, "w") | none])
    assert maps(merge) == [] and merge.lengths is None and merge.kept is None and merge.sentences == []
    metrics = {"method": "linear", "models": ["a", "b"], "weights": None, "tensors": [tensor("w", None, "w") | none]}
    report.write(*finished(tmp_path, "method: linear, models: [a, b]", metrics))
    assert "1 copied" in (tmp_path / "runs" / "report.html").read_text()


def test_names_break_nothing_and_malformed_files_are_named(tmp_path):
    fields = "method: linear, models: [a, b]"
    evil = [tensor(EVIL, 0, EVIL), tensor("w", 1, "w", moved=-0.0)]
    made = finished(tmp_path, fields, {"method": EVIL, "models": ["a", "b"], "weights": [1, 2], "tensors": evil})
    report.write(*made)
    assert "<script>" not in (tmp_path / "runs" / "report.html").read_text()
    for entry, sentence in (
        ({"name": "w"}, "has no kind"),
        (tensor("w", 0, "w", norms=[1.0]), "has 1 norms for 2 models"),
    ):
        with pytest.raises(ValueError, match=rf"metrics.json: .*{sentence}"):
            report.write(*finished(tmp_path, fields, {"models": ["a", "b"], "tensors": [entry]}))


def test_shares_are_written_in_two_figures():
    assert [percent(x) for x in (0.0, 0.5, 0.0342, 0.00123, 1.2)] == ["0", "50 %", "3.4 %", "0.12 %", "120 %"]
