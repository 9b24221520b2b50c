"""Experts: a space whose units are networks, stored as stacks in the module and a tensor each in many files."""

from __future__ import annotations

from alignment.families._attention import Reader
from alignment.families._table import Table, need

# how files name a layer's block of experts, and its gate, up and down
SPELLINGS = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen": ("mlp", "gate_proj", "up_proj", "down_proj"),
}


def experts(table: Table, layer: str, at: str, spelling: str) -> tuple[Reader, ...]:
    """Spaces `experts` and `mlp` (within it), in the checkpoint's spelling; which tensors read the layer's norm."""
    config, width = table.config, table.size("residual")
    count, size = need(config, "num_local_experts", "num_experts"), _size(table)
    space = table.space(f"{layer}.experts", count, "permutation")
    mlp = table.space(f"{layer}.mlp", size, "scaled permutation", space)
    block, *stems = SPELLINGS[spelling]
    apart = any(".experts.0." in name for name in table.names)
    if not any(name.startswith(f"{at}.{block}.") for name in table.names):
        block = "mlp"
    own = f"{at}.{block}"
    table.part(f"{layer}.router.weight", f"{own}.gate.weight", (count, width), (f"{space}:w", "residual:r"))
    readers: list[Reader] = [(f"{own}.gate.weight", 1, None)]
    for number, (name, stem) in enumerate(zip(("gate", "up", "down"), stems)):
        inside = (f"{mlp}:{'ewr'[number]}", "residual:r") if name != "down" else ("residual:w", f"{mlp}:r")
        outer = f"{space}:{'r' if name == 'down' else 'w'}"
        key = f"{layer}.{name}.weight"
        if apart:
            names = tuple(f"{own}.experts.{expert}.{stem}.weight" for expert in range(count))
            shape = (size, width) if name != "down" else (width, size)
            table.part(key, names, shape, (outer, *inside))
            readers += [(one, 1, None) for one in names] if name != "down" else []
        elif name == "down":
            table.part(key, f"{own}.experts.down_proj", (count, width, size), (outer, *inside))
        else:
            stack, take = f"{own}.experts.gate_up_proj", ((1, number, 1),)
            table.part(key, stack, (count, (2, size), width), (outer, *inside), take)
            readers += [(stack, 2, None)] if name == "gate" else []
    return tuple(readers)


def _size(table: Table) -> int:
    return int(need(table.config, "moe_intermediate_size", "intermediate_size"))
