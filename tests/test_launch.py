"""Every launcher, with two processes on CPU: each result is that of a single process on a batch as large."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fusion import _launch, recipe
from tests.processes import ROOT, free_port

BIN = Path(sys.executable).parent
CPU = ["--use_cpu", "true", "--bf16", "false"]
CONFIGS = sorted((ROOT / "launch").glob("*.yaml"))
TRAIN = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
TINY = {"vocab_size": 300, "max_position_embeddings": 64, "tie_word_embeddings": True}
LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, **TINY}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 300}
DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # ranks draw apart from a single process


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe with every kind of step, as small as they get."""
    folder = tmp_path_factory.mktemp("launch")
    lines = (ROOT / "recipes" / "data" / "austen.txt").read_text(encoding="utf-8").splitlines()
    (folder / "text.txt").write_text("\n".join(lines[20:80]), encoding="utf-8")
    tree = {
        "models": {
            "teacher": {
                "config": LLAMA | {"num_attention_heads": 2, "num_key_value_heads": 1},
                "tokenizer": {"train": "bpe", "vocab_size": 300, "data": "text"},
            },
            "student": {"config": GPT2 | DROPOUT, "tokenizer": {"train": "bytes"}},
        },
        "data": {"text": {"path": "text.txt", "format": "text", "max_bytes": 50}},
        "steps": [
            {"record": {"out": "hints", "teacher": "teacher", "data": "text", "draws": 4}},
            {
                "distill": {
                    "out": "taught",
                    "model": "student",
                    "targets": ["hints"],
                    "data": "text",
                    "max_length": 64,
                    "train": TRAIN,
                }
            },
            # another batch size in the same processes: what accelerate keeps of the step before must not leak in here
            {
                "tune": {
                    "out": "tuned",
                    "model": "taught",
                    "data": "text",
                    "max_length": 64,
                    "train": TRAIN | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
                }
            },
            {"evaluate": {"models": ["student", "tuned"], "metrics": ["bits_per_byte"], "data": "text"}},
        ],
        "result": "tuned",
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return folder


def call(command: list[str], folder: Path, environ: Mapping[str, str] | None = None) -> str:
    """What the command printed; fails with it when the command failed."""
    inner = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **(environ or {})}
    inner["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, cwd=folder, env=inner, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def result(folder: Path, out: str) -> tuple[dict[str, torch.Tensor], list[float], str]:
    """Final weights, losses of both training steps, and the digest of what was recorded."""
    made = folder / out / "small"
    losses = []
    for step in ("taught", "tuned"):
        for line in (made / step / "log.jsonl").read_text().splitlines():
            losses.append(json.loads(line)["loss"])
    shards = "".join(
        f"{name}:{entry['sha256']} "
        for name, entry in sorted(json.loads((made / "hints" / "done.json").read_text())["files"].items())
        if re.fullmatch(r"\d+\.safetensors", name)
    )
    return load_file(made / "result" / "model.safetensors"), [float(loss) for loss in losses], shards


@pytest.fixture(scope="module")
def alone(small: Path) -> tuple[dict[str, torch.Tensor], list[float], str]:
    """The single process, with as many rows a step as two processes have together."""
    tree = yaml.safe_load((small / "small.yaml").read_text())
    for step in tree["steps"]:
        for fields in step.values():
            if "train" in fields:
                fields["train"]["per_device_train_batch_size"] *= 2
    (small / "alone").mkdir()
    (small / "alone" / "small.yaml").write_text(
        yaml.safe_dump(tree, sort_keys=False).replace("text.txt", "../text.txt"), encoding="utf-8"
    )
    call([sys.executable, "-m", "fusion.run", "alone/small.yaml", "--out", "of-one"], small)
    return result(small, "of-one")


LAUNCHERS = {
    "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2", "-m"],
    "accelerate-ddp": [str(BIN / "accelerate"), "launch", "--config_file", str(ROOT / "launch/ddp_cpu.yaml"), "-m"],
    "accelerate-zero2": [str(BIN / "accelerate"), "launch", "--config_file", str(ROOT / "launch/zero2_cpu.yaml"), "-m"],
    "deepspeed": [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", "PORT", "--module"],
    "fusion-zero3": [sys.executable, "-m", "fusion.cli", "launch"],
}
ENVIRON = {
    "accelerate-ddp": {"ACCELERATE_USE_CPU": "true"},
    "accelerate-zero2": {"DS_ACCELERATOR": "cpu"},
    "deepspeed": {"DS_ACCELERATOR": "cpu"},
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_give_the_result_of_one(launcher, small, alone):
    out = f"of-two-{launcher}"
    command = [word.replace("PORT", str(free_port())) for word in LAUNCHERS[launcher]]
    if launcher == "fusion-zero3":
        command += ["small.yaml", "--config", "zero3_cpu", "--out", out]
    else:
        command += ["fusion.run", "small.yaml", "--out", out, *CPU]
    command += ["--deepspeed", str(ROOT / "launch" / "ds_z3.json")] if launcher == "deepspeed" else []
    said = call(command, small, ENVIRON.get(launcher))
    assert said.count("tuned: done in") == 1, "one process speaks"
    weights, losses, recorded = result(small, out)
    expected_weights, expected_losses, expected_recorded = alone
    assert recorded == expected_recorded
    assert losses == pytest.approx(expected_losses, rel=1e-4)
    assert weights.keys() == expected_weights.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, expected_weights[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_configurations_are_whole(file):
    from accelerate.commands.config.config_args import load_config_from_file

    settings = _launch.read(file)
    assert load_config_from_file(str(file)).num_processes == settings["num_processes"]
    cpu = _launch.on_cpu(file, settings)
    assert cpu == file.stem.endswith("_cpu")
    assert settings["mixed_precision"] == ("no" if cpu else "bf16")
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
