"""What a launcher would silently turn a recipe into gets a sentence: from the environment, from its configuration."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from fusion import _launch, _launched, _machine, _ranks, plan, recipe
from fusion._launched import Launched, check_processes, check_train, of_environment
from fusion.run import main

OFFLOAD = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
BATCHES = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1, "train_batch_size": 8}


@pytest.mark.parametrize(
    ("launched", "train", "sentence"),
    [
        (Launched(kept_on_cpu=True, deepspeed={}), {}, "ACCELERATE_USE_CPU=true makes accelerate leave DeepSpeed out"),
        (Launched(2, "cpu", fsdp=True), {}, "replaces FSDP by DDP"),
        (Launched(), {"fsdp": "full_shard", "use_cpu": True}, "replaces FSDP by DDP"),
        (Launched(2, "cpu"), {"use_cpu": False}, "would believe it is the only one"),
        (Launched(2, "cuda:0", {}, deepspeed_on_cpu=True), {}, "trainer computes on cuda:0; add --use_cpu true"),
        (Launched(precision="bf16"), {"bf16": False}, "mixed_precision: bf16 would win"),
        (Launched(deepspeed={"optimizer": {"type": "Adam"}}), {}, "its own optimizer, which would replace optim"),
        (Launched(), {"deepspeed": {"scheduler": {}}}, "its own scheduler, which would replace lr_scheduler_type"),
        (Launched(deepspeed=OFFLOAD), {"optim": "sgd"}, "optim: sgd, but with offload_optimizer"),
        (Launched(deepspeed=BATCHES), {}, "train_micro_batch_size_per_gpu: 4, and per_device_train_batch_size is 8"),
        (
            Launched(deepspeed=BATCHES),
            {"gradient_accumulation_steps": 3},
            "gradient_accumulation_steps is 3; write auto",
        ),
        (Launched(3, deepspeed=BATCHES), {"per_device_train_batch_size": 4}, "train_batch_size: 8, and .* is 12"),
        (Launched(), {"deepspeed": "nowhere.json"}, "there is no DeepSpeed configuration nowhere.json"),
    ],
)
def test_what_would_be_something_else_is_refused(launched, train, sentence):
    with pytest.raises(ValueError, match=f"(?s)^here: .*{sentence}"):
        check_train(train, launched, "here")


@pytest.mark.parametrize(
    ("launched", "train", "said"),
    [
        (Launched(), {}, None),
        (Launched(2, "cpu", {}, deepspeed_on_cpu=True), {"use_cpu": True, "bf16": False}, None),
        (Launched(2, "cuda:1", BATCHES), {"per_device_train_batch_size": 4, "bf16": True}, None),
        (Launched(2, "cuda:1", fsdp=True, precision="bf16"), {"bf16": True}, None),
        (Launched(deepspeed=OFFLOAD | {"zero_force_ds_cpu_optimizer": False}), {"optim": "sgd"}, None),
        (Launched(precision="bf16"), {}, "computes in bf16"),
        (Launched(deepspeed=OFFLOAD), {}, "DeepSpeed's CPU Adam stands in"),
    ],
)
def test_what_is_legal_passes_and_what_is_surprising_is_printed(launched, train, said):
    lines = check_train(train, launched, "here")
    assert lines == [] if said is None else len(lines) == 1 and said in lines[0]


@pytest.mark.parametrize("stage", [2, 3])
def test_our_own_deepspeed_files_pass(stage):
    file = recipe.locate("launch", "zero3").parent / f"ds_z{stage}.json"
    assert check_train({"deepspeed": str(file), "per_device_train_batch_size": 3}, Launched(2, "cpu"), "here") == []


@pytest.mark.parametrize("name", ["ddp", "zero2", "zero3_offload", "fsdp2", "single"])
def test_a_configuration_says_what_accelerate_puts_into_the_environment(name, tmp_path):
    from argparse import Namespace

    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    settings = _launch.read(recipe.locate("launch", name))
    if "deepspeed_config" in settings:
        settings["deepspeed_config"]["gradient_accumulation_steps"] = 4
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(settings))
    given = launch_command_parser().parse_args(["--config_file", str(file), "--num_processes", "2", "train.py"])
    asked: Namespace = _validate_launch_command(given)[0]
    asked.deepspeed_fields_from_accelerate_config = ""
    if asked.use_deepspeed:
        environ = prepare_deepspeed_cmd_env(asked)[1]
    else:
        environ = prepare_multi_gpu_env(asked)
    assert of_environment(environ, 2, "cuda:0") == of_environment(_launched.told(settings), 2, "cuda:0")
    assert (of_environment(environ, 2, "").deepspeed is None) == ("deepspeed_config" not in settings)


def test_fewer_devices_than_processes():
    with pytest.raises(ValueError, match="4 processes were started on this machine, and 1 accelerator is visible"):
        check_processes({"LOCAL_WORLD_SIZE": "4", "RANK": "0"}, 4, "cuda:0", 1)
    with pytest.raises(ValueError, match="4 processes were started on this machine, and 2 accelerators are visible"):
        check_processes({"LOCAL_WORLD_SIZE": "4", "RANK": "0"}, 8, "cuda:0", 2)
    assert check_processes({"RANK": "3"}, 4, "cuda:0", 1) == ["4 processes"], "srun shows each task its own device"
    assert check_processes({"LOCAL_WORLD_SIZE": "4", "RANK": "0"}, 4, "cpu", 0) == ["4 processes"]
    assert check_processes({}, 1, "cpu", 0) == []


def test_one_process_of_accelerate_and_port_0():
    [line] = check_processes({"ACCELERATE_USE_CPU": "True"}, 1, "cpu", 0)
    assert "one process: accelerate starts several on CPUs with launch/ddp_cpu.yaml" in line
    with pytest.raises(ValueError, match="MASTER_PORT is 0"):
        check_processes({"MASTER_PORT": "0", "RANK": "0"}, 2, "cpu", 0)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A recipe with one training step, which nothing here ever starts."""
    (tmp_path / "text.txt").write_text("one\ntwo\n")
    tree = {
        "models": {"a": {"config": {"model_type": "gpt2", "n_layer": 1}, "tokenizer": {"train": "bytes"}}},
        "data": {"text": {"path": "text.txt", "format": "text"}},
        "steps": [{"tune": {"out": "tuned", "model": "a", "data": "text", "train": {"max_steps": 1}}}],
    }
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return tmp_path


