"""Online merging over ranks: whatever the sharding, the weights are those of one process."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from fusion.online.layouts import layout
from tests.online_rank import trained
from tests.processes import together

BOTH = "ties:1,dare:4,dare:1"  # method:every


def run(kind, what, world, folder, dtype="float32"):
    file = folder / f"{kind}-{world}-{dtype}.safetensors"
    together(world, "tests.online_rank", kind, what, dtype, str(file))
    return load_file(file)


@pytest.fixture(scope="module")
def alone():
    """Weights of one process."""
    return trained("ddp", BOTH, "float32")


@pytest.mark.parametrize(("kind", "world"), [("ddp", 3), ("fsdp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2)])
def test_sharded_is_one_process(kind, world, tmp_path, alone):
    got = run(kind, BOTH, world, tmp_path)
    for name, weight in alone.items():
        torch.testing.assert_close(got[name], weight, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "kind", [pytest.param("bf16", marks=pytest.mark.slow), pytest.param("zero2", marks=pytest.mark.slow), "zero3"]
)
def test_masters_stay_within_one_ulp_and_the_model_is_their_cast(kind, tmp_path):
    """Each rank compares the model with its masters after every step."""
    only = "dare:4,dare:1"  # ties would elect other signs where updates differ by a rounding
    hand = trained("masters", only, "bfloat16")
    got = run(kind, only, 2, tmp_path, "bfloat16")
    for name, weight in hand.items():
        exponent = torch.frexp(weight).exponent - 8  # a unit in the last of bfloat16's 8 bits
        assert ((got[name] - weight).abs() <= torch.exp2(exponent.float())).all(), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zero1-offload", "zero2-offload", "zero3-offload"])
def test_deepspeeds_adam_on_the_cpu_is_one_process(kind, tmp_path):
    hand = trained("adam", BOTH, "float32")
    got = run(kind, BOTH, 2, tmp_path)
    for name, weight in hand.items():
        torch.testing.assert_close(got[name], weight, atol=1e-6, rtol=0)


class SuperOffloadOptimizer_Stage3(SimpleNamespace):
    """By name what DeepSpeed hangs on its parameters."""


class ZenFlowCPUAdam(torch.optim.SGD):
    """By name what DeepSpeed steps with."""


@pytest.mark.parametrize(
    ("zero", "optimizer", "sentence"),
    [
        (
            SimpleNamespace(swap_optimizer=False, offload_optimizer=True, partial_offload=0.5),
            torch.optim.SGD,
            "offload_optimizer.ratio of 0.5 a second optimizer steps",
        ),
        (SuperOffloadOptimizer_Stage3(swap_optimizer=False), torch.optim.SGD, "SuperOffload steps in another process"),
        (SimpleNamespace(), ZenFlowCPUAdam, "leave zenflow out"),
    ],
)
def test_what_deepspeed_steps_on_out_of_sight_is_refused(zero, optimizer, sentence):
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter._z3_optimizer = zero
    with pytest.raises(ValueError, match=sentence):
        layout(optimizer([parameter], lr=0.1), [("w", parameter)])
