"""What ends a run from outside: SIGTERM saves first, on all ranks; the same command goes on to the same model."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fusion import _training, run
from tests.processes import ROOT, environments

ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
STEPS = 60
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}  # with dropout
TRAIN = {"max_steps": STEPS, "per_device_train_batch_size": 2, "save_steps": 1000, "logging_steps": 1}
RECIPE = {
    "models": {"student": {"config": GPT2, "tokenizer": {"train": "bytes"}}},
    "data": {"text": {"path": str(ROOT / "recipes/data/austen.txt"), "max_bytes": 50, "split": "train[100:160]"}},
    "steps": [{"tune": {"out": "tuned", "model": "student", "data": "text", "max_length": 64, "train": TRAIN}}],
}


def start(call: Sequence[str], environment: Mapping[str, str] = ENVIRONMENT) -> subprocess.Popen[str]:
    """A run whose output can be read when it is over."""
    return subprocess.Popen(
        [sys.executable, "-m", *call],
        env=dict(environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def lines(log: Path) -> list[dict[str, float]]:
    """The whole lines of a log."""
    return [json.loads(line) for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]


def reach(process: subprocess.Popen[str], runs: Path, step: int) -> None:
    """Returns when the training has logged this step."""
    until = time.monotonic() + 120
    while not [log for log in runs.glob("r/tuned-*.partial/log.jsonl") if len(lines(log)) >= step]:
        assert time.monotonic() < until and process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def test_sigterm_saves_and_the_same_command_gives_the_same_model(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(json.dumps(RECIPE))
    recipe, straight, broken = str(tmp_path / "r.yaml"), tmp_path / "straight", tmp_path / "broken"
    assert run.main([recipe, "--out", str(straight)]) == 0
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "a process that trained once can't be stopped any more"
    process = start(["fusion.run", recipe, "--out", str(broken)])
    reach(process, broken, 5)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    (saved,) = broken.glob("r/tuned-*.partial/checkpoints/checkpoint-*/saved-0-of-1")
    at = int(saved.parent.name.split("-")[1])
    assert process.returncode == 143 and 5 <= at < STEPS
    assert said.splitlines()[-1] == f"fusion: tuned: SIGTERM, saved at step {at}; the same command continues"
    assert "Traceback" not in said and not (broken / "r" / "tuned").exists()
    again = start(["fusion.run", recipe, "--out", str(broken)])
    said, _ = again.communicate(timeout=120)
    assert again.returncode == 0 and "tuned: tune continues" in said, said
    one, other = (load_file(runs / "r/tuned/model.safetensors") for runs in (straight, broken))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    logs = [lines(runs / "r/tuned/log.jsonl") for runs in (straight, broken)]
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]]
    assert len(logs[1]) == len({line["step"] for line in logs[1]}), "a step was trained and logged twice"


def test_a_run_killed_after_its_last_checkpoint_trains_no_step_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune = {"tune": RECIPE["steps"][0]["tune"] | {"train": TRAIN | {"max_steps": 6, "save_steps": 3}}}
    (tmp_path / "r.yaml").write_text(json.dumps(RECIPE | {"steps": [tune]}))
    call = [str(tmp_path / "r.yaml"), "--out", str(tmp_path / "runs")]

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_training, "leave", stopped)
        assert run.main(call) == 130
    (partial,) = tmp_path.glob("runs/r/tuned-*.partial")
    assert {folder.name for folder in partial.glob("checkpoints/*")} == {"checkpoint-3", "checkpoint-6"}
    assert run.main(call) == 0
    log = lines(tmp_path / "runs/r/tuned/log.jsonl")
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_sigterm_to_one_of_two_ranks_saves_and_ends_both(tmp_path: Path) -> None:
    tune = {"tune": RECIPE["steps"][0]["tune"] | {"train": TRAIN | {"max_steps": 1000, "save_steps": 10}}}
    (tmp_path / "r.yaml").write_text(json.dumps(RECIPE | {"steps": [tune]}))
    call = ["fusion.run", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "runs"), "--use_cpu", "true"]
    pair = [start(call, one | {"ACCELERATE_USE_CPU": "1"}) for one in environments(2)]
    reach(pair[0], tmp_path / "runs", 15)
    began = time.monotonic()
    pair[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=90)[0] for process in pair]
    assert time.monotonic() - began < 60
    sentences = [line for text in said for line in text.splitlines() if line.startswith("fusion: ")]
    assert len(sentences) == 1, said
    saved = [int(folder.name.split("-")[1]) for folder in tmp_path.glob("runs/r/tuned-*.partial/checkpoints/*")]
    assert [process.returncode for process in pair] == [143, 143]
    assert sentences[0] == f"fusion: tuned: SIGTERM, saved at step {max(saved)}; the same command continues"
    pair = [start(call, one | {"ACCELERATE_USE_CPU": "1"}) for one in environments(2)]
    said = [process.communicate(timeout=200)[0] for process in pair]
    assert [process.returncode for process in pair] == [0, 0] and "tune continues" in said[0]
    steps = [line["step"] for line in lines(tmp_path / "runs/r/tuned/log.jsonl") if "loss" in line]
    assert steps == list(range(1, 1001))
