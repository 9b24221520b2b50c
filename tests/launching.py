"""Launches of one small recipe on this machine's CPU, for tests: how they are started and what they leave behind."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from tests.processes import ROOT

BIN = Path(sys.executable).parent
CPU = ["--use_cpu", "true", "--bf16", "false"]
ZERO3 = ["--deepspeed", str(ROOT / "launch" / "ds_z3.json")]
HOSTFILE = "hostfile"
# Adam turns the rounding of a gradient that is almost zero into a whole step, unless epsilon is larger than it
TRAIN = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "adam_epsilon": 1e-3,
}
EPOCH = TRAIN | {"max_steps": -1, "num_train_epochs": 1, "per_device_train_batch_size": 1}
TINY = {"vocab_size": 300, "max_position_embeddings": 64, "tie_word_embeddings": True}
LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, **TINY}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 300}
DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # ranks draw apart from a single process
DOCUMENTS = [f"{one} is {one * one} when squared." for one in range(16)]


@dataclass(frozen=True)
class Result:
    """What a launch left behind."""

    weights: Mapping[str, torch.Tensor]
    losses: list[float]
    digest: str  # of the final model's file
    recorded: list[str]  # digests of the teacher's targets
    seen: list[dict]  # of each rank: world, main, (step, document) pairs


def write_recipe(folder: Path) -> Path:
    """small.yaml and its data in a folder, which is returned."""
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in DOCUMENTS), encoding="utf-8")
    tree = {
        "models": {
            "teacher": {
                "config": LLAMA | {"num_attention_heads": 2, "num_key_value_heads": 1},
                "tokenizer": {"train": "bpe", "vocab_size": 300, "data": "text"},
            },
            "student": {"config": GPT2 | DROPOUT, "tokenizer": {"train": "bytes"}},
        },
        "data": {"text": {"path": "text.jsonl", "column": "text"}},
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
                "tests.witness": {
                    "out": "tuned",
                    "model": "taught",
                    "data": "text",
                    "max_length": 64,
                    "train": EPOCH | {"gradient_accumulation_steps": 2},
                }
            },
            {"evaluate": {"models": ["student", "tuned"], "metrics": ["bits_per_byte"], "data": "text"}},
        ],
        "result": "tuned",
    }
    (folder / "small.yaml").write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return folder


def call(commands: Sequence[Sequence[str]], folder: Path, environ: Mapping[str, str] | None = None) -> str:
    """What commands that run at the same time printed; fails with it unless all end well."""
    inner = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **(environ or {})}
    inner["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [subprocess.Popen(command, cwd=folder, env=inner, **pipes) for command in commands]
    with ThreadPoolExecutor(len(started)) as pool:  # a full pipe would stop the process behind it
        said = list(pool.map(lambda one: one.communicate(timeout=400)[0], started))
    assert not any(one.returncode for one in started), "\n".join(
        f"{' '.join(command)}\n{text[-6000:]}" for command, text in zip(commands, said, strict=True)
    )
    return "".join(said)


def nodes(launcher: str) -> list[str]:
    """The command that each of two nodes runs, up to fusion.run: one process on each; FIRST is the first one's name,
    NODE the number of this one."""
    found = {
        "torchrun": "torchrun --nnodes 2 --nproc_per_node 1 --rdzv_backend c10d --rdzv_endpoint FIRST:PORT "
        "--rdzv_id JOB -m",
        "deepspeed": f"deepspeed --hostfile {HOSTFILE} --no_ssh --node_rank NODE --master_addr FIRST "
        "--master_port PORT --no_local_rank --module",
        "accelerate": f"accelerate launch --config_file {ROOT}/launch/zero3_cpu.yaml --num_machines 2 "
        "--num_processes 2 --machine_rank NODE --main_process_ip FIRST --main_process_port PORT -m",
    }
    name, *rest = found[launcher].split()
    return [str(BIN / name), *rest]


def result(folder: Path, out: str) -> Result:
    """What a launch of small.yaml left in a directory."""
    made = folder / out / "small"
    lines = [line for step in ("taught", "tuned") for line in (made / step / "log.jsonl").read_text().splitlines()]
    files = json.loads((made / "hints" / "done.json").read_text())["files"]
    model = made / "result" / "model.safetensors"
    return Result(
        load_file(model),
        [float(json.loads(line)["loss"]) for line in lines],
        hashlib.sha256(model.read_bytes()).hexdigest(),
        [files[name]["sha256"] for name in sorted(files) if re.fullmatch(r"\d+\.safetensors", name)],
        [json.loads(file.read_text()) for file in sorted((made / "tuned").glob("witness-*.json"))],
    )


def check_seen(seen: list[dict], others: list[dict]) -> None:
    """Two ranks, one of which is the main one, saw each document once in the epoch, in the steps of another launch."""
    assert [(one["world"], one["main"]) for one in seen] == [(2, True), (2, False)]
    by_rank = [[tuple(pair) for pair in one["seen"]] for one in seen]
    assert len(by_rank[0]) == len(by_rank[1]) == len(DOCUMENTS) // 2
    assert sorted(document for _, document in by_rank[0] + by_rank[1]) == sorted(DOCUMENTS)
    assert sorted(by_rank[0] + by_rank[1]) == sorted(tuple(pair) for one in others for pair in one["seen"])
