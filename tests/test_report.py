"""Reports over step directories as runs leave them: numbers, sentences, pictures, and no name that breaks them."""

import html.parser
import json
import math
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from fusion import _verdict, report
from fusion._pictures import duration, signed, smooth, ticks
from fusion._readings import CURVE_POINTS, Score, Scores, read_curve
from fusion.recipe import Recipe, load

KEY = "0123456789abcdef" * 4
EVIL = '"><script>alert(1)</script>&<b>'
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

RECIPE = """\
# Prose taught by code <script>alert("recipe")</script> & "quotes"
seed: 7
models:
  student: {config: {model_type: gpt2, n_layer: 2}, tokenizer: {train: unigram, vocab_size: 2048, data: text}}
  coder:   {path: ./coder}
data:
  text:     {path: ./corpus.txt, format: text}   # both domains
  held_out: {path: ./held_out.txt, format: text}
steps:
  - tune:     {out: prose, model: student, data: text}
  - record:   {out: hints, teacher: coder, data: text, draws: 16}
  - distill:  {out: taught, model: prose, targets: [hints], data: text, fuse: min_ce, loss: forward_kl, lm_weight: 0.5}
  - tune:     {out: continued, model: prose, data: text, algorithm: clm}
  - evaluate: {out: scores, models: [prose, coder, taught, continued], metrics: [bits_per_byte], data: held_out}
result: taught
"""
BITS = {
    "prose": {"code": 4.011, "prose": 2.302},
    "coder": {"code": 2.105, "prose": 3.417},
    "taught": {"code": 2.951, "prose": 2.288},
    "continued": {"code": 3.039, "prose": 2.279},
}


def score(bits: float, documents: int = 40) -> dict:
    """A domain's entry as the metric writes it."""
    return {"bits_per_byte": bits, "stderr": 0.02 * bits, "bytes": 512 * documents, "tokens": 170 * documents}


def make_run(
    folder: Path, text: str = RECIPE, bits: dict | None = None, blimp: dict | None = None, extra: dict | None = None
):
    """A finished run of the recipe: losses that decay with a known ripple, times and scores. (run, recipe, steps)."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(text, encoding="utf-8")
    recipe = load(folder / "recipe.yaml")
    run = folder / "runs" / "recipe"
    run.mkdir(parents=True, exist_ok=True)
    steps = []
    for position, step in enumerate(recipe.steps):
        directory = run / f"{step.out}-{KEY[:8]}"
        directory.mkdir()
        versions = {"fusion": "0.1.0", "torch": "2.13.0"}
        header = {
            "verb": step.verb,
            "out": step.out,
            "fields": step.fields,
            "key": KEY,
            "inputs": {"data text": KEY[:16]},
        }
        header |= {
            "place": step.place,
            "versions": versions,
            "started": f"2026-01-01T00:0{position}:00+00:00",
            "host": "box",
        }
        (directory / "step.json").write_text(json.dumps(header))
        (directory / "done.json").write_text(
            json.dumps({"seconds": 12.5 + 31 * position, "finished": "2026-01-01T01:00:00"})
        )
        metrics: dict = {}
        if step.verb == "record":
            metrics = {"tokens": 51234, "bytes": 180345, "bytes_per_token": 23.4, "arrow_bytes_per_token": 209.1}
            metrics |= {"bits_per_byte": 2.2, "tokens_per_second": 9120.5}
        if step.verb in ("distill", "tune"):
            lines = []
            for number in range(1, 301, 5):
                loss = 2.9 + 3.2 * math.exp(-number / 60) + 0.09 * math.sin(number * 1.7) + 0.05 * position
                row = {"step": number, "loss": loss, "lm_loss": loss, "learning_rate": 1e-3, "grad_norm": 1.1}
                row |= {"tokens_per_second": 4100.0, "seconds_per_step": 0.21}
                if step.verb == "distill":
                    row |= {"loss": 0.8 * loss, "target_loss": 0.9 * loss, "target_share": 0.56}
                lines.append(json.dumps(row))
            (directory / "log.jsonl").write_text("\n".join(lines) + "\n")
            metrics = {"train_loss": 3.3, "train_runtime": 63.0, "steps": 300, "parameters": 1234567}
        if step.verb == "evaluate":
            models = {
                name: {"bits_per_byte": {domain: score(value) for domain, value in domains.items()}}
                for name, domains in (BITS if bits is None else bits).items()
            }
            for name, paradigms in (blimp or {}).items():
                accuracy = sum(paradigms.values()) / len(paradigms)
                models.setdefault(name, {})["blimp"] = {"accuracy": accuracy, "paradigms": paradigms}
            for name, metric in (extra or {}).items():
                models[name] |= metric
            metrics = {"models": models}
        (directory / "metrics.json").write_text(json.dumps(metrics))
        steps.append((step, directory))
    return run, recipe, steps


class Reader(html.parser.HTMLParser):
    """Tags, attributes and visible text of a page; complains about tags that do not close."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text += data


