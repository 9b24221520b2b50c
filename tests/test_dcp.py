"""Online merging under FSDP2, saved by torch.distributed.checkpoint on two ranks, goes on on any number of them."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fusion.checkpoint import open_source, region
from tests.dcp_rank import CASES, merging, train
from tests.online_rank import groups, start
from tests.processes import together

HALF, WHOLE = 4, 8


def alone(what: str, steps: int) -> dict[str, torch.Tensor]:
    """The weights of one process without shards that is never stopped."""
    net, task = start()
    optimizer = torch.optim.SGD(groups(net), lr=0.05, momentum=0.9)
    merging(what, net, optimizer, task)
    train(net, optimizer, range(steps))
    return {name: weight.detach() for name, weight in net.named_parameters()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dcp")
    together(2, "tests.dcp_rank", "0", str(HALF), str(folder))
    return folder


@pytest.mark.parametrize("world", [1, *(pytest.param(world, marks=pytest.mark.slow) for world in (2, 3))])
def test_a_run_goes_on_with_another_number_of_ranks(world: int, saved: Path) -> None:
    together(world, "tests.dcp_rank", str(HALF), str(WHOLE), str(saved))
    got = load_file(saved / f"{WHOLE}-of-{world}")
    for what in CASES:
        for name, weight in alone(what, WHOLE).items():
            torch.testing.assert_close(got[f"{what}/{name}"], weight, atol=1e-6, rtol=0)


def test_what_was_saved_merges_where_it_lies(saved: Path) -> None:
    for what in CASES:
        (saved / f"{what}-{HALF}" / "config.json").write_text(json.dumps({"model_type": "none"}))
        source, expected = open_source(saved / f"{what}-{HALF}"), alone(what, HALF)
        assert source.entries.keys() == expected.keys()
        for name, weight in expected.items():
            assert source.entries[name].numel == math.prod(weight.shape)
            torch.testing.assert_close(region(source, name), weight.flatten(), atol=1e-6, rtol=0)


def test_inside_a_window_the_weights_at_its_start_are_missed() -> None:
    net, task = start()
    handle = merging("dare:4", net, torch.optim.SGD(groups(net), lr=0.05), task)
    with pytest.raises(ValueError, match=r"after 6 steps, in a window of 4, without .*; go on from a multiple of 4"):
        handle.load_state_dict({"steps": dict.fromkeys(task, 6), "snapshots": {}})
    handle.load_state_dict({"steps": dict.fromkeys(task, 8), "snapshots": {}})
