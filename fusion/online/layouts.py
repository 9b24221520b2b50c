"""Where in the unsharded parameters the elements lie that an optimizer steps on.

A torch optimizer may hold parameters as they are (one process, DDP), DTensors (FSDP2), or flat fp32 pieces of many
parameters (DeepSpeed's ZeRO-1, 2, 3 and its BF16 optimizer). In each case a Piece says of which parameter, from which
element on. Masks drawn by name and element, and counts added over ranks, then do not depend on the sharding.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of one parameter, as the optimizer holds them."""

    name: str
    shape: tuple[int, ...]  # of the unsharded parameter
    start: int  # which element of it, row by row, is the first one here
    flat: Tensor  # (n,) a view of what the optimizer steps on

    @property
    def whole(self) -> bool:
        return self.flat.numel() == torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Layout:
    """What an optimizer steps on, tensor by tensor."""

    kind: str  # plain, dtensor, zero, zero3
    held: Mapping[int, tuple[str, tuple[Piece, ...]]]  # id of the optimizer's tensor -> (key, its pieces)
    split: Mapping[str, tuple[str, ...]]  # key -> names that lie on several ranks, in the same order on all of them

    def of(self, tensor: Tensor) -> tuple[str, tuple[Piece, ...]]:
        """The key (the same on all ranks) and the pieces of a tensor in the optimizer's groups."""
        if id(tensor) not in self.held:
            raise ValueError(
                f"the optimizer steps on a tensor of shape {tuple(tensor.shape)} that was not there when online "
                f"merging was attached ({self.kind} layout): another plugin replaced its parameters; attach after it"
            )
        return self.held[id(tensor)]

    @property
    def device(self) -> torch.device:
        """Where this rank's pieces are."""
        return next((piece.flat.device for piece in self.pieces), torch.device("cpu"))

    @property
    def copies(self) -> int:
        """How many ranks hold the same elements: all of them where nothing is sharded."""
        spread = self.kind != "plain" or not (dist.is_available() and dist.is_initialized())
        return 1 if spread else dist.get_world_size()

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return tuple(piece for _, pieces in self.held.values() for piece in pieces)


def layout(optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, Tensor]]) -> Layout:
    """The layout of an optimizer's tensors; ValueError names what is not known."""
    named = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    if not named:
        raise ValueError("online merging got no parameter that is trained")
    _refuse_quantised(named)
    if type(optimizer).__name__.startswith("ZenFlow"):
        raise ValueError(
            "ZenFlow steps on part of the gradients by an optimizer of its own, and online merging does "
            "not see it; leave zenflow out"
        )
    attributes = set().union(*(vars(parameter) for _, parameter in named[:1]))
    if "_z3_optimizer" in attributes:
        kind, held = "zero3", _zero3(named)
    elif "_hp_mapping" in attributes:
        kind, held = "zero", _zero(optimizer, named)
    elif any(isinstance(parameter, DTensor) for _, parameter in named):
        kind, held = "dtensor", _dtensor(named)
    else:
        kind, held = "plain", _plain(named)
    known = {id(parameter): name for name, parameter in named}
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            if id(tensor) not in held:
                whose = f" ({known[id(tensor)]})" if id(tensor) in known else ""
                raise ValueError(
                    f"online merging does not know the layout of {type(optimizer).__name__}: it steps on a tensor of "
                    f"shape {tuple(tensor.shape)}{whose} that is no named parameter and no shard of one; known are "
                    f"plain parameters (one process, DDP), FSDP2, DeepSpeed ZeRO-1, 2, 3"
                )
    for _, pieces in held.values():
        for piece in pieces:
            if piece.flat.dtype.itemsize < 4:
                raise ValueError(
                    f"{piece.name} is trained in {str(piece.flat.dtype).removeprefix('torch.')}: an update below half "
                    f"a unit in its last place would vanish; keep float32 master weights (load the model in float32 "
                    f"and let bf16: true compute in bfloat16, or DeepSpeed keep the masters)"
                )
    return Layout(kind, held, _split(held))


Held = dict[int, tuple[str, tuple[Piece, ...]]]
Named = Sequence[tuple[str, Tensor]]


def _plain(named: Named) -> Held:
    held: Held = {}
    for name, parameter in named:
        if not parameter.is_contiguous():
            raise ValueError(f"{name} is not contiguous in memory, which online merging needs")
        held[id(parameter)] = (name, (Piece(name, tuple(parameter.shape), 0, parameter.data.view(-1)),))
    return held