def written(made) -> tuple[str, dict, str]:
    """The page, the JSON (NaN refused) and the card of a run."""
    run = made[0]
    assert report.write(*made) == run / "report.html"

    def refuse(word):
        raise AssertionError(word)

    data = json.loads((run / "report.json").read_text(), parse_constant=refuse)
    return (run / "report.html").read_text(), data, (run / "README.md").read_text()


def test_the_three_files_say_the_same(tmp_path):
    before = time.perf_counter()
    made = make_run(tmp_path)
    page, data, card = written(made)
    assert time.perf_counter() - before < 5
    sentence = (
        "taught is 0.088 bits per byte better than continued training (continued) on code and 0.009 worse on prose."
    )
    assert data["verdict"][0] == sentence
    assert sentence in Reader(page).text and sentence in card
    roles = {name: model["role"] for name, model in data["models"].items()}
    assert roles == {
        "prose": "target",
        "coder": "teacher",
        "continued": "baseline",
        "taught": "fused",
        "student": "other",
    }
    assert {(d["domain"], round(d["bits_per_byte"], 3)) for d in data["differences"]} == {
        ("code", -0.088),
        ("prose", 0.009),
    }
    assert data["stores"]["hints"]["bytes_per_token"] == 23.4
    assert data["training"]["taught"]["curve"]["target_share"][0] == 0.56
    assert data["seconds"] == sum(12.5 + 31 * position for position in range(5))
    assert not list(made[0].glob(".*.new"))


def test_the_page_is_whole_and_asks_for_nothing(tmp_path):
    page, _, _ = written(
        make_run(tmp_path, blimp={"prose": {"island_effects": 0.6}, "taught": {"island_effects": 0.7}})
    )
    reader = Reader(page)
    assert reader.open == []
    assert not {"script", "link", "img", "iframe", "object", "embed", "form", "base"} & set(reader.tags)
    assert not [
        value for name, value in reader.attributes if name in ("src", "href", "srcset", "action") or name[:2] == "on"
    ]
    assert "url(" not in page and "@import" not in page and "http" not in page
    for title in (
        "Bits per byte",
        "Against continued training",
        "Training",
        "Targets",
        "BLiMP",
        "Time",
        "How it was made",
    ):
        assert title in reader.text
    for text in (
        "2.951",
        "4.011",
        "−0.088",
        "+0.009",
        "56.0 %",
        "23.4 B",
        "209.1 B",
        "0.21 s a training step",
        RECIPE.strip(),
    ):
        assert text in reader.text, text
    used = set(re.findall(r"--c:var\(--([a-z0-9-]+)\)", page))
    assert used <= set(re.findall(r"--([a-z0-9-]+):", page))


