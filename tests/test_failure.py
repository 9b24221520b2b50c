"""What ends a run from outside: SIGTERM saves first, a killed rank ends the others; the same command goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from fusion import _execute, _training, run
from fusion._sigterm import SaveAndStop, listening
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


DISTILL = {"model": "student", "targets": ["hints"], "data": "text", "max_length": 64}
WIDE = {"config": GPT2 | {"n_embd": 768, "n_layer": 8}, "tokenizer": {"train": "bytes"}}
LONG = {"learning_rate": 0.0} | TRAIN | {"max_steps": 300, "save_steps": 10}
SAVED = "checkpoints/checkpoint-10/saved-1-of-2"
# Of each step that several ranks share: the recipe's last step, and a file that is there when it is under way.
SHARED = {
    "record": ({"record": {"out": "last", "teacher": "wide", "data": "long"}}, "00001.json"),
    "distill": ({"distill": {"out": "last", "train": LONG} | DISTILL}, SAVED),
    "tune": ({"tune": RECIPE["steps"][0]["tune"] | {"out": "last", "train": LONG}}, SAVED),
    "merge": (
        {"merge": {"out": "last", "method": "ties", "base": "wide", "models": ["one", "two"]}},
        "manifest-1.jsonl",
    ),
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


def test_sigterm_saves_and_the_same_command_gives_the_same_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
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
    assert run.main([recipe, "--out", str(broken)]) == 0 and "tuned: tune continues" in capsys.readouterr().out
    one, other = (load_file(runs / "r/tuned/model.safetensors") for runs in (straight, broken))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    logs = [lines(runs / "r/tuned/log.jsonl") for runs in (straight, broken)]
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]]
    assert len(logs[1]) == len({line["step"] for line in logs[1]}), "a step was trained and logged twice"


def killed_before_the_model_is_written(call: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose training is over, with its checkpoints, and nothing else."""

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_training, "leave", stopped)
        assert run.main(call) == 130


def test_a_run_killed_after_its_last_checkpoint_trains_no_step_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune = {"tune": RECIPE["steps"][0]["tune"] | {"train": TRAIN | {"max_steps": 6, "save_steps": 3}}}
    (tmp_path / "r.yaml").write_text(json.dumps(RECIPE | {"steps": [tune]}))
    call = [str(tmp_path / "r.yaml"), "--out", str(tmp_path / "runs")]
    killed_before_the_model_is_written(call, monkeypatch)
    (partial,) = tmp_path.glob("runs/r/tuned-*.partial")
    assert {folder.name for folder in partial.glob("checkpoints/*")} == {"checkpoint-3", "checkpoint-6"}
    assert run.main(call) == 0
    log = lines(tmp_path / "runs/r/tuned/log.jsonl")
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3, 4, 5, 6]


IN_STEP = """
import os, signal, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
from fusion import run

seen = []

def end(*_):
    seen.append(1)
    if len(seen) == 3 and os.environ.get("RANK") != "0":  # alone, or the second rank
        os.kill(os.getpid(), signal.SIGTERM)

register_optimizer_step_post_hook(end)
sys.exit(run.main(sys.argv[1:]))
"""