def _dtensor(named: Named) -> Held:
    held: Held = {}
    for name, parameter in named:
        if not isinstance(parameter, DTensor):
            raise ValueError(f"{name} is no DTensor while others are: shard the whole model, or none of it")
        shape, mesh, placements = tuple(parameter.shape), parameter.device_mesh, parameter.placements
        if mesh.ndim > 1:  # copies of shards would be counted as parts
            raise ValueError(f"{name} lies on a mesh of {mesh.ndim} axes: online merging knows FSDP2 over one")
        if any(isinstance(place, Shard) and (type(place) is not Shard or place.dim != 0) for place in placements):
            raise ValueError(
                f"{name} is sharded as {placements}: online merging knows shards of the first axis (FSDP2), "
                f"not tensor parallel ones"
            )
        local_shape, offset = compute_local_shape_and_global_offset(shape, mesh, placements)
        local = parameter.to_local()
        row = torch.Size(shape[1:]).numel()
        start = offset[0] * row if shape else 0
        assert tuple(local.shape) == tuple(local_shape), (name, local.shape, local_shape)
        pieces = (Piece(name, shape, start, local.data.view(-1)),) if local.numel() else ()
        held[id(parameter)] = (name, pieces)
    return held


def _zero(optimizer: torch.optim.Optimizer, named: Named) -> Held:
    """ZeRO-1, 2 and BF16: one flat fp32 partition a group; each parameter knows its fragment of it, if any."""
    flats = [tensor for group in optimizer.param_groups for tensor in group["params"]]
    pieces: list[list[Piece]] = [[] for _ in flats]
    for name, parameter in named:
        mapping = vars(parameter)["_hp_mapping"]
        if mapping is None:  # it lies on other ranks
            continue
        fragment = mapping.hp_fragment
        number = next(
            (
                i
                for i, flat in enumerate(flats)
                if flat.untyped_storage().data_ptr() == fragment.untyped_storage().data_ptr()
            ),
            None,
        )
        if number is None:
            raise ValueError(f"the fp32 weights of {name} are in none of the optimizer's flat partitions")
        pieces[number].append(Piece(name, tuple(parameter.shape), mapping.lp_fragment_address.start, fragment.data))
    return {id(flat): (f"group {i}", tuple(found)) for i, (flat, found) in enumerate(zip(flats, pieces, strict=True))}


def _zero3(named: Named) -> Held:
    """ZeRO-3: flat fp32 sub-groups, in each a partition of every one of its parameters."""
    zero = vars(named[0][1])["_z3_optimizer"]
    if zero.swap_optimizer:
        raise ValueError("online merging does not work on optimizer states that are swapped to NVMe; offload to cpu")
    if type(zero).__name__.startswith("SuperOffload"):
        raise ValueError("SuperOffload steps in another process, which online merging does not see; offload without it")
    if zero.offload_optimizer and zero.partial_offload != 1.0:
        raise ValueError(
            f"with an offload_optimizer.ratio of {zero.partial_offload} a second optimizer steps on part of the "
            f"weights, which online merging would leave out; take ratio: 1.0"
        )
    names = {id(parameter): name for name, parameter in named}
    held: Held = {}
    for number, (parameters, flat) in enumerate(zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)):
        pieces = []
        for parameter in parameters:
            if id(parameter) not in names:
                raise ValueError(
                    f"ZeRO-3 steps on a parameter of shape {tuple(parameter.ds_shape)} that was not named; give all"
                )
            _, offset, numel = zero.grad_position[zero.get_param_id(parameter)]
            start = dist.get_rank(group=parameter.ds_process_group) * numel
            count = max(0, min(numel, parameter.ds_numel - start))  # the rest is padding
            if count:
                shape = tuple(parameter.ds_shape)
                pieces.append(Piece(names[id(parameter)], shape, start, flat.data[offset : offset + count]))
        held[id(flat)] = (f"sub-group {number}", tuple(pieces))
    return held


def _split(held: Held) -> dict[str, tuple[str, ...]]:
    """By key the names of which no rank has all; asked once, so that later everybody adds up the same counts."""
    own = {key: [(piece.name, piece.whole) for piece in pieces] for key, pieces in held.values()}
    everyone: list[Any] = [own]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
    keys = list(dict.fromkeys(key for one in everyone for key in one))
    return {
        key: tuple(dict.fromkeys(name for one in everyone for name, whole in one.get(key, ()) if not whole))
        for key in keys
    }


def _refuse_quantised(named: Named) -> None:
    for name, parameter in named:
        if not parameter.is_floating_point():
            raise ValueError(
                f"{name} holds {str(parameter.dtype).removeprefix('torch.')}: quantised weights can't merge"
            )