def test_nothing_that_a_name_says_becomes_markup(tmp_path):
    name = json.dumps(EVIL)
    bits = {"prose": {EVIL: 3.0}, "taught": {EVIL: 2.0}, "continued": {EVIL: 2.5}, EVIL: {EVIL: 2.2}}
    text = RECIPE.replace("path: ./coder", f"path: {name}")
    run, recipe, steps = make_run(
        tmp_path, text, bits, blimp={"taught": {EVIL: 0.5}}, extra={"taught": {EVIL: {"x": 1.0}}}
    )
    for _, directory in steps:
        header = json.loads((directory / "step.json").read_text())
        header |= {"host": EVIL, "started": EVIL, "versions": {EVIL: EVIL}, "inputs": {EVIL: EVIL}, "key": EVIL}
        (directory / "step.json").write_text(json.dumps(header))
    page, data, card = written((run, recipe, steps))
    reader = Reader(page)
    assert reader.open == [] and "script" not in reader.tags and "<script" not in page
    assert EVIL in reader.text and EVIL in data["models"]
    outside = card.replace(text.rstrip(), "")
    assert "<script" not in re.sub(r"\\.", "", outside)
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["tags"] == ["fusion", "knowledge-distillation"] and "license" not in front


def test_a_recipe_with_fences_stays_in_its_fence(tmp_path):
    text = RECIPE + "# ```\n# # not a title\n"
    card = written(make_run(tmp_path, text))[2]
    assert f"````yaml\n{text.rstrip()}\n````\n" in card


@pytest.mark.parametrize("domains", [1, 5])
@pytest.mark.parametrize("models", [1, 8])
def test_few_and_many(tmp_path, domains, models):
    arms = [f"arm_{number}_with_a_name_that_goes_on_and_on_and_never_seems_to_end" for number in range(models)]
    lines = "".join(f"  - distill: {{out: {arm}, model: prose, targets: [hints], data: text}}\n" for arm in arms)
    text = RECIPE.replace("result: taught\n", f"{lines}result: {arms[-1]}\n")
    bits = {arm: {f"domain {d}": 2.0 + 0.1 * a + d for d in range(domains)} for a, arm in enumerate(arms)}
    page, data, _ = written(make_run(tmp_path, text, bits))
    assert data["hero"] == arms[-1] and data["rival"] is None
    assert Reader(page).text.count("domain ") >= domains
    assert "Against" not in Reader(page).text


def test_a_section_needs_its_numbers(tmp_path):
    run, recipe, steps = make_run(tmp_path)
    for _, directory in steps:
        (directory / "metrics.json").unlink()
        (directory / "log.jsonl").unlink(missing_ok=True)
    page, data, card = written((run, recipe, steps))
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    assert titles == ["Time", "How it was made"]
    assert data["verdict"] == [
        "taught was made, and not compared: no evaluate step measured it beside its start or a baseline."
    ]
    assert "## Results" not in card


def test_nothing_finite_is_lost_and_nothing_else_is_kept(tmp_path):
    run, recipe, steps = make_run(tmp_path, extra={"taught": {"lm_eval": {"task": {"acc": 0.25, "bad": math.nan}}}})
    log = next(directory for step, directory in steps if step.out == "taught") / "log.jsonl"
    log.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n{"step": 3, "loss": 1.0}\n')
    _, data, _ = written((run, recipe, steps))
    assert data["models"]["taught"]["other"] == {"lm_eval/task/acc": 0.25}
    assert data["training"]["taught"]["curve"] == {"step": [1, 3], "loss": [2.0, 1.0]}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("done.json", None, "has no done.json"),
        ("done.json", {"seconds": "long"}, "should hold seconds"),
        ("step.json", {}, "should hold the step's key"),
        ("step.json", [], "should hold a JSON object, it holds a list"),
        ("metrics.json", {"models": []}, "models should be an object"),
        (
            "metrics.json",
            {"models": {"taught": {"bits_per_byte": {"code": {}}}}},
            r"models\.taught\.bits_per_byte\.code should hold",
        ),
        (
            "metrics.json",
            {"models": {"taught": {"blimp": {"paradigms": {"a": 61}}}}},
            r"paradigms\.a should be an accuracy",
        ),
    ],
)
def test_malformed_leavings_are_named(tmp_path, file, content, message):
    run, recipe, steps = make_run(tmp_path)
    path = steps[-1][1] / file
    path.unlink()
    if content is not None:
        path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        report.write(run, recipe, steps)


def test_a_report_replaces_the_last_one(tmp_path):
    made = make_run(tmp_path)
    first = written(made)
    assert written(made) == first


