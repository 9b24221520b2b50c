"""One rank of tests/test_online_live.py: a network, sharded in one way, is merged with checkpoints on disk.

python live_rank.py KIND DTYPE FOLDER        with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set
"""

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from fusion.checkpoint import open_source
from fusion.online import MergeWithCallback, merge_into
from tests.online_rank import data, groups, start
from tests.processes import leave

CASES: dict[str, tuple[list[float] | None, dict[str, Any]]] = {
    "linear": ([0.5, 0.25, 0.25], {}),
    "ties": ([1.0, 0.5, 0.25], {"density": 0.4}),
    "dare": ([1.0, 0.5, 0.5], {"density": 0.6}),
    "sce": (None, {"select_topk": 0.5}),
}


def network(kind: str, dtype: str, world: int) -> tuple[Any, Any, list[tuple[str, torch.Tensor]]]:
    """A network that is sharded in this way, its optimizer and its named parameters."""
    net, _ = start()
    model: Any = net
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
            "zero_optimization": {"stage": int(kind[4]), "sub_group_size": 40, "reduce_scatter": False},
            "bf16": {"enabled": dtype == "bfloat16"},
        }
        model, optimizer, _, _ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
        named = list(model.module.named_parameters())
    return model, optimizer, named


def refusals(kind: str, folder: Path, rank: int, world: int) -> list[tuple[str, bool]]:
    """What this rank says of checkpoints that only the last rank can't use, and whether its weights are as before."""
    _, optimizer, named = network(kind, "float32", world)
    before = [parameter.detach().clone() for _, parameter in named]
    found = []
    for name in ("endless", "short"):
        shutil.copytree(folder / name, mine := folder / f"{kind}-{name}-{rank}")
        source = open_source(mine)
        if name == "short" and rank == world - 1:
            os.truncate(mine / "model.safetensors", 8)
        for method in ("linear", "ties"):
            try:
                merge_into(optimizer, named, method, [source], base=open_source(folder / "base"), seed=3)
            except ValueError as error:
                same = all(torch.equal(p, old) for (_, p), old in zip(named, before, strict=True))
                found.append((str(error), same))
    return found


def merged(kind: str, method: str, dtype: str, folder: Path, rank: int, world: int) -> dict[str, torch.Tensor]:
    """Weights by name after the merge; under model.NAME what DeepSpeed's model holds."""
    _, optimizer, named = network(kind, dtype, world)
    weights, params = CASES[method]
    sources = [open_source(folder / "one"), open_source(folder / "two")]
    base = open_source(folder / "base")
    merge_into(optimizer, named, method, sources, base=base, weights=weights, seed=3, params=params)
    return whole(kind, named)


def met(kind: str, dtype: str, folder: Path, world: int) -> dict[str, torch.Tensor]:
    """Weights after four steps on the same rows everywhere, merged with a checkpoint after every second."""
    model, optimizer, named = network(kind, dtype, world)
    callback = MergeWithCallback(folder / "one", every=2, weight=0.25)
    state, given = SimpleNamespace(global_step=0, max_steps=4), {"model": model, "optimizer": optimizer}
    callback.on_train_begin(None, state, None, **given)
    for step in range(state.max_steps):
        loss = model(data(step, 0, 1).to(getattr(torch, dtype))).float().square().mean()
        if kind.startswith("zero"):
            model.backward(loss)
            model.step()
        else:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        state.global_step += 1
        callback.on_step_end(None, state, None, **given)
    return whole(kind, named)


def whole(kind: str, named: list[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Unsharded weights by name; under model.NAME what DeepSpeed's model holds."""
    if not kind.startswith("zero"):
        return {n: (p.full_tensor() if kind == "fsdp" else p).detach().clone() for n, p in named}
    import deepspeed
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
    out |= {f"met/{name}": weight.contiguous() for name, weight in met(kind, dtype, folder, world).items()}
    if kind == "fsdp":
        (folder / f"refused-{rank}.json").write_text(json.dumps(refusals(kind, folder, rank, world)))
    if rank == 0:
        save_file(out, folder / f"{kind}-{dtype}.safetensors")
    leave()


if __name__ == "__main__":
    main()
