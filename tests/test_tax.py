"""The alignment tax in a report: numbers counted by hand, curves of rewards and of merging, what it leaves out."""

import json
from pathlib import Path

import pytest

from fusion import _tax
from fusion._readings import Score, Scores, Training
from tests.test_report import Reader, make_run, written

RECIPE = """\
models:
  start: {path: ./start}
  base:  {path: ./base}
data:
  prefs:    {path: ./prefs.jsonl, format: json, column: "*"}
  text:     {path: ./text.txt}
  held_out: {path: ./held_out.txt}
steps:
  - tune:     {out: plain, model: start, data: prefs, algorithm: dpo}
  - tune:     {out: merged, model: start, data: prefs, algorithm: dpo, online_merge: {base: base, method: ties}}
  - tune:     {out: continued, model: start, data: text}
  - evaluate: {out: scores, models: [start, plain, merged, continued], metrics: [bits_per_byte], data: held_out}
result: merged
"""
BITS = {
    "start": {"prose": 2.0, "code": 3.0},
    "plain": {"prose": 2.25, "code": 2.99},
    "merged": {"prose": 2.125, "code": 3.0},
    "continued": {"prose": 1.5, "code": 3.5},
}
BLIMP = {
    "start": {"island": 0.6, "agreement": 0.8},
    "plain": {"island": 0.5, "agreement": 0.7},
    "merged": {"island": 0.6, "agreement": 0.84},
}


def made(folder: Path) -> tuple:
    """A run whose preference steps logged what TRL and the callback log, each a line through its last step's value."""
    run, recipe, steps = make_run(folder, RECIPE, BITS, BLIMP)
    for step, directory in steps:
        if step.out in ("plain", "merged"):
            margin = 2.0 if step.out == "plain" else 1.0
            rows = []
            for number in range(1, 9):
                row = {"step": number, "loss": 0.5, "rewards/margins": margin, "rewards/accuracies": 0.75, "kl": 0.5}
                if step.out == "merged":
                    row |= {"online_update_kept": 0.2, "online_sign_conflicts": 0.49, "online_drift": 0.01 * number}
                    row |= {"online_update_norm": 0.3, "online_task_vector_norm": 7.0, "online_merged_norm": 0.25}
                rows.append(json.dumps(row))
            (directory / "log.jsonl").write_text("\n".join(rows) + "\n")
    return run, recipe, steps


def test_the_tax_is_after_minus_before(tmp_path):
    _, data, _ = written(made(tmp_path))
    plain, merged = data["taxes"]  # continued training learnt from no preferences
    assert (plain["model"], plain["start"], plain["algorithm"]) == ("plain", "start", "dpo")
    assert plain["gains"] == {"rewards/margins": 2.0, "rewards/accuracies": 0.75, "kl": 0.5}
    assert {d["domain"]: d["bits_per_byte"] for d in plain["bits_per_byte"]} == pytest.approx(
        {"prose": 0.25, "code": -0.01}
    )
    assert plain["blimp"] == pytest.approx([0.7, 0.6]) and merged["blimp"] == pytest.approx([0.7, 0.72])
    assert data["verdict"][0].startswith("merged (reward margin 1.00) against start")  # the recipe's result
    assert data["verdict"][1] == (
        "plain (reward margin 2.00) against start, before dpo: +0.250 bits per byte on prose, \u22120.010 on code, "
        "\u221210.0 points of BLiMP."
    )


def test_the_page_draws_it_with_rewards_and_what_merging_did(tmp_path):
    page, _, _ = written(made(tmp_path))
    text = Reader(page).text
    section = text[text.index("Alignment tax") : text.index("Training")]
    for printed in ("+0.250", "\u22120.010", "+0.1250", "\u221210.0", "+2.0", "\u221210.00", "2.000", "1.000", "0.750"):
        assert printed in section, printed
    assert "continued" not in section
    for title in (
        "Reward margin",
        "Pairs in the right order",
        "KL from the reference",
        "Update kept by online merging",
    ):
        assert f"{title} on prefs" in text
    for title in ("Update against task vector", "Length of the optimizer's update", "Length of the merged update"):
        assert f"{title} on prefs" in text
    assert "Length of the task vector on prefs" in text and "Distance from the reference on prefs" in text


def test_what_stays_the_same_is_drawn_level(tmp_path):
    """0.2 has no exact float, so its means differ in the last bit."""
    page, _, _ = written(made(tmp_path))
    chart = page[page.index("Update kept by online merging") :].split("</figure>")[0]
    points = chart.split('class="course"')[1].split('points="')[1].split('"')[0]
    assert {point.split(",")[1] for point in points.split()} == {"500.0"}


def test_models_of_a_run_that_fuses_nothing_are_told_apart(tmp_path):
    page, _, _ = written(made(tmp_path))
    chart = page[page.index("Reward margin on prefs") :].split("</figure>")[0]
    assert "--c:var(--target)" in chart and "--c:var(--fused-0)" in chart and "dashed" not in chart


def test_worse_is_to_the_right_in_both_pictures(tmp_path):
    page, _, _ = written(made(tmp_path))
    section = page[page.index("<h2>Alignment tax") :].split("</section>")[0]
    places = [float(part.split('cx="')[1].split("%")[0]) for part in section.split("<circle")[1:]]
    prose_plain, prose_merged, code_plain, code_merged, blimp_plain, blimp_merged = places
    assert prose_plain > prose_merged > 50 > code_plain and code_merged == 50
    assert blimp_plain > 50 > blimp_merged


def step(algorithm: str = "dpo", start: str = "start") -> Training:
    return Training("tuned", "tune", start, "prefs", {"algorithm": algorithm}, {}, {})


@pytest.mark.parametrize(
    ("training", "before", "after"),
    [
        (step("sft"), Scores({"prose": Score(2.0, None, 9)}), Scores({"prose": Score(2.5, None, 9)})),
        (step(start="other"), Scores({"prose": Score(2.0, None, 9)}), Scores({"prose": Score(2.5, None, 9)})),
        (step(), Scores({"prose": Score(2.0, None, 9)}), Scores({"code": Score(2.5, None, 9)})),
        (step(), Scores(blimp={"a": 0.5}, blimp_accuracy=0.5), Scores(blimp={"b": 0.5}, blimp_accuracy=0.5)),
    ],
    ids=["not from preferences", "another start", "no shared domain", "other paradigms"],
)
def test_no_tax_without_the_same_thing_before_and_after(training, before, after):
    assert _tax.taxes([training], {"start": before, "tuned": after}) == []


def test_gains_are_the_end_of_the_drawn_curve():
    one = Training("a", "tune", "b", "c", {}, {}, {"step": [1.0, 2.0, 3.0], "kl": [1.0, None, 4.0]})
    assert _tax.gains(one) == {"kl": (2 * 4.0 + 1 * 1.0) / 3}
