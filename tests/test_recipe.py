"""The strict loader: what it reads, and the sentence for what it refuses."""

from pathlib import Path

import pytest

from fusion import recipe

GOOD = """
seed: 3
models:
  a: {path: ./a}
  tiny: {config: {model_type: gpt2}, tokenizer: {train: bpe, vocab_size: 300, data: text}}
data:
  text: {path: corpus.jsonl, column: body, split: "train[:95%]"}
  other: {path: "stdlib:"}
  both: {mix: {text: 0.7, other: 0.3}}
steps:
  - record: {out: hints, teacher: a, data: text, draws: 16}
  - distill: {out: taught, model: tiny, targets: [hints], data: both, train: {learning_rate: 1e-5, max_steps: 5}}
  - evaluate: {models: [tiny, taught], metrics: [bits_per_byte], data: text}
result: taught
"""


def write(folder: Path, text: str) -> Path:
    file = folder / "x.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def refused(folder: Path, old: str, new: str) -> str:
    """What is said about the good recipe with one thing changed, without the file's name."""
    assert old in GOOD
    file = write(folder, GOOD.replace(old, new, 1))
    with pytest.raises(ValueError) as caught:
        recipe.load(file)
    assert str(caught.value).startswith(f"{file}: ")
    return str(caught.value).removeprefix(f"{file}: ")


def test_reads_everything(tmp_path):
    found = recipe.load(write(tmp_path, GOOD), {"max_steps": 7})
    assert (found.name, found.seed, found.result, found.overrides) == ("x", 3, "taught", {"max_steps": 7})
    assert found.base == tmp_path.resolve()
    assert found.models["a"].path == "./a" and found.models["tiny"].tokenizer["data"] == "text"
    assert (found.data["text"].format, found.data["other"].format, found.data["text"].column) == (
        "json",
        "text",
        "body",
    )
    assert found.data["both"].mix == {"text": 0.7, "other": 0.3}
    record, distill, evaluate = found.steps
    assert (record.verb, record.out, record.named) == ("record", "hints", True)
    assert record.fields == {"teacher": "a", "data": "text", "draws": 16}
    assert (evaluate.out, evaluate.named) == ("evaluate_2", False)
    assert distill.place == f"{tmp_path / 'x.yaml'}: steps[1].distill"


def test_numbers_as_in_yaml_1_2(tmp_path):
    assert recipe.load(write(tmp_path, GOOD)).steps[1].fields["train"]["learning_rate"] == 1e-5
    for text in ("1e-5", "1E5", "-2e3", "1.5e+2", "+1.e-1"):
        assert recipe.scalar(text) == float(text) and isinstance(recipe.scalar(text), float)
    assert recipe.scalar("true") is True and recipe.scalar("12") == 12 and recipe.scalar("e5") == "e5"
    assert recipe.scalar("[a, 1e-3]") == ["a", 1e-3] and recipe.scalar("cosine") == "cosine"


def test_a_step_may_begin_as_another_one(tmp_path):
    text = GOOD.replace("record: {", "record: &first {").replace(
        "  - distill", "  - record: {<<: *first, out: more, draws: 4}\n  - distill"
    )
    first, second = recipe.load(write(tmp_path, text)).steps[:2]
    assert second.out == "more" and second.fields == {**first.fields, "draws": 4}
    with pytest.raises(ValueError, match="key 'draws' is given twice"):
        recipe.load(write(tmp_path, text.replace("draws: 4", "draws: 4, draws: 5")))


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("seed: 3", "sed: 3", "unknown key 'sed'; did you mean 'seed'?"),
        ("seed: 3", "seed: three", "seed: a whole number is needed here, not str 'three'"),
        ("seed: 3", "seed: true", "seed: a whole number is needed here, not bool True"),
        ("column: body", "colum: body",
         "data.text: unknown key 'colum'; did you mean 'column'?"),
        ("draws: 16}", "draws: 16, draws: 8}", "line 11: key 'draws' is given twice"),
        ("{path: ./a}", "{path: ./a, hub: b}",
         "models.a: exactly one of hub, path, config is needed, not hub and path"),
        ("{path: ./a}", "{}", "models.a: exactly one of hub, path, config is needed, not none"),
        ("{path: ./a}", "{hub: o/n, revision: 12}",
         "models.a.revision: a string is needed here, not int 12; put it in quotes"),
        ("{path: ./a}", "{path: ./a, revision: b}", "models.a: 'revision' goes with 'hub'; a path has none"),
        (", tokenizer: {train: bpe, vocab_size: 300, data: text}", "",
         "models.tiny: a model from scratch needs both 'config' and 'tokenizer'"),
        ("out: taught", "out: a", "steps[1].distill.out: the name 'a' is taken by models.a"),
        ("out: taught", "out: hints", "steps[1].distill.out: the name 'hints' is taken by steps[0].record.out"),
        ("both: {mix", "a: {mix", "data.a: the name 'a' is taken by models.a"),
        ("out: taught", "out: a/b", "steps[1].distill.out: 'a/b' can't be a name; use letters, digits, _ and -"),
        ("out: hints", "out: result", "an output can't be called 'result': that is the link to the recipe's result"),
        ("result: taught", "result: tauhgt", "result: no step makes 'tauhgt'; did you mean 'taught'?"),
        ("other: 0.3", "othr: 0.3", "data.both.mix: no data 'othr'; did you mean 'other'?"),
        ("other: 0.3", "both: 0.3", "data.both.mix: no data 'both' (a mix comes after its parts)"),
        ("other: 0.3", "other: -1", "data.both.mix.other: the weight -1 is not positive"),
        ('"stdlib:"}', '"stdlib:", format: txt}', "data.other.format: unknown format 'txt'; did you mean 'text'?"),
        ("  - record:", "  - rec: {}\n    record:",
         "steps[0]: a step is one verb with its fields, like `- merge: {out: soup, ...}`"),
    ],
)  # fmt: skip
def test_refuses_in_a_sentence(tmp_path, old, new, sentence):
    assert refused(tmp_path, old, new) == sentence


def test_what_is_no_recipe(tmp_path):
    for text, sentence in [
        ("steps: []", "steps: a list of steps is needed here"),
        ("- a", "a mapping is needed here, not list"),
        ("steps: [", "this is not YAML: "),
        ("1: 2", "line 1: key 1 is not a string"),
    ]:
        with pytest.raises(ValueError, match="x.yaml: ") as caught:
            recipe.load(write(tmp_path, text))
        assert sentence in str(caught.value)


def test_locates_files_and_packaged_names(tmp_path, repository):
    assert recipe.locate("recipes", "quickstart") == repository / "recipes" / "quickstart.yaml"
    assert recipe.locate("recipes", "papers/fusellm") == repository / "recipes" / "papers" / "fusellm.yaml"
    assert recipe.locate("recipes", str(write(tmp_path, GOOD))) == tmp_path / "x.yaml"
    with pytest.raises(ValueError, match="quickstat: no such file.*did you mean 'quickstart'"):
        recipe.locate("recipes", "quickstat")
    with pytest.raises(ValueError, match="no such file"):
        recipe.locate("recipes", "../pyproject.toml")
