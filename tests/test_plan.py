"""A plan: references, keys that follow content and nothing else, sentences, and what planning may not import."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fusion import _estimate, _keys, recipe
from fusion.plan import plan

STEPS = """
seed: 0
models:
  tiny:
    config: {model_type: llama, hidden_size: 32, num_hidden_layers: 2}
    tokenizer: {train: bpe, vocab_size: 400, data: text}
  peer: {config: {model_type: gpt2, n_embd: 32}, tokenizer: {train: bpe, vocab_size: 400, data: text}}
data:
  text: {path: corpus.jsonl, column: body}
  other: {path: "stdlib:", split: "train[:10]"}
  both: {mix: {text: 0.5, other: 0.5}}
steps:
  - tests.plugin_steps: {out: first, parts: 2, train: {learning_rate: 1e-3}}
  - tune: {out: tuned, model: tiny, data: text, train: {max_steps: 2}}
  - record: {out: hints, teacher: tuned, data: both, draws: 4}
  - distill: {out: taught, model: peer, targets: [hints], data: both, fuse: {min_ce: {unit: token}}}
  - evaluate: {models: [peer, taught], metrics: [bits_per_byte], data: {t: text}}
result: taught
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FUSION_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path) -> Path:
    rows = [{"body": f"text number {n}", "title": "t"} for n in range(20)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def planned(folder: Path, text: str = STEPS, **overrides):
    (folder / "x.yaml").write_text(text)
    return plan(recipe.load(folder / "x.yaml", overrides), folder / "runs")


def keys(folder: Path, text: str = STEPS, **overrides) -> dict[str, str]:
    return {one.name: one.key for one in planned(folder, text, **overrides).steps}


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


EVERY = {"first", "tuned", "hints", "taught", "evaluate_4"}


def test_steps_are_resolved(folder):
    found = planned(folder)
    assert [one.name for one in found.steps] == ["first", "tuned", "hints", "taught", "evaluate_4"]
    assert [one.output for one in found.steps] == ["targets", "model", "targets", "model", "metrics"]
    taught = found["taught"]
    assert taught.inputs == {"hints": found["hints"].key}
    assert (taught.models, taught.data) == (("peer",), ("both",))
    assert found["evaluate_4"].inputs == {"taught": taught.key} and found["evaluate_4"].data == ("text",)
    assert taught.directory == folder / "runs" / "x" / f"taught-{taught.key[:8]}" and not taught.done
    assert taught.arguments["out"] == "taught"


def test_keys_follow_content(folder):
    before = keys(folder)
    assert keys(folder) == before
    assert changed(before, keys(folder, STEPS.replace("seed: 0", "seed: 1"))) == EVERY
    assert changed(before, keys(folder, STEPS.replace("draws: 4", "draws: 8"))) == {"hints", "taught", "evaluate_4"}
    assert changed(before, keys(folder, STEPS.replace("unit: token", "unit: byte"))) == {"taught", "evaluate_4"}
    wider = STEPS.replace("hidden_size: 32", "hidden_size: 64")
    assert changed(before, keys(folder, wider)) == {"tuned", "hints", "taught", "evaluate_4"}
    assert changed(before, keys(folder, STEPS.replace("n_embd: 32", "n_embd: 64"))) == {"taught", "evaluate_4"}
    reordered = STEPS.replace(
        "{out: hints, teacher: tuned, data: both, draws: 4}", "{draws: 4, data: both, teacher: tuned, out: hints}"
    )
    assert changed(before, keys(folder, reordered)) == set()
    unused = STEPS.replace("data:\n  text", "data:\n  more: {path: corpus.jsonl, column: title}\n  text")
    assert changed(before, keys(folder, unused)) == set()


def test_keys_follow_files(folder):
    before = keys(folder)
    rows = (folder / "corpus.jsonl").read_text().replace("number 3", "number 4")
    (folder / "corpus.jsonl").write_text(rows)
    assert changed(before, keys(folder)) == EVERY - {"first"}


def test_keys_follow_the_sources_of_plug_ins_only(folder, monkeypatch):
    (folder / "own_lab").mkdir()
    source = Path(__file__).with_name("plugin_steps.py").read_text()
    (folder / "own_lab" / "plugin_steps.py").write_text(source)
    monkeypatch.syspath_prepend(str(folder))
    text = STEPS.replace("tests.plugin_steps", "own_lab.plugin_steps")
    before = keys(folder, text)
    (folder / "own_lab" / "plugin_steps.py").write_text(source + "\n# changed\n")
    assert changed(before, keys(folder, text)) == {"first"}


def test_overrides_enter_every_train_block_and_its_key(folder):
    before = keys(folder)
    assert changed(before, keys(folder, use_cpu=True)) == EVERY  # hints and evaluate_4 through what they read
    found = planned(folder, max_steps=9)
    assert found["tuned"].fields["train"] == {"max_steps": 9} and found["taught"].fields["train"] == {"max_steps": 9}
    assert "train" not in found["hints"].fields


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("- record", "- recrod", "steps[2].recrod: unknown step 'recrod'; did you mean 'record'?"),
        ("draws: 4", "drawz: 4", "steps[2].record: record has no parameter 'drawz'; did you mean 'draws'?"),
        ("teacher: tuned, ", "", "steps[2].record: record needs 'teacher'"),
        ("draws: 4", "draws: many", "steps[2].record.draws: a whole number"),
        ("unit: token", "unti: token",
         "steps[3].distill.fuse.min_ce: min_ce has no parameter 'unti'; did you mean 'unit'?"),
        ("min_ce", "min_cd", "steps[3].distill.fuse.min_cd: unknown fusion rule 'min_cd'; did you mean 'min_ce'?"),
        ("fuse: {min_ce: {unit: token}}", "fuse: {min_ce: {unit: token}}, lm_weight: 1.5",
         "steps[3].distill.lm_weight: 1.5 is not a share"),
        ("{min_ce: {unit: token}}", "weighted",
         "steps[3].distill: weighted has no unbiased estimate from sampled targets"),
        ("[peer, taught]", "[taught, taught]", "steps[4].evaluate: model 'taught' is given twice"),
        ("[bits_per_byte]", "[bit_per_byte]", "steps[4].evaluate.metrics: unknown metric 'bit_per_byte'; did you mean"),
        ("teacher: tuned", "teacher: tuend",
         "steps[2].record.teacher: there is no model 'tuend'; did you mean 'tuned'?"),
        ("teacher: tuned", "teacher: taught", "steps[2].record.teacher: 'taught' is only made later"),
        ("teacher: tuned", "teacher: hints", "steps[2].record.teacher: 'hints' is only made by this step"),
        ("teacher: tuned", "teacher: text", "steps[2].record.teacher: 'text' is data; a model is needed here"),
        ("[hints]", "[tuned]", "steps[3].distill.targets: 'tuned' is a model; a store of targets is needed here"),
        ("[peer, taught]", "[peer, hints]",
         "steps[4].evaluate.models: 'hints' is a store of targets; a model is needed here"),
        ("data: text, train", "data: txet, train", "steps[1].tune.data: there is no data 'txet'; did you mean 'text'?"),
        ("corpus.jsonl", "corpsu.jsonl", "no file at"),
        ("column: body", "column: boddy", "has no column 'boddy'; did you mean 'body'?"),
        ("train[:10]", "train[:ten]", "is not like 'train'"),
        ("hidden_size: 32", "hidden_size: 32, vocab_size: 300", "the tokenizer has 400 tokens"),
    ],
)  # fmt: skip
def test_refuses_in_a_sentence(folder, old, new, sentence):
    assert old in STEPS
    with pytest.raises(ValueError) as caught:
        planned(folder, STEPS.replace(old, new, 1))
    assert sentence in str(caught.value)
    assert str(caught.value).count("\n") <= 1, "one fault is not told as many"


