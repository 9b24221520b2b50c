"""One rank of tests/test_online_ranks.py: trains small networks with a task vector merged in, under one sharding.

python online_rank.py KIND METHOD:EVERY,... DTYPE FILE        with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set
"""

import copy
import os
import sys

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from fusion.online import OnlineMerge
from tests.processes import leave

STEPS, BATCH = 8, 12
DEEPSPEED = ("zero", "bf16")
ADAM = {"lr": 0.01, "eps": 0.1}  # an epsilon that keeps a zero gradient's rounding from becoming a whole step


class Net(torch.nn.Module):
    """Odd sizes, so that shards need padding; a scalar-like bias; two groups of weight decay."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(7, 13), torch.nn.Linear(13, 5, bias=False)
        self.gain = torch.nn.Parameter(torch.ones(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x))) * self.gain


def start() -> tuple[Net, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    net = Net()
    g = torch.Generator().manual_seed(9)
    return net, {n: torch.randn(p.shape, generator=g) * 0.1 for n, p in net.named_parameters()}


def groups(net: torch.nn.Module) -> list[dict]:
    named = list(net.named_parameters())
    return [
        {"params": [p for n, p in named if n.endswith("weight")], "weight_decay": 0.1},
        {"params": [p for n, p in named if not n.endswith("weight")], "weight_decay": 0.0},
    ]


def data(step: int, rank: int, world: int) -> torch.Tensor:
    x = torch.randn(BATCH, 7, generator=torch.Generator().manual_seed(100 + step))
    return x.chunk(world)[rank]


def train(kind: str, merge: OnlineMerge, dtype: str, rank: int, world: int) -> dict[str, torch.Tensor]:
    """Weights by name after STEPS steps; of DeepSpeed the masters."""
    net, task = start()
    if kind.startswith(DEEPSPEED):
        return train_zero(kind, merge, dtype, rank, world, net, task)
    model: torch.nn.Module = net
    if kind == "ddp" and world > 1:
        model = torch.nn.parallel.DistributedDataParallel(net)
    if kind == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(net, mesh=init_device_mesh("cpu", (world,)))
    if kind == "masters":
        return train_masters(merge, net, task)
    optimizer = torch.optim.AdamW(groups(net), **ADAM) if kind == "adam" else torch.optim.SGD(groups(net), lr=0.05)
    merge.attach(optimizer, net.named_parameters(), task)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(data(step, rank, world)).square().mean().backward()
        optimizer.step()
    return {n: (p.full_tensor() if kind == "fsdp" else p).detach().clone() for n, p in net.named_parameters()}


def train_masters(merge: OnlineMerge, net: Net, task: dict) -> dict[str, torch.Tensor]:
    """A network in bfloat16 whose weights are the cast of masters in float32, by hand."""
    masters = copy.deepcopy(net.bfloat16()).float()
    optimizer = torch.optim.SGD(groups(masters), lr=0.05)
    merge.attach(optimizer, masters.named_parameters(), task)
    for step in range(STEPS):
        net.zero_grad()
        net(data(step, 0, 1).bfloat16()).float().square().mean().backward()
        for master, parameter in zip(masters.parameters(), net.parameters(), strict=True):
            master.grad = parameter.grad.float()
        optimizer.step()
        with torch.no_grad():
            for master, parameter in zip(masters.parameters(), net.parameters(), strict=True):
                parameter.copy_(master)
    return {name: master.detach().clone() for name, master in masters.named_parameters()}


def train_zero(kind: str, merge: OnlineMerge, dtype: str, rank: int, world: int, net: Net, task: dict) -> dict:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    zero = {"stage": 1 if kind == "bf16" else int(kind[4]), "sub_group_size": 40, "reduce_scatter": False}
    config = {
        "train_batch_size": world,
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        "bf16": {"enabled": dtype == "bfloat16"},
    }
    optimizer: torch.optim.Optimizer = torch.optim.SGD(groups(net), lr=0.05)
    if kind.endswith("-offload"):
        zero |= {"offload_optimizer": {"device": "cpu"}}
        optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(groups(net), **ADAM)
    if kind == "bf16":
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    engine, wrapped, _, _ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
    assert kind != "bf16" or type(wrapped).__name__ == "BF16_Optimizer"
    merge.attach(wrapped.optimizer, engine.module.named_parameters(), task)
    for step in range(STEPS):
        x = data(step, rank, world).to(torch.bfloat16 if dtype == "bfloat16" else torch.float32)
        engine.backward(engine(x).float().square().mean())
        engine.step()
        weights = {n: safe_get_full_fp32_param(p).clone().cpu() for n, p in engine.module.named_parameters()}
        for name, parameter in engine.module.named_parameters():
            with deepspeed.zero.GatheredParameters([parameter], enabled=kind.startswith("zero3")):
                assert torch.equal(parameter.data, weights[name].to(parameter.dtype)), f"{name} after step {step}"
    return weights


def trained(kind: str, what: str, dtype: str, rank: int = 0, world: int = 1) -> dict[str, torch.Tensor]:
    """Weights by METHOD:EVERY/NAME."""
    found = {}
    for one in what.split(","):
        method, every = one.split(":")
        merge = OnlineMerge(method, alpha=0.05, density=0.5, every=int(every), seed=1)
        weights = train(kind, merge, dtype, rank, world)
        found |= {f"{one}/{name}": weight.contiguous() for name, weight in weights.items()}
    return found


def main() -> None:
    kind, what, dtype, file = sys.argv[1:]
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if kind.startswith(DEEPSPEED):
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    elif world > 1:
        dist.init_process_group("gloo")
    found = trained(kind, what, dtype, rank, world)
    if rank == 0:
        save_file(found, file)
    if world > 1:
        leave()


if __name__ == "__main__":
    main()
