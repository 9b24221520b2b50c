"""Real networks and what `align` finds of their planted copies: time, memory, units that come back, largest error.

    FUSION_MODELS=DIR OMP_NUM_THREADS=1 python -m tests.bench.planted      a table of docs/neuron_correspondence.md

DIR holds smollm2/ and gemma3/. A copy has noise of 1 % of each tensor's root mean square and is carried by a random
element of the whole symmetry group. Each row is a process of its own, so that peak memory is its own; the last is an
assignment of 14,336 units. About four minutes.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from alignment import align, find_family, fold
from alignment._acts import Index
from alignment.match.hungarian import hungarian
from tests.bench._teachers import model

CASES = {
    "SmolLM2-135M-Instruct, as given": ("smollm2", False),
    "SmolLM2-135M-Instruct, folded and untied": ("smollm2", True),
    "Gemma3-270M, as given": ("gemma3", False),
}
UNITS = 14336


@dataclass(frozen=True)
class Found:
    """Of a planted copy: units that change places, how many of them came back, the largest relative error of a tensor
    after carrying back and that tensor's name, seconds within `align` by the clock and of this process."""

    units: int
    back: int
    error: float
    worst: str
    seconds: float
    busy: float


def planted(folder: Path, folded: bool, noise: float = 0.01) -> Found:
    """What `align` finds of a checkpoint's noisy copy; folded: gains into their readers, the head untied."""
    from safetensors.torch import load_file

    config = json.loads((folder / "config.json").read_text())
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    if folded:
        tensors, config = fold(tensors, config, untie=True)
    spaces = find_family(config)
    symmetry, generator = spaces.random_symmetry(1), torch.Generator().manual_seed(0)
    gains = {norm.gain for norm in spaces.norms} if folded else set()  # a folded gain is one
    noisy = {}
    for name, tensor in tensors.items():
        random = torch.randn(tensor.shape, generator=generator)
        noisy[name] = tensor if name in gains else tensor + noise * tensor.square().mean().sqrt() * random
    donor = symmetry.carry(noisy)
    del noisy
    start, busy = time.perf_counter(), time.process_time()
    maps = align(tensors, donor, spaces, spaces)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    both = [map.index for map in maps.after(symmetry).maps.values() if isinstance(map, Index)]
    right = sum(int((index == torch.arange(index.shape[-1])).sum()) for index in both)
    back = maps.carry(donor)
    errors = {name: float((back[name] - tensor).norm() / tensor.norm()) for name, tensor in tensors.items()}
    worst = max(errors, key=errors.__getitem__)
    return Found(sum(index.numel() for index in both), right, errors[worst], worst, seconds, busy)


def peak() -> float:
    """Gigabytes of this process at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def assignment() -> str:
    """A permutation of 14,336 units planted in random similarities, against the best assignment's sum."""
    generator = torch.Generator().manual_seed(0)
    order, rows = torch.randperm(UNITS, generator=generator), torch.arange(UNITS)
    table = torch.rand(UNITS, UNITS, generator=generator)
    table[rows, order] += 0.9  # a tenth of the units has a better partner than the planted one
    start = time.process_time()
    found = hungarian(table)
    busy, gain = time.process_time() - start, float((table[rows, found] - table[rows, order]).double().sum())
    kept = int((found == order).sum())
    return f"assignment of {UNITS:,}: {kept:,} as planted, the sum {gain:.0f} above, {busy:.0f} s, {peak():.1f} GB"


def row(case: str) -> str:
    name, folded = CASES[case]
    found = planted(model(name), folded)
    told = "all" if found.back == found.units else f"{found.back:,}"
    return (
        f"| {case} | {found.units:,} | {told} | {100 * found.error:.2f} % ({found.worst}) "
        f"| {found.busy:.0f} s ({found.seconds:.0f} s by the clock), {peak():.1f} GB |"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", choices=[*CASES, "assignment"])
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.case is None:
        for one in [*CASES, "assignment"]:
            subprocess.run([sys.executable, "-m", "tests.bench.planted", "--case", one], check=True)
    else:
        print(assignment() if given.case == "assignment" else row(given.case))
