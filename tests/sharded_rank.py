"""One of two ranks that save training checkpoints: `sharded_rank dcp|zero FOLDER`; rank 0 also says what they hold."""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from tests.processes import leave

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 33,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "tie_word_embeddings": True,
}
ATTENTION = {"q_proj": (12, 12), "k_proj": (6, 12), "v_proj": (6, 12), "o_proj": (12, 12)}
MLP = {"gate_proj": (20, 12), "up_proj": (20, 12), "down_proj": (12, 20)}


class Leaf(nn.Module):
    """A weight, and something to learn from it."""

    def __init__(self, *shape: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(*shape))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.weight * x).square().mean()


class Branch(nn.Module):
    """All that its children say, added."""

    def __init__(self, **children: nn.Module):
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([child(x) for child in self.children()]).sum()


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    """The parameters of a small Llama under the names that transformers has for them, without importing it."""
    torch.manual_seed(0)
    layers = []
    for _ in range(2):
        parts = {kind: Branch(**{n: Leaf(*shape) for n, shape in part.items()}) for kind, part in PARTS.items()}
        layers.append(Branch(**parts, input_layernorm=Leaf(12), post_attention_layernorm=Leaf(12)))
    stack = Branch(**{str(i): layer for i, layer in enumerate(layers)})
    net = Branch(model=Branch(embed_tokens=Leaf(33, 12), layers=stack, norm=Leaf(12)), lm_head=Leaf(33, 12))
    net.lm_head.weight = net.model.embed_tokens.weight
    net.register_buffer("seen", torch.arange(3))
    return net.to(dtype)


PARTS = {"self_attn": ATTENTION, "mlp": MLP}


def dcp(folder: Path) -> None:
    """FSDP with its optimizer as trainers save it, and a plain state dict of oddly cut tensors."""
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    net = network(torch.bfloat16)
    whole = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for layer in net.model.layers.children():
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    state = {"model": net.state_dict(), "optimizer": {"state": {"moment": torch.ones(3)}}, "step": 3}
    checkpoint.save(state, checkpoint_id=str(folder / "fsdp"))
    torch.manual_seed(1)
    odd = {
        "rows": torch.randn(7, 5),
        "columns": torch.randn(6, 9),
        "middle": torch.randn(2, 7, 3),
        "one": torch.randn(1, 1),
        "scalar": torch.tensor(2.5),
        "count": torch.tensor(3),
    }
    cuts = {"rows": 0, "columns": 1, "middle": 1, "one": 0}
    cut = {n: distribute_tensor(t, mesh, [Shard(cuts[n])]) if n in cuts else t for n, t in odd.items()}
    checkpoint.save(cut, checkpoint_id=str(folder / "odd"))
    if dist.get_rank() == 0:
        for name, expected in (("fsdp", whole), ("odd", odd)):
            torch.save(expected, folder / f"{name}.pt")
            (folder / name / "config.json").write_text(json.dumps(CONFIG))


def zero(folder: Path) -> None:
    """Stages 1 to 3, in float32 with frozen parameters and in bfloat16, each after two steps, in two groups."""
    import deepspeed

    deepspeed.init_distributed("gloo")
    for name, stage, half in (("1", 1, True), ("2", 2, False), ("2h", 2, True), ("3", 3, False), ("3h", 3, True)):
        net = network()
        if not half:
            net.get_parameter("model.layers.0.mlp.up_proj.weight").requires_grad_(False)
            net.get_parameter("model.layers.1.input_layernorm.weight").requires_grad_(False)
        learnt = [p for p in net.parameters() if p.requires_grad]
        groups = [{"params": [p for p in learnt if p.ndim > 1]}, {"params": [p for p in learnt if p.ndim == 1]}]
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, "sub_group_size": 700},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "bf16": {"enabled": half},
        }
        optimizer = torch.optim.AdamW(groups, lr=1e-2)
        engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=config)
        for step in range(2):
            engine.backward(engine(torch.tensor(1.0 + step + dist.get_rank())))
            engine.step()
        engine.save_checkpoint(str(folder / name))
        if dist.get_rank() == 0:
            (folder / name / "config.json").write_text(json.dumps(CONFIG))


if __name__ == "__main__":
    {"dcp": dcp, "zero": zero}[sys.argv[1]](Path(sys.argv[2]))
    leave()
