"""Every command line of docs/launch.md that two processes on CPU can run: what comes out is a single process's result
on a batch as large, each document is seen once, and a world of one size gives one result, whoever started it."""

import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import yaml

from fusion import _launch, recipe
from tests.launching import BIN, CPU, HOSTFILE, ZERO3, Result, call, check_seen, nodes, result, write_recipe
from tests.processes import ROOT, free_port

CONFIGS = sorted((ROOT / "launch").glob("*.yaml"))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with every kind of step, as small as they get."""
    return write_recipe(tmp_path_factory.mktemp("launch"))


@pytest.fixture(scope="module")
def alone(small: Path) -> Result:
    """The single process, with as many rows a step as two processes have together."""
    tree = yaml.safe_load((small / "small.yaml").read_text())
    for step in tree["steps"]:
        for fields in step.values():
            if "train" in fields:
                fields["train"]["per_device_train_batch_size"] *= 2
    (small / "alone").mkdir()
    (small / "alone" / "small.yaml").write_text(
        yaml.safe_dump(tree, sort_keys=False).replace("text.jsonl", "../text.jsonl"), encoding="utf-8"
    )
    call([[sys.executable, "-m", "fusion.run", "alone/small.yaml", "--out", "of-one", *CPU]], small)
    return result(small, "of-one")


def accelerate(config: str) -> list[str]:
    return [str(BIN / "accelerate"), "launch", "--config_file", str(ROOT / "launch" / f"{config}.yaml"), "-m"]


def fusion(config: str) -> list[str]:
    return [sys.executable, "-m", "fusion.cli", "launch", "--config", config]


DEEPSPEED = [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", "PORT"]
# name -> the command up to the recipe, its environment, what comes after the recipe, how weights are split
LAUNCHERS: dict[str, tuple[list[str], dict[str, str], list[str], str]] = {
    "torchrun": ([str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", "-m"], {}, CPU, "ddp"),
    "accelerate-ddp": (accelerate("ddp_cpu"), {"ACCELERATE_USE_CPU": "true"}, CPU, "ddp"),
    "accelerate-ddp-bare": (accelerate("ddp_cpu"), {}, CPU, "ddp"),  # --use_cpu true is enough
    "accelerate-zero2": (accelerate("zero2_cpu"), {"DS_ACCELERATOR": "cpu"}, CPU, "zero2"),
    "accelerate-zero3": (accelerate("zero3_cpu"), {"DS_ACCELERATOR": "cpu"}, CPU, "zero3"),
    "deepspeed": ([*DEEPSPEED, "--no_local_rank", "--module"], {"DS_ACCELERATOR": "cpu"}, [*ZERO3, *CPU], "zero3"),
    "deepspeed-local-rank": ([*DEEPSPEED, "--module"], {"DS_ACCELERATOR": "cpu"}, [*ZERO3, *CPU], "zero3"),
    "fusion-ddp": (fusion("ddp_cpu"), {}, [], "ddp"),
    "fusion-zero1": (fusion("zero1_cpu"), {}, [], "zero1"),
    "fusion-zero2": (fusion("zero2_cpu"), {}, [], "zero2"),
    "fusion-zero3": (fusion("zero3_cpu"), {}, [], "zero3"),
    "fusion-offload": (fusion("zero3_offload_cpu"), {}, [], "offload"),
    # two nodes of one process each that meet over the loopback: the same command on both, but for NODE
    "torchrun-nodes": (nodes("torchrun"), {}, CPU, "ddp"),
    "torchrun-nodes-zero3": (nodes("torchrun"), {"DS_ACCELERATOR": "cpu"}, [*ZERO3, *CPU], "zero3"),
    "deepspeed-nodes": (nodes("deepspeed"), {"DS_ACCELERATOR": "cpu"}, [*ZERO3, *CPU], "zero3"),
    "accelerate-nodes": (nodes("accelerate"), {"DS_ACCELERATOR": "cpu"}, CPU, "zero3"),
}
QUICK = ("torchrun", "deepspeed-nodes", "fusion-zero2")


@pytest.fixture(scope="module")
def launched(small: Path) -> Callable[[str], Result]:
    """The result of a launcher by its name; each runs once."""
    done: dict[str, Result] = {}

    def start(launcher: str) -> Result:
        if launcher not in done:
            command, environ, after, _ = LAUNCHERS[launcher]
            out, port = f"of-two-{launcher}", str(free_port())
            command = [*command, *([] if launcher.startswith("fusion") else ["fusion.run"])]
            command = [word.replace("PORT", port) for word in [*command, "small.yaml", "--out", out, *after]]
            (small / HOSTFILE).write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1\n")
            both = [[one.replace("NODE", node).replace("FIRST", "127.0.0.1") for one in command] for node in "01"]
            said = call(both[: 1 + ("-nodes" in launcher)], small, environ)
            assert said.count("tuned: done in") == 1, "one process speaks"
            assert not [*Path("/dev/shm").glob(f"deepspeed_*_{port}_*")], "no memory outlives the processes"
            done[launcher] = result(small, out)
        return done[launcher]

    return start


def each(launchers: Mapping[str, object]) -> list[object]:
    """Launchers as parameters of a test: those that are not quick are marked slow."""
    return [one if one in QUICK else pytest.param(one, marks=pytest.mark.slow) for one in launchers]


@pytest.mark.parametrize("launcher", each(LAUNCHERS))
def test_two_processes_give_the_result_of_one(launcher, launched, alone):
    two = launched(launcher)
    check_seen(two.seen, alone.seen)
    assert two.recorded == alone.recorded
    assert two.losses == pytest.approx(alone.losses, rel=1e-5)
    assert two.weights.keys() == alone.weights.keys()
    for name, tensor in two.weights.items():
        torch.testing.assert_close(tensor, alone.weights[name], rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "zero2", "zero3"])
def test_all_launchers_of_a_kind_give_the_same_bits(kind, launched):
    digests = {one: launched(one).digest for one, (_, _, _, how) in LAUNCHERS.items() if how == kind}
    assert len(digests) > 1 and len(set(digests.values())) == 1, digests


@pytest.mark.slow
def test_fusion_launch_with_one_process_is_fusion_run(small, alone):
    call([[*fusion("single_cpu"), "alone/small.yaml", "--out", "of-single"]], small)
    assert result(small, "of-single").digest == alone.digest


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_configurations_are_whole(file):
    from accelerate.commands.config.config_args import load_config_from_file

    settings = _launch.read(file)
    assert load_config_from_file(str(file)).num_processes == settings["num_processes"]
    cpu = _launch.on_cpu(file, settings)
    assert cpu == file.stem.endswith("_cpu")
    assert settings["mixed_precision"] == "no", "the recipe's bf16 decides"
    twin = file.with_name(file.name.replace("_cpu", ""))
    kinds = ("distributed_type", "deepspeed_config")
    assert [_launch.read(twin).get(kind) for kind in kinds] == [settings.get(kind) for kind in kinds]


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_files_leave_the_optimizer_to_the_trainer(stage):
    settings = json.loads((ROOT / "launch" / f"ds_z{stage}.json").read_text())
    assert settings["zero_optimization"]["stage"] == stage
    assert "optimizer" not in settings and settings["zero_force_ds_cpu_optimizer"] is False


def test_environments():
    outer = {"PATH": "/bin", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "7"}
    deepspeed = _launch.environment({"distributed_type": "DEEPSPEED"}, True, 2, outer)
    assert deepspeed["DS_ACCELERATOR"] == "cpu" and "ACCELERATE_USE_CPU" not in deepspeed
    assert deepspeed["OMP_NUM_THREADS"] == "7" and deepspeed["CUDA_VISIBLE_DEVICES"] == ""
    assert deepspeed["PATH"] == f"{BIN}{os.pathsep}/bin"
    ddp = _launch.environment({"distributed_type": "MULTI_GPU"}, True, 64, {})
    assert ddp["ACCELERATE_USE_CPU"] == "true" and ddp["OMP_NUM_THREADS"] == "1"
    gpu = _launch.environment({"distributed_type": "DEEPSPEED"}, False, 8, {})
    assert "CUDA_VISIBLE_DEVICES" not in gpu and "OMP_NUM_THREADS" not in gpu


def test_devices_are_counted(monkeypatch):
    file = recipe.locate("launch", "zero3")
    settings = _launch.read(file)
    monkeypatch.setattr(_launch, "_devices", lambda: 0)
    with pytest.raises(ValueError, match="shows none; on CPUs: zero3_cpu"):
        _launch.processes_of(file, settings, False, None)
    monkeypatch.setattr(_launch, "_devices", lambda: 4)
    assert _launch.processes_of(file, settings, False, None) == 4
    assert _launch.processes_of(recipe.locate("launch", "single"), {"distributed_type": "NO"}, False, None) == 1
    with pytest.raises(ValueError, match="-n 8: only 4 accelerators visible"):
        _launch.processes_of(file, settings, False, 8)
    with pytest.raises(ValueError, match="at least one process"):
        _launch.processes_of(file, settings, False, 0)
    assert _launch.processes_of(file, settings, True, None) == settings["num_processes"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("distributed_type: MULTI_CPU", "one process only"),
        ("distributed_type: FSDP\nuse_cpu: true", "replaces FSDP by DDP"),
        ("distributed_type: DEEPSPEED\nuse_cpu: true", "turns DeepSpeed off"),
        ("distributed_type: MULTI_GPU\nnum_machines: 2", "docs/launch.md says what to run on each"),
        ("num_nodes: 2", "no accelerate configuration"),
    ],
)
def test_what_would_silently_be_something_else_is_refused(text, sentence, tmp_path):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        _launch.launch("smoke", str(tmp_path / "mine.yaml"), None, None, [])


def test_an_unknown_configuration_gets_the_nearest_guess():
    with pytest.raises(ValueError, match="did you mean 'zero3_cpu'"):
        _launch.launch("smoke", "zero3_cpus", None, None, [])
