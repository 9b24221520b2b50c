"""Online merging over ranks: whatever the sharding, the weights are those of one process."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = Path(__file__).with_name("online_rank.py")
ROOT = Path(__file__).resolve().parent.parent
BOTH = "ties:1,dare:4,dare:1"  # method:every


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def run(kind, what, world, folder, dtype="float32"):
    file = folder / f"{kind}-{world}-{dtype}.safetensors"
    port = str(free_port())
    base = os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(world),
        "LOCAL_SIZE": str(world),
        "GLOO_SOCKET_IFNAME": "lo",
        "DS_ACCELERATOR": "cpu",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = [sys.executable, str(SCRIPT), kind, what, dtype, str(file)]
    ranks = [
        subprocess.Popen(
            command,
            env=base | {"RANK": str(r), "LOCAL_RANK": str(r)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in range(world)
    ]
    said = [one.communicate(timeout=240)[0] for one in ranks]
    assert all(one.returncode == 0 for one in ranks), "\n".join(text[-3000:] for text in said)
    return load_file(file)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Weights of one process."""
    return run("ddp", BOTH, 1, tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize(("kind", "world"), [("ddp", 3), ("fsdp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2)])
def test_sharded_is_one_process(kind, world, tmp_path, alone):
    got = run(kind, BOTH, world, tmp_path)
    for name, weight in alone.items():
        torch.testing.assert_close(got[name], weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_the_model_is_the_cast_of_its_masters(kind, tmp_path):
    got = run(kind, BOTH, 2, tmp_path, "bfloat16")
    masters = [n for n in got if "/model." not in n]
    assert masters
    for name in masters:
        assert torch.equal(got[name.replace("/", "/model.")], got[name].bfloat16().float()), name