def test_all_faults_are_told_at_once(folder):
    text = STEPS.replace("draws: 4", "drawz: 4").replace("[bits_per_byte]", "[bpb]")
    with pytest.raises(ValueError) as caught:
        planned(folder, text)
    assert len(str(caught.value).split("\n")) == 2


def test_empty_text_and_broken_json(folder):
    (folder / "corpus.jsonl").write_text("")
    with pytest.raises(ValueError, match="corpus.jsonl is empty"):
        planned(folder)
    (folder / "corpus.jsonl").write_text("not json\n")
    with pytest.raises(ValueError, match="the first line of .* is not JSON"):
        planned(folder)


def test_parquet_columns(folder):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"body": ["a", "b"]}), folder / "corpus.parquet")
    text = STEPS.replace("corpus.jsonl", "corpus.parquet")
    planned(folder, text)
    with pytest.raises(ValueError, match="has no column 'bdy'; did you mean 'body'"):
        planned(folder, text.replace("column: body", "column: bdy"))


def test_a_hub_model_that_is_not_here(folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(folder / "hub"))
    text = STEPS.replace("teacher: tuned", "teacher: far").replace(
        "models:\n", f"models:\n  far: {{hub: owner/name, revision: {'a1' * 20}}}\n"
    )
    with pytest.raises(ValueError, match="owner/name at a1a1.* is not in the hub's cache .*HF_HUB_OFFLINE"):
        planned(folder, text)