def scores(**models: dict[str, float]) -> dict[str, Scores]:
    return {
        name: Scores({domain: Score(bits, None, 1000) for domain, bits in found.items()})
        for name, found in models.items()
    }


def recipe_of(tmp_path: Path, text: str = RECIPE) -> Recipe:
    (tmp_path / "r.yaml").write_text(text)
    return load(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("taught", "continued", "sentence"),
    [
        ((2.0, 2.0), (2.1, 2.05), "taught is 0.100 bits per byte better than BASE on a and 0.050 on b."),
        ((2.2, 2.1), (2.1, 2.05), "taught lost: it is 0.100 bits per byte worse than BASE on a and 0.050 on b."),
        ((2.0, 2.0), (2.1, 2.0), "taught is 0.100 bits per byte better than BASE on a and level on b."),
        (
            (2.0, 2.0),
            (2.0, 2.0001),
            "taught is level with BASE on a and b: no difference beyond the error.",
        ),
    ],
)
def test_the_verdict_is_honest(tmp_path, taught, continued, sentence):
    found = scores(taught=dict(zip("ab", taught, strict=True)), continued=dict(zip("ab", continued, strict=True)))
    assert _verdict.verdict("taught", recipe_of(tmp_path).steps, found)[0] == sentence.replace(
        "BASE", "continued training (continued)"
    )


def test_without_a_baseline_the_verdict_says_so(tmp_path):
    text = RECIPE.replace("  - tune:     {out: continued, model: prose, data: text, algorithm: clm}\n", "")
    text = text.replace(", continued]", "]")
    found = scores(taught={"a": 2.0}, prose={"a": 2.5}, coder={"a": 1.5})
    said = _verdict.verdict("taught", recipe_of(tmp_path, text).steps, found)
    assert said[0] == "taught is 0.500 bits per byte better than prose, where it started on a."
    assert said[1].startswith("No baseline was trained")
    assert said[2] == "On a it closes 50 % of the gap between prose and its teacher coder."


def test_where_nothing_is_fused_the_leaders_are_named(tmp_path):
    text = "models: {x: {path: ./x}, y: {path: ./y}}\ndata: {t: {path: ./t.txt}}\n"
    text += "steps: [{evaluate: {models: [x, y], metrics: [bits_per_byte], data: t}}]\n"
    steps = recipe_of(tmp_path, text).steps
    said = _verdict.verdict(None, steps, scores(x={"a": 2.0, "b": 3.0}, y={"a": 2.5, "b": 1.0}))
    assert said == [
        "Nothing was fused. Lowest of each domain: "
        "x needs 2.000 bits per byte on a and y needs 1.000 bits per byte on b."
    ]
    assert _verdict.verdict(None, steps, {}) == ["Nothing was fused and nothing was evaluated in this run."]


def test_the_strongest_of_two_baselines_is_the_rival(tmp_path):
    text = RECIPE.replace("  - evaluate", "  - tune:     {out: longer, model: prose, data: text}\n  - evaluate")
    found = scores(taught={"a": 2.0}, continued={"a": 2.3}, longer={"a": 1.9})
    steps = recipe_of(tmp_path, text).steps
    assert _verdict.rival("taught", steps, _verdict.roles(steps), found) == "longer"


def test_a_merge_of_what_was_taught_is_fused_and_tuning_it_too(tmp_path):
    text = RECIPE.replace(
        "  - evaluate",
        "  - merge:    {out: soup, method: linear, base: prose, models: {taught: 1.0, coder: 1.0}}\n"
        "  - tune:     {out: polished, model: soup, data: text}\n  - evaluate",
    )
    steps = recipe_of(tmp_path, text).steps
    role = _verdict.roles(steps)
    assert (role["soup"], role["polished"], role["prose"], role["coder"]) == ("fused", "fused", "target", "teacher")
    assert _verdict.origin("polished", steps, role) == "prose"


