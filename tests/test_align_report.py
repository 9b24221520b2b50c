"""Alignments and barriers in the report: numbers as the step and the metric left them, plans by hand, escapes."""

import html
import json
import re
from pathlib import Path

import pytest
import torch

from alignment.maps import Index, Matrix, Plan, Turn
from fusion import report
from fusion._align_metrics import _picture
from fusion._align_page import maps, plans
from fusion._align_report import Alignment, read_alignment
from fusion.recipe import Recipe, Step, load
from tests.test_report import EVIL, KEY, Reader, written

RECIPE = """models: {a: {path: ./a}, b: {path: ./b}}
data: {text: {path: ./t.txt}}
steps:
  - align: {out: b_aligned, target: a, donor: b, features: activations, data: text}
  - evaluate: {out: barriers, models: [a, b, b_aligned], metrics: [{barrier: {target: a}}], data: text}
"""
SPACES = {
    "residual": {"group": "orthogonal", "units": 4, "donor_units": 4, "copies": 1, "plan": [[0.25] * 4] * 4},
    "layers.0.mlp": {"units": 8, "donor_units": 8, "copies": 1, "moved": 2, "matched": 1.0},
    "layers.1.mlp": {"units": 8, "donor_units": 8, "copies": 1, "moved": 8, "matched": 0.5},
    "layers.1.q": {"units": 2, "donor_units": 2, "copies": 4, "moved": 4, "matched": 1.0, "effective_support": 3.0},
}
TENSORS = [
    {"name": "l.0.up.weight", "layer": 0, "kind": "up.weight", "numel": 10, "naive": 1.4, "aligned": 0.7},
    {"name": "l.1.up.weight", "layer": 1, "kind": "up.weight", "numel": 10, "naive": 1.2, "aligned": 0.3},
    {"name": "embed.weight", "layer": None, "kind": "embed.weight", "numel": 30, "aligned": 0.5},
]
FOUND = {
    **{"target": "a", "donor": "b", "match": "hungarian", "features": "activations", "tokens": 16400, "folded": True},
    **{"from_target": {"embed.weight": "target and donor have other tokens"}, "units_from_target": {"layers.1.mlp": 4}},
    **{"left_out": ["head.bias"], "dead": {"layers.0.mlp": [0, 3]}, "layers": {"0": 1, "1": 2}},
    **{"distance": {"naive": 1.15, "aligned": 0.68}, "spaces": SPACES, "tensors": TENSORS},
}
CURVE = [[n / 24, 2.0 + 0.3 * (n / 24) + 2.4 * (n / 24) * (1 - n / 24)] for n in range(25)]


def finished(folder: Path, found: dict, curve: list) -> tuple[Path, Recipe, list[tuple[Step, Path]]]:
    """A finished run of the recipe: `found` by the align step, the curve under b, half of its rise under b_aligned."""
    (folder / "recipe.yaml").write_text(RECIPE)
    recipe, run = load(folder / "recipe.yaml"), folder / "runs" / "recipe"
    half = [[x, y - 1.2 * x * (1 - x)] for x, y in curve]
    rises = {"a": (0.0, curve[:2]), "b": (0.6, curve), "b_aligned": (0.3, half)}
    models = {
        name: {"barrier": {"text": {"target": "a", "barrier": rise, "at": 0.5, "middle": 3.0, "curve": line}}}
        for name, (rise, line) in rises.items()
    }
    steps = []
    for step, metrics in zip(recipe.steps, (found, {"models": models})):
        directory = run / f"{step.out}-{KEY[:8]}"
        directory.mkdir(parents=True)
        (directory / "step.json").write_text(json.dumps({"verb": step.verb, "out": step.out, "key": KEY}))
        (directory / "done.json").write_text(json.dumps({"seconds": 3.0}))
        (directory / "metrics.json").write_text(json.dumps(metrics))
        steps.append((step, directory))
    return run, recipe, steps


