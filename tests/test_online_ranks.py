"""Online merging over ranks: whatever the sharding, the weights are those of one process."""

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import together

BOTH = "ties:1,dare:4,dare:1"  # method:every


def run(kind, what, world, folder, dtype="float32"):
    file = folder / f"{kind}-{world}-{dtype}.safetensors"
    together(world, "tests.online_rank", kind, what, dtype, str(file))
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
