"""One rank of tests/test_online_live.py: a network, sharded in one way, is merged with checkpoints on disk.

python live_rank.py KIND DTYPE FOLDER        with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from fusion.checkpoint import open_source
from fusion.online import merge_into
from tests.online_rank import groups, start

CASES: dict[str, tuple[list[float] | None, dict[str, Any]]] = {
    "linear": ([0.5, 0.25, 0.25], {}),
    "ties": ([1.0, 0.5, 0.25], {"density": 0.4}),
    "dare": ([1.0, 0.5, 0.5], {"density": 0.6}),
    "sce": (None, {"select_topk": 0.5}),
}


def merged(kind: str, method: str, dtype: str, folder: Path, rank: int, world: int) -> dict[str, torch.Tensor]:
    """Weights by name after the merge; under model.NAME what DeepSpeed's model holds."""
    net, _ = start()
    optimizer: Any = torch.optim.SGD(groups(net), lr=0.05)
    named = list(net.named_parameters())
    if kind == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        fully_shard(net, mesh=init_device_mesh("cpu", (world,)))
        optimizer, named = torch.optim.SGD(groups(net), lr=0.05), list(net.named_parameters())
    elif kind.startswith("zero"):
        import deepspeed

        config = {
            "train_batch_size": world,
            "train_micro_batch_size_per_gpu": 1,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {"stage": int(kind[4]), "sub_group_size": 40},
            "bf16": {"enabled": dtype == "bfloat16"},
        }
        engine, optimizer, _, _ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
        named = list(engine.module.named_parameters())
    weights, params = CASES[method]
    sources = [open_source(folder / "one"), open_source(folder / "two")]
    base = open_source(folder / "base")
    merge_into(optimizer, named, method, sources, base=base, weights=weights, seed=3, params=params)
    if not kind.startswith("zero"):
        return {n: (p.full_tensor() if kind == "fsdp" else p).detach().clone() for n, p in named}
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, parameter in named:
        found[name] = safe_get_full_fp32_param(parameter).clone()
        with deepspeed.zero.GatheredParameters([parameter], enabled=kind == "zero3"):
            found[f"model.{name}"] = parameter.data.clone().float()
    return found


def main() -> None:
    kind, dtype, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if kind.startswith("zero"):
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    else:
        dist.init_process_group("gloo")
    out = {}
    for method in CASES:
        for name, weight in merged(kind, method, dtype, folder, rank, world).items():
            out[f"{method}/{name}"] = weight.contiguous()
    if rank == 0:
        save_file(out, folder / f"{kind}-{dtype}.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
