"""One rank of tests/test_dcp.py: FSDP2 with momentum and online merging, saved by torch.distributed.checkpoint.

python dcp_rank.py FROM TO FOLDER        FROM 0 begins anew; what is saved at TO goes to FOLDER/METHOD:EVERY-TO
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fusion.online import OnlineMerge
from tests.online_rank import Net, data, groups, start
from tests.processes import leave

CASES = ("ties:1", "dare:1", "dare:4")  # method:every


def merging(what: str, net: torch.nn.Module, optimizer: torch.optim.Optimizer, task: dict[str, torch.Tensor]) -> Any:
    method, every = what.split(":")
    merge = OnlineMerge(method, alpha=0.05, density=0.5, every=int(every), seed=1)
    return merge.attach(optimizer, net.named_parameters(), task)


def train(net: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range, rank: int = 0, world: int = 1) -> None:
    for step in steps:
        optimizer.zero_grad()
        net(data(step, rank, world)).square().mean().backward()
        optimizer.step()


def begun() -> Iterator[tuple[str, Net, torch.optim.Optimizer, dict[str, torch.Tensor]]]:
    """By case a sharded network, its optimizer and the task vector."""
    for what in CASES:
        net, task = start()
        fully_shard(net, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        yield what, net, torch.optim.SGD(groups(net), lr=0.05, momentum=0.9), task


def main() -> None:
    first, last, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    found = {}
    for what, net, optimizer, task in begun():
        if first:
            model, moments = get_state_dict(net, optimizer)
            dcp.load({"model": model, "optimizer": moments}, checkpoint_id=folder / f"{what}-{first}")
            set_state_dict(net, optimizer, model_state_dict=model, optim_state_dict=moments)
        handle = merging(what, net, optimizer, task)  # after that: torch may fill an optimizer's state by a step
        if first:
            dcp.load({"online_merge": handle}, checkpoint_id=folder / f"{what}-{first}")
        train(net, optimizer, range(first, last), rank, world)
        assert set(handle.state_dict()["steps"].values()) == {last}
        if not first:
            model, moments = get_state_dict(net, optimizer)
            state = {"model": model, "optimizer": moments, "online_merge": handle}
            dcp.save(state, checkpoint_id=folder / f"{what}-{last}")
        found |= {f"{what}/{name}": weight.full_tensor().detach() for name, weight in net.named_parameters()}
    if rank == 0:
        save_file({name: weight.contiguous() for name, weight in found.items()}, folder / f"{last}-of-{world}")
    leave()


if __name__ == "__main__":
    main()