def test_digests_are_remembered_and_a_broken_cache_is_no_harm(folder):
    file = folder / "a"
    file.write_text("1")
    digests = _keys.Digests(folder / "digests.json")
    first = digests(file)
    digests.save()
    assert json.loads((folder / "digests.json").read_text())[str(file.resolve())][1] == first
    for broken in ("{", "[]", '{"a": 1}', '{"a": [1, 2, 3]}', ""):
        (folder / "digests.json").write_text(broken)
        assert _keys.Digests(folder / "digests.json")(file) == first
    file.write_text("23")
    assert _keys.Digests(folder / "digests.json")(file) != first


def test_a_full_disk_is_refused_before_the_run(folder):
    found = planned(folder)
    _estimate.refuse_full_disk(found, list(found.steps))
    vast = planned(folder, STEPS.replace("hidden_size: 32", "hidden_size: 3000000"))
    with pytest.raises(ValueError, match="5 steps will write about .* TB, but .* free; make room"):
        _estimate.refuse_full_disk(vast, list(vast.steps))


def test_what_a_step_that_continues_has_written_needs_no_room_again(folder, monkeypatch):
    found = planned(folder)
    steps = list(found.steps)
    needs = _estimate.estimate(found)
    needed = sum(need.disk or 0 for need in needs) + max(need.meanwhile for need in needs)
    free = SimpleNamespace(free=needed - 65536)
    monkeypatch.setattr(_estimate.shutil, "disk_usage", lambda _: free)
    with pytest.raises(ValueError, match="steps will write about"):
        _estimate.refuse_full_disk(found, steps)
    at = next(i for i, need in enumerate(needs) if (need.disk or 0) > 65536)
    partial = steps[at].directory.with_name(f"{steps[at].directory.name}.partial")
    (partial / "shards").mkdir(parents=True)
    (partial / "shards" / "one").write_bytes(b"1" * 65536)
    _estimate.refuse_full_disk(found, steps)
    free.free = needed - needs[at].disk - needs[at].meanwhile - 65536  # what it holds beyond its need is no one else's
    (partial / "shards" / "two").write_bytes(b"1" * int(needs[at].disk + needs[at].meanwhile + 65536))
    with pytest.raises(ValueError, match="steps will write about"):
        _estimate.refuse_full_disk(found, steps)


def test_estimates_are_of_the_right_size(folder):
    found = planned(folder)
    model = _estimate.parameters(found, "tuned")
    assert model == 2 * (4 * 32 * 32 + 3 * 32 * 4 * 32) + 400 * 32
    assert _estimate.text_bytes(found.recipe, "text") == (folder / "corpus.jsonl").stat().st_size
    for need in _estimate.estimate(found)[1:]:
        assert need.disk and need.memory and need.seconds


def test_planning_imports_neither_torch_nor_transformers(folder):
    (folder / "x.yaml").write_text(STEPS)
    code = (
        "import sys; from fusion import cli, recipe, run; from fusion.plan import plan; "
        f"plan(recipe.load({str(folder / 'x.yaml')!r})); "
        "print(sorted({'torch', 'transformers', 'trl', 'deepspeed', 'datasets', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