def test_a_run_says_it_before_the_first_step(small, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert main([str(small / "small.yaml"), "--out", str(small / "runs")]) == 1
    assert (
        "steps[0].tune.train: ACCELERATE_USE_CPU=true makes accelerate leave DeepSpeed out" in capsys.readouterr().err
    )
    assert not list((small / "runs").glob("small/tuned*"))


def test_bfloat16_on_a_cpu_without_it(small, monkeypatch, capsys):
    monkeypatch.setattr(_machine, "_computes_bf16", lambda: False)
    assert main([str(small / "small.yaml"), "--out", str(small / "runs"), "--use_cpu", "true", "--bf16", "true"]) == 1
    assert "steps[0].tune.train.bf16: this CPU has no instructions for bfloat16" in capsys.readouterr().err


def test_a_plan_reads_the_deepspeed_file(small):
    (small / "mine.json").write_text(json.dumps({"optimizer": {"type": "Adam"}, "train_micro_batch_size_per_gpu": 1}))
    loaded = recipe.load(small / "small.yaml", {"deepspeed": str(small / "mine.json")})
    with pytest.raises(
        ValueError, match=r"(?s)steps\[0\]\.tune\.train: .*optimizer.*train_micro_batch_size_per_gpu: 1"
    ):
        plan.plan(loaded, small / "runs")


def test_a_launch_is_checked_before_it_starts(small):
    config = _launch.read(recipe.locate("launch", "zero3_cpu"))
    config["deepspeed_config"]["gradient_accumulation_steps"] = 4
    (small / "mine_cpu.yaml").write_text(yaml.safe_dump(config))
    path, runs = str(small / "small.yaml"), str(small / "runs")
    with pytest.raises(ValueError, match="gradient_accumulation_steps: 4, and gradient_accumulation_steps is 1"):
        _launch.launch(path, str(small / "mine_cpu.yaml"), None, runs, [])
    wrong = small / "wrong.yaml"
    wrong.write_text((small / "small.yaml").read_text().replace("model: a", "model: b"))
    with pytest.raises(ValueError, match="there is no model 'b'"):
        _launch.launch(str(wrong), "zero3_cpu", None, runs, [])
    prepared = _launch.prepare(path, "zero3_offload_cpu", 3, runs, ["--max_steps", "2"])
    assert prepared.said[0] == "3 processes by zero3_offload_cpu" and "CPU Adam" in prepared.said[1]
    assert prepared.plan.recipe.overrides == {"use_cpu": True, "bf16": False, "max_steps": 2}
    asked = _launch.prepare(path, "zero3_cpu", None, runs, ["--bf16", "true"]).plan.recipe.overrides
    assert asked["bf16"] is True, "what is asked for on the command line wins"


def test_two_nodes_with_the_same_rank_find_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(_ranks, "MEET", 20.0)
    environ = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "node-0", "MASTER_PORT": "29500"}
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(_ranks.join, tmp_path, dict(environ)) for _ in range(2)]
        for one in both:
            with pytest.raises(ValueError, match="two processes call themselves rank 0, on .*--node_rank of its own"):
                one.result()


def test_what_one_step_sets_for_accelerate_ends_with_it(monkeypatch):
    from fusion._training import fresh_state

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED", raising=False)
    with fresh_state():
        os.environ.update(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_MIXED_PRECISION="bf16")
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "no" and "ACCELERATE_USE_DEEPSPEED" not in os.environ
