"""Tuning by preferences and rewards: TRL's trainers in a recipe, online merging in it, kill and resume, bad input."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fusion import data, recipe, run
from fusion.plan import plan
from fusion.sources import load_model, load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
TRAIN = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
TRAIN |= {"gradient_checkpointing": False}
MERGE = {"base": "base", "method": "ties", "alpha": 0.1, "density": 0.5}
GROUP = {"num_generations": 2, "max_completion_length": 8}
PAIRS = [{"prompt": f"Say {i}:", "chosen": f" it is {i}.", "rejected": f" not {i + 1}, I think."} for i in range(12)]
LABELS = [
    {"prompt": one["prompt"], "completion": one["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
    for i, one in enumerate(PAIRS)
]


def tune(out, algorithm="dpo", data="pairs", train=None, **more):
    fields = {"out": out, "model": "start", "data": data, "algorithm": algorithm, "max_length": 96}
    return {"tune": fields | {"train": TRAIN | (train or {})} | more}


def write(folder: Path, *steps: dict, **more: dict) -> Path:
    """A recipe over `start` and `base`, of one architecture and tokenizer, in a folder with all data."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("pairs", PAIRS), ("labels", LABELS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "text.txt").write_text("\n\n".join(" ".join(row.values()) for row in PAIRS * 20))
    shutil.copy(Path(__file__).with_name("brevity.py"), folder / "brevity.py")
    scratch = {"config": LLAMA, "tokenizer": {"train": "bpe", "vocab_size": 300, "data": "text"}}
    tree = {
        "models": {"start": scratch, "base": scratch},
        "data": {
            "text": {"path": "text.txt"},
            "pairs": {"path": "pairs.jsonl", "column": "*"},
            "labels": {"path": "labels.jsonl", "column": "*"},
        },
        "steps": list(steps),
    }
    for key, value in more.items():
        tree[key] |= value
    (folder / "r.yaml").write_text(json.dumps(tree))
    return folder / "r.yaml"


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def log(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a recipe with every algorithm, and with online merging."""
    folder = tmp_path_factory.mktemp("tune")
    file = write(
        folder,
        tune("still", train={"learning_rate": 0.0, "weight_decay": 0.0, "max_steps": 1}),
        tune("dpo"),
        tune("merged", online_merge=MERGE),
        tune("nothing", online_merge={"base": "base", "method": "dare", "alpha": 0.0, "density": 1.0}),
        tune("continued", algorithm="clm", data="text", online_merge=MERGE),
        tune("kto", "kto", "labels"),
        tune("scorer", "reward"),
        tune("grpo", "grpo", rewards=["tests.brevity"], train=GROUP),
        tune("rloo", "rloo", rewards=["tests.brevity"], train=GROUP),
        tune("adapter", peft={"r": 2, "target_modules": ["q_proj"]}),
        {"evaluate": {"models": ["start", "dpo", "merged"], "metrics": ["bits_per_byte"], "data": "text"}},
    )
    assert run.main([str(file), "--out", str(folder / "runs")]) == 0
    return folder / "runs" / "r"


@pytest.mark.parametrize("name", ["dpo", "merged", "continued", "kto", "grpo", "rloo", "adapter"])
def test_every_algorithm_trains_and_leaves_a_model(ran, name):
    before, after = weights(ran / "still"), weights(ran / name)
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[n], after[n]) for n in before)
    assert all(torch.isfinite(t).all() for t in after.values())
    left = {file.name for file in (ran / name).iterdir()}
    assert not left & {"rows", "tokens", "checkpoints"}
    assert [line["step"] for line in log(ran / name)] == [1, 2]
    assert json.loads((ran / name / "metrics.json").read_text())["steps"] == 2
    model, same = load_model(ran / name), load_model(ran / "still")
    assert model.config.use_cache and model.config.pad_token_id == same.config.pad_token_id
    tokenizers = [json.loads((ran / one / "tokenizer.json").read_text()) for one in (name, "still")]
    assert tokenizers[0] == tokenizers[1]
    assert load_tokenizer(ran / name).pad_token == load_tokenizer(ran / "still").pad_token


def test_a_reward_model_gives_one_number(ran):
    from transformers import AutoModelForSequenceClassification

    model, info = AutoModelForSequenceClassification.from_pretrained(ran / "scorer", output_loading_info=True)
    assert not info["missing_keys"] and model.config.num_labels == 1
    assert model(torch.arange(8).unsqueeze(0)).logits.shape == (1, 1)
    assert "lm_head.weight" not in weights(ran / "scorer")


def test_merging_changes_the_weights_and_says_what_it_did(ran):
    plain, merged = weights(ran / "dpo"), weights(ran / "merged")
    assert any(not torch.equal(plain[n], merged[n]) for n in plain)
    wanted = {"online_update_kept", "online_sign_conflicts", "online_update_norm", "online_drift"}
    assert wanted <= log(ran / "merged")[-1].keys()
    assert 0 < log(ran / "merged")[-1]["online_update_kept"] <= 1
    assert "online_drift" not in log(ran / "dpo")[-1] and "rewards/accuracies" in log(ran / "dpo")[-1]
    before = weights(ran / "still")
    drift = sum((merged[n].double() - before[n].double()).square().sum() for n in before) ** 0.5
    assert log(ran / "merged")[-1]["online_drift"] == pytest.approx(float(drift), rel=1e-4)


def test_the_report_draws_rewards_and_what_merging_did(ran):
    page = (ran / "report.html").read_text()
    wanted = ("Reward margin on pairs", "Reward on pairs", "Update kept by online merging on pairs", "Loss on labels")
    assert [title for title in wanted if title not in page] == []
    assert "Length of the merged update on pairs" in page
    dpo, merged = json.loads((ran / "report.json").read_text())["taxes"]
    assert (dpo["model"], dpo["start"], merged["model"]) == ("dpo", "start", "merged") and dpo["bits_per_byte"]
    assert dpo["gains"].keys() == {"rewards/margins", "rewards/accuracies"} and "Alignment tax" in page
    assert "Language-model loss on text" in page and "Language-model loss on pairs" not in page


def test_nothing_to_merge_is_plain_dpo_bit_by_bit(ran):
    plain, idle = weights(ran / "dpo"), weights(ran / "nothing")
    assert all(torch.equal(plain[n], idle[n]) for n in plain)


WINDOWS = {"ema": ({"ema": 0.5}, None), "adapter": ({}, {"r": 2, "target_modules": ["q_proj", "down_proj"]})}


@pytest.mark.parametrize(("more", "peft"), WINDOWS.values(), ids=WINDOWS)
def test_a_killed_run_goes_on_bit_by_bit_inside_a_window(tmp_path, more, peft):
    """Checkpoints come every 3 steps, windows end every 4."""
    train = {"max_steps": 9, "save_steps": 3}
    file = write(tmp_path, tune("tuned", train=train, peft=peft, online_merge=MERGE | {"every": 4} | more))
    call = [sys.executable, "-m", "fusion.run", str(file), "--out"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert run.main([str(file), "--out", str(tmp_path / "straight")]) == 0
    broken = tmp_path / "broken"
    process = subprocess.Popen([*call, str(broken)], env=environment, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not list(broken.glob("r/tuned-*.partial/checkpoints/checkpoint-3/saved-*")):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (broken / "r" / "tuned").exists()
    assert run.main([str(file), "--out", str(broken)]) == 0
    one, two = weights(tmp_path / "straight/r/tuned"), weights(broken / "r/tuned")
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    losses = [[line["loss"] for line in log(folder / "r/tuned")] for folder in (tmp_path / "straight", broken)]
    assert losses[0] == losses[1]


def test_two_processes_under_zero_2_merge_online(tmp_path):
    """The launcher's own configuration for two processes on a CPU."""
    met = {"model": "base", "every": 1, "weight": 1.0}  # after the last step nothing but the other model is left
    copied = {"merge": {"out": "other", "method": "linear", "models": {"base": 1.0}}}
    file = write(tmp_path, tune("tuned", train={"max_steps": 1}, online_merge=MERGE, merge_with=met), copied)
    call = [sys.executable, "-m", "fusion.cli", "launch", str(file), "--config", "zero2_cpu", "--out", "runs"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    first = log(tmp_path / "runs/r/tuned")[0]
    assert 0 < first["online_update_kept"] <= 1
    tuned, base = weights(tmp_path / "runs/r/tuned"), weights(tmp_path / "runs/r/other")
    assert all(torch.equal(tuned[name], base[name]) for name in tuned)


def key(file: Path) -> str:
    return plan(recipe.load(file), file.parent / "runs").steps[-1].key


def test_the_content_key_knows_base_reference_and_rewards(tmp_path, monkeypatch):
    other = LLAMA | {"num_hidden_layers": 1}
    scratch = {"config": other, "tokenizer": {"train": "bpe", "vocab_size": 300, "data": "text"}}
    keys = [
        key(write(tmp_path / name, tune("tuned", online_merge=merge), models=models))
        for name, merge, models in (
            ("a", MERGE, {}),
            ("b", MERGE, {"base": scratch}),
            ("c", MERGE | {"reference": "base", "base": "start"}, {}),
        )
    ]
    assert len(set(keys)) == 3
    monkeypatch.syspath_prepend(str(tmp_path / "d"))
    file = write(tmp_path / "d", tune("tuned", "grpo", rewards=["inner.brevity"]))
    (tmp_path / "d" / "inner").mkdir()
    shutil.move(tmp_path / "d" / "brevity.py", tmp_path / "d" / "inner" / "brevity.py")
    first = key(file)
    with open(tmp_path / "d" / "inner" / "brevity.py", "a") as source:
        source.write("# changed\n")
    assert first != key(file)


BAD = {
    "texts for dpo": (tune("t", data="text"), "learns from whole rows"),
    "rows for clm": (tune("t", "clm"), "clm learns from texts"),
    "columns": (tune("t", "kto", "bare"), "there is no 'completion' among prompt, label"),
    "no rewards": (tune("t", "grpo"), "grpo needs rewards"),
    "rewards for dpo": (tune("t", rewards=["tests.brevity"]), "dpo has no rewards"),
    "no dot": (tune("t", "grpo", rewards=["brevity"]), "'brevity' has no dot"),
    "no module": (tune("t", "rloo", rewards=["my_lab.nowhere"]), "no module 'my_lab.nowhere'"),
    "no base": (tune("t", online_merge={"alpha": 0.1}), "it needs a base"),
    "same": (tune("t", online_merge=MERGE | {"base": "start"}), "both 'start'"),
    "unknown base": (tune("t", online_merge=MERGE | {"base": "bass"}), "did you mean 'base'"),
    "unknown parameter": (tune("t", online_merge=MERGE | {"densty": 1.0}), "did you mean 'density'"),
    "unknown method": (tune("t", online_merge=MERGE | {"method": "tise"}), "did you mean 'ties'"),
    "other unit": (tune("t", online_merge={"base": "base", "method": "tsv_m"}), "shards of a model in training"),
    "an adapter": (tune("t", online_merge=MERGE, peft={"r": 2}), "one step of a fresh adapter"),
    "nobody to meet": (tune("t", merge_with={"every": 1}), "it needs model, the model to merge with"),
    "unknown other": (tune("t", merge_with={"model": "bass", "every": 1}), "did you mean 'base'"),
    "never": (
        tune("t", merge_with={"model": "base", "every": 9}),
        "training has 2 steps: nothing would ever be merged",
    ),
    "inside a window": (
        tune("t", online_merge=MERGE | {"every": 2}, merge_with={"model": "base", "every": 1}),
        "1 is no multiple of online_merge.every (2)",
    ),
    "misspelt": (tune("t", merge_with={"model": "base", "evry": 1}), "did you mean 'every'"),
    "no base for ties": (tune("t", merge_with={"model": "base", "every": 1, "method": "ties"}), "base"),
    "share": (tune("t", merge_with={"model": "base", "every": 1, "weight": 2.0}), "from 0 to 1"),
    "met by an adapter": (tune("t", merge_with={"model": "base", "every": 1}, peft={"r": 2}), "merges whole weights"),
    "one group": (tune("t", "sft", "text", merge_with={"groups": 1, "every": 1}), "groups is 1; two or more networks"),
    "weighted groups": (tune("t", "clm", "text", merge_with={"groups": 2, "every": 1, "weight": 0.5}), "count alike"),
    "groups and a model": (
        tune("t", "clm", "text", merge_with={"groups": 2, "every": 1, "model": "base"}),
        "each other",
    ),
    "groups for dpo": (tune("t", merge_with={"groups": 2, "every": 1}), "looks at the rows of all ranks"),
    "aligned groups": (tune("t", merge_with={"groups": 2, "align": "x"}), "recipes/papers/dimat.yaml"),
    "decay": (tune("t", online_merge=MERGE | {"ema": 1.0}), "between 0 and 1"),
    "algorithm": (tune("t", "ppo"), "'grpo' or 'rloo'"),
}


@pytest.mark.parametrize(("step", "sentence"), BAD.values(), ids=BAD)
def test_what_cannot_be_meant_is_said_while_planning(tmp_path, step, sentence):
    (tmp_path / "bare.jsonl").write_text('{"prompt": "a", "label": true}\n')
    file = write(tmp_path, step, data={"bare": {"path": "bare.jsonl", "column": "*"}})
    with pytest.raises(ValueError, match=r"steps\[0\].tune") as caught:
        plan(recipe.load(file), tmp_path / "runs")
    assert sentence in str(caught.value)


def test_shapes_of_base_and_reference_are_compared_while_planning(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    for name, size in (("small", 40), ("large", 48)):
        LlamaForCausalLM(LlamaConfig(**LLAMA, vocab_size=size)).save_pretrained(tmp_path / name)
    models = {name: {"path": name} for name in ("small", "large")}
    merge = MERGE | {"base": "small", "reference": "large"}
    with pytest.raises(ValueError, match=r"\(40, 32\) in 'small' and \(48, 32\) in 'large'; a resized vocabulary"):
        plan(recipe.load(write(tmp_path, tune("t", online_merge=merge), models=models)), tmp_path / "runs")


def test_rows_are_not_texts_and_texts_have_no_rows(tmp_path):
    loaded = recipe.load(write(tmp_path, tune("t")))
    with pytest.raises(ValueError, match="rows of preferences"):
        data.documents(loaded.data["pairs"], loaded.base, loaded.data)
    bad = {"lines": {"path": "text.txt", "column": "*"}}
    with pytest.raises(ValueError, match="a text file has no columns"):
        plan(recipe.load(write(tmp_path / "b", tune("t", data="lines"), data=bad)), tmp_path / "runs")


def test_train_fields_are_those_of_trls_configuration(tmp_path, capsys):
    file = write(tmp_path, tune("t", train={"betta": 0.1}))
    assert run.main([str(file), "--out", str(tmp_path / "runs")]) == 1
    assert "there is no train field 'betta'; did you mean 'beta'" in capsys.readouterr().err


def test_bfloat16_is_refused_where_the_cpu_has_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    file = write(tmp_path, tune("t"))
    assert run.main([str(file), "--out", str(tmp_path / "runs"), "--use_cpu", "true", "--bf16", "true"]) == 1
    assert "no instructions for bfloat16" in capsys.readouterr().err


def test_rows_that_would_be_cropped_are_refused(tmp_path, capsys):
    file = write(tmp_path, tune("t", max_length=6))
    assert run.main([str(file), "--out", str(tmp_path / "runs")]) == 1
    assert "have more than 6 tokens" in capsys.readouterr().err