def test_sigterm_in_the_last_step_ends_the_run_when_the_step_is_done(tmp_path: Path) -> None:
    tune = RECIPE["steps"][0]["tune"] | {"train": TRAIN | {"max_steps": 3, "save_strategy": "no"}}
    (tmp_path / "r.yaml").write_text(json.dumps(RECIPE | {"steps": [{"tune": tune}, {"tune": tune | {"out": "more"}}]}))
    call = [sys.executable, "-c", IN_STEP, str(tmp_path / "r.yaml"), "--out", str(tmp_path / "runs")]
    done = subprocess.run(call, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 143
    assert done.stderr.splitlines()[-1] == "fusion: tuned: SIGTERM, it is done; the same command continues"
    assert {file.name.split("-")[0] for file in (tmp_path / "runs/r").glob("[a-z]*-*")} == {"tuned"}
    _execute.check_whole(tmp_path / "runs/r/tuned")
    log = lines(tmp_path / "runs/r/tuned/log.jsonl")
    assert [line["step"] for line in log if "loss" in line] == [1, 2, 3]


@pytest.mark.slow
def test_sigterm_to_one_of_two_ranks_in_the_last_step_ends_both_when_it_is_done(tmp_path: Path) -> None:
    tune = RECIPE["steps"][0]["tune"] | {"train": TRAIN | {"max_steps": 3, "save_strategy": "no"}}
    (tmp_path / "r.yaml").write_text(json.dumps(RECIPE | {"steps": [{"tune": tune}, {"tune": tune | {"out": "more"}}]}))
    call = [sys.executable, "-c", IN_STEP, str(tmp_path / "r.yaml"), "--out", str(tmp_path / "runs")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    own = {"ACCELERATE_USE_CPU": "1"}
    pair = [subprocess.Popen([*call, "--use_cpu", "true"], env=one | own, **pipes) for one in environments(2)]
    said = "".join(ended(pair))
    assert [process.returncode for process in pair] == [143, 143], said
    assert said.count("fusion: tuned: SIGTERM, it is done; the same command continues") == 1
    assert {file.name.split("-")[0] for file in (tmp_path / "runs/r").glob("[a-z]*-*")} == {"tuned"}


def test_sigterm_while_the_trained_model_is_saved_ends_the_run_when_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tune = RECIPE["steps"][0]["tune"] | {"train": TRAIN | {"max_steps": 2, "save_strategy": "no"}}
    (tmp_path / "r.yaml").write_text(json.dumps(RECIPE | {"steps": [{"tune": tune}]}))
    call, leave = [str(tmp_path / "r.yaml"), "--out", str(tmp_path / "runs")], _training.leave

    def late(*given: Any, **named: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        leave(*given, **named)

    with monkeypatch.context() as patch:
        patch.setattr(_training, "leave", late)
        assert run.main(call) == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert run.main(call) == 0 and "tuned: done before" in capsys.readouterr().out


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


def shared(verb: str, folder: Path) -> Path:
    """A recipe that ends in such a step."""
    hints = {"record": {"out": "hints", "teacher": "student", "data": "text", "draws": 4}}
    models = {"wide": WIDE} | {name: WIDE | {"config": WIDE["config"] | {"n_inner": 3072}} for name in ("one", "two")}
    (folder / "r.yaml").write_text(
        json.dumps(
            {
                "models": RECIPE["models"] | models,
                "data": RECIPE["data"] | {"long": RECIPE["data"]["text"] | {"split": "train[:640]"}},
                "steps": ([hints] if verb == "distill" else []) + [SHARED[verb][0]],
            }
        )
    )
    return folder / "r.yaml"


def ended(ranks: Sequence[subprocess.Popen[str]]) -> list[str]:
    """What the ranks said, when all have ended within a minute."""
    until = time.monotonic() + 60
    return [rank.communicate(timeout=max(1, until - time.monotonic()))[0] for rank in ranks]


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_killed_rank_ends_the_one_in_a_collective_with_it(tmp_path: Path, victim: int) -> None:
    step = {"tests.collective": {"out": "sums", "how": "kill", "on_rank": victim}}
    (tmp_path / "r.yaml").write_text(json.dumps({"steps": [step]}))
    call = ["tests.collective", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "runs")]
    ranks = [start(call, one) for one in environments(2)]
    said = ended(ranks)
    assert [rank.returncode for rank in ranks] == [-9 if rank == victim else 1 for rank in range(2)]
    other = said[1 - victim].splitlines()
    assert other[-1] == f"fusion: rank {victim} has not answered for 2 s; the same command continues"
    assert "Traceback" not in "".join(said)
    (trace,) = tmp_path.glob(f"runs/r/sums-*.partial/traceback-{1 - victim}.txt")
    assert "dist.all_reduce" in trace.read_text() and "gloo" in trace.read_text()


def test_a_fault_of_one_rank_in_a_collective_shows_its_own_traceback_alone(tmp_path: Path) -> None:
    step = {"tests.collective": {"out": "sums", "how": "fault", "on_rank": 1}}
    (tmp_path / "r.yaml").write_text(json.dumps({"steps": [step]}))
    call = ["fusion.run", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "runs")]  # whose GONE is 40 s
    began = time.monotonic()
    said = ended([start(call, one) for one in environments(2)])
    assert time.monotonic() - began < 30
    assert "torch.ones(2) @ torch.ones(3)" in said[1] and "Traceback" not in said[0] and "answered" not in "".join(said)


@pytest.mark.slow
@pytest.mark.parametrize("verb", SHARED)
def test_a_rank_killed_in_the_middle_ends_all_within_a_minute_with_one_sentence(tmp_path: Path, verb: str) -> None:
    """Ranks that no launcher watches."""
    call = ["fusion.run", str(shared(verb, tmp_path)), "--out", str(tmp_path / "runs"), "--use_cpu", "true"]
    ranks = [start(call, one | {"ACCELERATE_USE_CPU": "1"}) for one in environments(2)]
    until = time.monotonic() + 200
    while not [file for file in tmp_path.glob(f"runs/r/last-*.partial/{SHARED[verb][1]}") if file.stat().st_size]:
        assert time.monotonic() < until and ranks[0].poll() is None, ranks[0].communicate()[0]
        time.sleep(0.005)
    ranks[1].kill()
    began = time.monotonic()
    said = "".join(ended(ranks))
    print(f"{verb}: {time.monotonic() - began:.1f} s from the kill to the end")
    sentences = [line for line in said.splitlines() if line.startswith("fusion: ")]
    assert [rank.returncode for rank in ranks] == [1, -9] and "Traceback" not in said
    assert len(sentences) == 1 and sentences[0].startswith("fusion: rank 1 has not answered for 40 s"), said
    assert sentences[0].endswith("; the same command continues")
    ranks = [start(call, one | {"ACCELERATE_USE_CPU": "1"}) for one in environments(2)]
    said = "".join(rank.communicate(timeout=200)[0] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [0, 0] and f"last: {verb} continues in" in said, said


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "zero3"])
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path: Path, kind: str) -> None:
    """ZeRO's shards have to be made universal for it, by DeepSpeed's own tool."""
    tune = {"tune": RECIPE["steps"][0]["tune"] | {"train": TRAIN | {"max_steps": 400, "save_steps": 10}}}
    (tmp_path / "r.yaml").write_text(json.dumps(RECIPE | {"steps": [tune]}))
    call = ["fusion.run", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "runs"), "--use_cpu", "true"]
    own, config = {"ACCELERATE_USE_CPU": "1"}, json.loads((ROOT / "launch/ds_z3.json").read_text())
    if kind == "zero3":
        (tmp_path / "zero.json").write_text(json.dumps(config))
        own, call = {}, [*call, "--deepspeed", str(tmp_path / "zero.json")]
    pair = [start(call, one | own) for one in environments(2)]
    reach(pair[0], tmp_path / "runs", 15)
    for rank in pair:
        rank.kill()
    for rank in pair:
        rank.communicate()
    alone = environments(1)[0] | own
    if kind == "zero3":
        said, _ = start(call, alone).communicate(timeout=200)
        (saved,) = tmp_path.glob("runs/r/tuned-*.partial/checkpoints/checkpoint-10")
        assert f"fusion: {saved} was saved by 2 processes, and ZeRO's shards fit no other number (1 here); " in said
        folders = ["--input_folder", f"{saved}/global_step10", "--output_folder", f"{saved}/global_step10_universal"]
        assert start(["deepspeed.checkpoint.ds_to_universal", *folders], alone).wait(200) == 0
        (tmp_path / "zero.json").write_text(json.dumps(config | {"checkpoint": {"load_universal": True}}))
    process = start(call, alone)
    said, _ = process.communicate(timeout=200)
    assert process.returncode == 0 and "tune continues" in said, said
    steps = [line["step"] for line in lines(tmp_path / "runs/r/tuned/log.jsonl") if "loss" in line]
    assert steps == list(range(1, 401))


def test_sigterm_that_met_an_error_still_ends_the_process() -> None:
    """A launcher sends it to the ranks that a killed one has left in a broken collective."""
    got: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda *_: got.append(1))
    try:
        with pytest.raises(RuntimeError, match="gloo"), listening(SaveAndStop(), "tuned"):
            signal.raise_signal(signal.SIGTERM)
            assert not got
            raise RuntimeError("gloo")
        assert got == [1]
    finally:
        signal.signal(signal.SIGTERM, before)
