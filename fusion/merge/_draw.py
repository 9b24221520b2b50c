"""Random numbers that are a function of what they are for: the same bits on any device, in any order, on any shard.

SplitMix64 (Steele, Lea, Flood 2014, doi:10.1145/2714064.2660195) of a key plus the element's index; the key hashes
(seed, step, tensor name, model index).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from fusion.merge._compiled import loops

# as signed 64-bit integers, which is what torch has; products wrap
GAMMA, MIX1, MIX2 = (c - (1 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass(frozen=True)
class Draw:
    """The random numbers of elements start to start + n of the tensor `name`."""

    seed: int
    name: str
    start: int
    n: int
    step: int = 0
    device: str | torch.device = "cpu"

    def key(self, model: int) -> int:
        """A signed 64-bit integer, another one for each seed, step, tensor and model."""
        text = f"{self.seed}\0{self.step}\0{model}\0{self.name}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)

    def uniform(self, model: int) -> Tensor:
        """(n,) float32 in [0, 1), multiples of 2^-24."""
        out = torch.empty(self.n, device=self.device)
        if (compiled := loops(out)) is not None:
            compiled.uniform(self.key(model), self.start, out.data_ptr(), self.n)
            return out
        return out.copy_(_uniform(self.key(model), self.start, self.n, self.device))

    def keep(self, model: int, chance: float | Tensor) -> Tensor:
        """(n,) float32, 1 with this probability, else 0; of one number, or of (n,)."""
        drawn = self.uniform(model)
        # uniform < chance; a comparison into floats takes a tenth of the time of a mask
        return torch.lt(drawn, chance, out=drawn)


def _uniform(key: int, start: int, n: int, device: str | torch.device) -> Tensor:
    z = torch.arange(start + 1, start + n + 1, dtype=torch.int64, device=device).mul_(GAMMA).add_(key)
    z = _shifted(z, 30).mul_(MIX1)
    z = _shifted(z, 27).mul_(MIX2)
    z = _shifted(z, 31)
    return z.bitwise_right_shift_(40).bitwise_and_((1 << 24) - 1).float().mul_(2.0**-24)


def _shifted(z: Tensor, by: int) -> Tensor:
    """z ^ (z >> by), the shift a logical one."""
    return z.bitwise_xor_((z >> by).bitwise_and_((1 << (64 - by)) - 1))