def test_paired_error_by_hand():
    """Three documents of 10 bytes, gaps 1, 2, 3 bits: spread (1 + 0 + 1) x 3/2 = 3, over 30 bytes."""
    a = Score(0.0, None, 30, ((11.0, 10), (12.0, 10), (13.0, 10)))
    b = Score(0.0, None, 30, ((10.0, 10), (10.0, 10), (10.0, 10)))
    assert _verdict.paired_error(a, b) == pytest.approx(math.sqrt(3) / 30)
    assert _verdict.paired_error(a, Score(0.0, None, 30)) is None


def test_documents_give_differences_an_error(tmp_path):
    run, recipe, steps = make_run(tmp_path)
    path = steps[-1][1] / "metrics.json"
    metrics = json.loads(path.read_text())
    for name, shift in (("taught", 0.0), ("continued", 44.0)):
        bits = [1500.0 + 20 * number + (shift if number else 1.1 * shift) for number in range(40)]
        metrics["models"][name]["bits_per_byte"]["code"] |= {"document_bits": bits, "document_bytes": [512] * 40}
    path.write_text(json.dumps(metrics))
    page, data, _ = written((run, recipe, steps))
    code = next(d for d in data["differences"] if d["domain"] == "code")
    assert 0 < code["stderr"] < 0.001 and not code["level"]
    assert "standard error of the difference" in page


def test_a_curve_keeps_the_last_word_of_each_step_and_at_most_500_points(tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 2, "loss": 9}\n{"step": 1, "loss": 5}\n{"step": 2, "loss": 3}\n{"step": 3, "lo')
    assert read_curve(log) == {"step": [1, 2], "loss": [5, 3]}
    log.write_text("\n".join(json.dumps({"step": n, "loss": 2.0 * n}) for n in range(1, 2001)))
    curve = read_curve(log)
    assert len(curve["step"]) == CURVE_POINTS and curve["step"][0] == 2.5 and curve["loss"][-1] == 2 * 1998.5
    assert read_curve(tmp_path / "none") == {}


def test_smoothing_keeps_lines_straight_and_axes_are_round():
    line = [3.0 - 0.01 * n for n in range(100)]
    assert smooth(line, 6)[:94] == pytest.approx(line[:94])
    assert ticks(0.0, 1.0) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert ticks(2.71, 6.2) == [3, 4, 5, 6]
    assert (signed(-0.01), signed(0.0001), signed(0.5)) == ("\u22120.010", "0.000", "+0.500")
    assert [duration(s) for s in (0.045, 0.21, 12.34, 245, 12000)] == [
        "45 ms",
        "0.21 s",
        "12.3 s",
        "4 min 05 s",
        "3 h 20 min",
    ]


def test_a_name_breaks_where_its_parts_join():
    page = Reader("<p></p>")
    from fusion._pictures import breakable

    page.feed(f"<p>{breakable('a_long-name.v2<b>')}</p>")
    assert page.text == "a_long-name.v2<b>" and page.tags.count("wbr") == 3 and "b" not in page.tags


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, which is not installed")
def test_a_browser_draws_it(tmp_path):
    """The document after layout holds all of it, and is no wider than a phone."""
    written(make_run(tmp_path / "run"))
    probe = tmp_path / "probe.html"
    probe.write_text(
        '<iframe src="run/runs/recipe/report.html" style="width:390px;height:900px;border:0"></iframe>'
        "<p id=o></p><script>"
        'onload=()=>{const d=document.querySelector("iframe").contentDocument.documentElement;'
        'o.textContent="wide "+d.scrollWidth+" bars "+d.querySelectorAll("svg.bar rect").length}</script>'
    )
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
    ]
    flags += [
        "--disable-component-update",
        "--disable-sync",
        "--allow-file-access-from-files",
        f"--user-data-dir={tmp_path / 'chromium'}",
    ]
    assert CHROMIUM is not None
    shown = subprocess.run(
        [CHROMIUM, *flags, "--dump-dom", f"file://{probe}"], capture_output=True, text=True, timeout=60
    )
    found = re.search(r"wide (\d+) bars (\d+)", shown.stdout)
    assert found, shown.stderr[-2000:]
    assert int(found[1]) <= 390 and int(found[2]) == 8 + 1 + 2 + 5
