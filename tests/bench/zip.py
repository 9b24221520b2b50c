"""ZipIt's greedy with a neighbour heap against a loop that copies the table at every merge.

python tests/bench/zip.py [--models 4] [--channels 1024]
"""

import argparse
import time

import numpy as np
import torch

from alignment.zip import zip_units


def copying(similarity, sizes, until, alpha=0.3, beta=0.125):
    """The same merges, each after a search of the whole table, with a new table without the merged row and column."""
    table = similarity.float().clone()
    n, models = len(table), len(sizes)
    table.fill_diagonal_(-torch.inf)
    origin = torch.arange(models).repeat_interleave(torch.tensor(sizes))
    members = [[unit] for unit in range(n)]
    budget = [int((n - until) // models * beta + 1e-4)] * models

    def part(model):
        own = origin == model
        table[own[:, None] & own] = -torch.inf

    for model in range(models):
        if budget[model] <= 0:
            part(model)
    while len(table) > until:
        at = int(table.argmax())
        row, column = sorted((at // len(table), at % len(table)))
        new = torch.minimum(table[row], table[column])
        new = new * alpha if alpha > 0 else torch.full_like(new, -torch.inf)
        new[row] = -torch.inf
        table[row], table[:, row] = new, new
        keep = torch.arange(len(table)) != column
        same = origin[row] == origin[column]
        table, origin = table[keep][:, keep], origin[keep]
        members[row] += members.pop(column)
        if same:
            model = int(origin[row])
            budget[model] -= 1
            if budget[model] == 0:
                part(model)
    found = torch.empty(n, dtype=torch.int64)
    for number, units in enumerate(members):
        found[units] = number
    return found


def correlations(models, channels, samples=2000, seed=0):
    """Of units that share a common part across networks, each network in its own order."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(samples, channels))
    own = [common[:, rng.permutation(channels)] + rng.normal(size=(samples, channels)) for _ in range(models)]
    return torch.from_numpy(np.corrcoef(np.concatenate(own, 1).T)).float()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", type=int, default=4)
    parser.add_argument("--channels", type=int, default=1024)
    given = parser.parse_args()
    torch.set_num_threads(1)
    similarity, sizes = correlations(given.models, given.channels), [given.channels] * given.models
    times, results = [], []
    for function in (zip_units, copying):
        start = time.perf_counter()
        results.append(function(similarity, sizes, given.channels))
        times.append(time.perf_counter() - start)
        print(f"{function.__name__}: {times[-1]:.2f} s", flush=True)
    print(f"{times[1] / times[0]:.0f} times, same merges: {results[0].equal(results[1])}")