def test_curves_and_alignments_are_drawn_and_told(tmp_path):
    page, data, _ = written(finished(tmp_path, FOUND, CURVE))
    text = Reader(page).text
    assert "Barrier" in text and "From a on text" in text and "Alignment: b_aligned" in text
    assert re.search(r"b</span><b>0\.600</b>", page) and re.search(r"aligned</span><b>0\.300</b>", page)
    points = re.findall(r'<polyline class="course" [^>]*points="([^"]*)"', page)
    assert [len(line.split()) for line in points] == [25, 25] and 'class="raw"' not in page
    heights = [[float(point.split(",")[1]) for point in line.split()] for line in points]
    assert heights[0][0] == heights[1][0] and heights[0][-1] == heights[1][-1]  # the same ends
    naive, half = heights[0][12] - heights[0][0], heights[1][12] - heights[1][0]
    assert naive < half < 0  # upwards
    for said in (
        "by hungarian on activations of 16\u202f400 tokens, norm gains folded for the search.",
        "115\u00a0% as they are and 68\u00a0% aligned",
        "Layers, target\u2190donor: 0\u21901, 1\u21902.",
        "From a itself: embed.weight (target and donor have other tokens).",
        "Units of a itself, for want of a counterpart in b: 4 of layers.1.mlp.",
        "a has no place for head.bias of b.",
        "Units of b that never vary on the data went by their weights: 3 of layers.0.mlp.",
    ):
        assert said in html.unescape(text), said
    assert data["alignments"]["b_aligned"]["spaces"]["layers.1.mlp"]["matched"] == 0.5
    assert data["barriers"][0]["target"] == "a" and len(data["barriers"][0]["crossings"]) == 2
    assert data["barriers"][0]["crossings"][0] == {"model": "b", "barrier": 0.6, "curve": CURVE}


def test_heat_maps_have_a_row_a_kind_and_a_column_a_layer():
    found = {one.title: one for one in maps(Alignment("b_aligned", "a", "b", "hungarian", FOUND))}
    assert found["Matched"].rows == {"mlp": [1.0, 0.5], "q": [None, 1.0]}
    assert found["Moved"].rows == {"mlp": [0.25, 1.0], "q": [None, 0.5]}  # 4 of 2 units in each of 4 copies
    assert found["Spread"].rows == {"q": [None, 3.0]} and found["Spread"].limit == 3.0
    assert found["Apart as they are"].rows == {"up": [1.4, 1.2]}
    assert found["Apart when aligned"].rows == {"up": [0.7, 0.3], "embed": [0.5]}
    assert found["Apart when aligned"].limit == found["Apart as they are"].limit == 1.4


def test_plans_by_hand():
    index = torch.tensor([2, 3, 0, -1])
    assert _picture(Index(index), 4, 4) == [[0, 0, 1, 0], [0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0]]
    whole = torch.arange(64).flip(0)
    found = _picture(Index(whole), 64, 64)
    assert found == [[float(x == 15 - y) for x in range(16)] for y in range(16)]
    halves = torch.tensor([[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]])
    assert _picture(Plan(halves, 2 * halves.mT, halves), 2, 4) == [[0.5, 0.5, 0, 0], [0, 0, 0.5, 0.5]]
    turned = torch.tensor([[0.6, -0.8], [0.8, 0.6]])
    assert _picture(Matrix(turned, turned.mT), 2, 2) == [[0.36, 0.64], [0.64, 0.36]]
    assert _picture(Turn(torch.ones(2)), 4, 4) is None
    drawn = plans(Alignment("x", "a", "b", "emd", {"spaces": {"mlp": {"plan": [[1.0, 0.0], [0.25, 0.75]]}}}))
    assert re.findall(r'fill-opacity="([\d.]+)" d="([^"]*)"', drawn) == [
        ("0.50", "M0 1h1v1h-1z"),
        ("0.83", "M1 1h1v1h-1z"),
        ("1.00", "M0 0h1v1h-1z"),
    ]


def test_nothing_that_a_name_says_becomes_markup(tmp_path):
    evil = json.loads(
        json.dumps(FOUND).replace('"layers.1.mlp"', json.dumps(EVIL)).replace('"head.bias"', json.dumps(EVIL))
    )
    evil["spaces"][EVIL]["plan"] = [[1.0]]
    page, _, _ = written(finished(tmp_path, {**evil, "match": EVIL}, CURVE))
    reader = Reader(page)
    assert reader.open == [] and "script" not in reader.tags and EVIL in reader.text


def test_what_is_malformed_is_named_and_what_is_absent_is_left_out(tmp_path):
    run, recipe, steps = finished(tmp_path, {**FOUND, "spaces": []}, CURVE)
    with pytest.raises(ValueError, match=r"b_aligned-.*metrics.json: spaces should be an object, it is \[\]"):
        report.write(run, recipe, steps)
    (steps[0][1] / "metrics.json").unlink()
    assert read_alignment(*steps[0]) is None
    assert "Alignment" not in Reader(written((run, recipe, steps))[0]).text
    file = steps[1][1] / "metrics.json"
    file.write_text(file.read_text().replace("[0.0, 2.0]", "[0.0, null]"))
    with pytest.raises(ValueError, match=r"models.b.barrier.text.curve should be pairs of finite numbers"):
        report.write(run, recipe, steps)
