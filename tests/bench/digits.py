"""Pairs of MLPs trained from two seeds on scikit-learn's digits, combined by every means: accuracy, mean and spread.

    pip install -e '.[bench]'
    python -m tests.bench.digits [--pairs 10] [--seconds 500] [--widths]        (--widths: only those of other widths)

1,297 of the 1,797 images are for training (and for activations), 500 for testing; both networks of a pair see the same.
"""

import argparse
import copy
import time
from functools import partial

import torch
from torch.nn import functional as F

from alignment import Maps, align, refine, trace, universe
from alignment.apart import partly
from alignment.features.activations import collect
from alignment.least_squares import least_squares
from alignment.match.sinkhorn import sinkhorn
from alignment.repair import carried as deviations
from alignment.repair import repair, restore
from alignment.zip import zip_networks
from tests.plain_networks import MLP

WIDE, SMALL = (400, 200, 100), (200, 100, 50)


def digits():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x, y = torch.from_numpy(images).float()[order] / 16, torch.from_numpy(labels).long()[order]
    return (x[:1297], y[:1297]), (x[1297:], y[1297:])


def trained(seed, data, widths=WIDE, epochs=20):
    torch.manual_seed(seed)
    module, (x, y) = MLP(64, widths), data
    optimizer = torch.optim.Adam(module.parameters(), 1e-3)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(module(x[batch]), y[batch]).backward()
            optimizer.step()
    return module.eval()


def accuracy(outputs, y):
    return 100 * float((outputs.argmax(-1) == y).float().mean())


def mean(states):
    return {name: sum(state[name] for state in states) / len(states) for name in states[0]}


def pair(first, second, train, test):
    """Accuracy by method of two trained networks of one shape."""
    spaces = trace(first, train[0][:2])
    batches, (x, y) = list(train[0].split(256)), test
    states = [dict(one.state_dict()) for one in (first, second)]
    module = copy.deepcopy(first)

    def score(tensors):
        module.load_state_dict(tensors)
        with torch.no_grad():
            return accuracy(module(x), y)

    with torch.no_grad():
        outs = [one(x) for one in (first, second)]
    found = {"the two networks": (accuracy(outs[0], y) + accuracy(outs[1], y)) / 2}
    found["ensemble of their predictions"] = accuracy(sum(out.softmax(-1) for out in outs), y)
    found["naive average"] = score(mean(states))

    def carried(**options):
        return align(*states, spaces, spaces, **options).carry(states[1])

    found["OT fusion by weights, one pass"] = score(mean([states[0], carried(match="emd", sweeps=1)]))
    found["weight matching"] = score(mean([states[0], carried(sweeps=20)]))
    labelled = list(zip(batches, train[1].split(256)))
    refined = refine(first, states[1], spaces, labelled, F.cross_entropy, epochs=10, learning_rate=0.1)
    found["weight matching, refined straight through"] = score(mean([states[0], refined.carry(states[1])]))
    tables = [[collect(a, b, spaces, spaces, batches) for b in (first, second)] for a in (first, second)]
    own = carried(features=tables[0][1])
    aligned = [states[0], own]
    assert abs(score(own) - accuracy(outs[1], y)) < 0.3, "carried, it is another function"
    found["activation matching"] = score(mean(aligned))
    module.load_state_dict(mean(aligned))
    repair(module, aligned, batches)
    found["activation matching, repaired"] = score(dict(module.state_dict()))
    for inputs, say in (("merged", "least squares"), ("own", "RegMean")):
        module.load_state_dict(mean(aligned))
        least_squares(module, aligned, batches, inputs=inputs)
        found[f"activation matching, {say}"] = score(dict(module.state_dict()))
    for flops in (1.25, 1.5, 2.0):
        wide, groups = partly(first, spaces, aligned, batches, flops=flops)
        for solved in (False, True):
            if solved:
                least_squares(wide, aligned, batches, spaces=spaces, groups=groups)
            with torch.no_grad():
                found[f"{flops:g} times the work{', least squares' * solved}"] = accuracy(wide(x), y)
    joint = {name: torch.cat([torch.cat([one[name] for one in row], 1) for row in tables]) for name in tables[0][0]}
    found["zip"] = score(zip_networks(spaces, states, joint))
    return found


def triple(modules, train, test):
    """Accuracy by method of three trained networks of one shape."""
    spaces = trace(modules[0], train[0][:2])
    states, (x, y) = [dict(one.state_dict()) for one in modules], test
    module = copy.deepcopy(modules[0])

    def score(tensors):
        module.load_state_dict(tensors)
        with torch.no_grad():
            return accuracy(module(x), y)

    with torch.no_grad():
        found = {"three: ensemble of their predictions": accuracy(sum(one(x).softmax(-1) for one in modules), y)}
    found["three: naive average"] = score(mean(states))
    rows = [
        score(mean([own, *(align(own, one, spaces, spaces, sweeps=20).carry(one) for one in states if one is not own)]))
        for own in states
    ]
    found["three: weight matching, two of them to the third (mean of the three choices)"] = sum(rows) / 3
    for steps, say in ((0, "without Frank-Wolfe"), (20, "20 steps of Frank-Wolfe")):
        maps = universe(states, spaces, steps=steps)
        found[f"three: universe, {say}"] = score(mean([one.carry(state) for one, state in zip(maps, states)]))
    return found


def widths(wide, small, train, test):
    """A network of half the width in the wide one's units, by a coupling."""
    tables, (x, y) = [trace(one, train[0][:2]) for one in (wide, small)], test
    states = [dict(one.state_dict()) for one in (wide, small)]
    module = copy.deepcopy(wide)
    found = {}

    def score(tensors):
        module.load_state_dict(tensors)
        with torch.no_grad():
            return accuracy(module(x), y)

    with torch.no_grad():
        found["the small network"] = accuracy(small(x), y)
    features = collect(wide, small, *tables, list(train[0].split(256)))
    maps = align(*states, *tables, match="emd", features=features)
    carried = maps.carry(states[1], into=states[0])
    found["carried by a coupling of activations: two maps"] = score(carried)
    found["average of both, two maps"] = score(mean([states[0], carried]))
    one = {name: type(map)(map.write, map.write.mT.contiguous(), map.even) for name, map in maps.maps.items()}
    single = Maps(maps.source, maps.target, one)
    carried = single.carry(states[1], into=states[0])
    found["carried by one map for writers and readers"] = score(carried)
    found["average of both, one map"] = score(mean([states[0], carried]))
    return found


def narrowed(small, wide, train, test):
    """A network of twice the width in the small one's units, by means of its units; with their deviations restored."""
    tables, batches = [trace(one, train[0][:2]) for one in (small, wide)], list(train[0].split(256))
    states, module, found = [dict(one.state_dict()) for one in (small, wide)], copy.deepcopy(small), {}

    def score(tensors):
        module.load_state_dict(tensors)
        with torch.no_grad():
            return accuracy(module(test[0]), test[1])

    with torch.no_grad():
        found["the wide network"] = accuracy(wide(test[0]), test[1])
    features = collect(small, wide, *tables, batches)
    for say, match in (("exact transport", "emd"), ("sinkhorn, epsilon 0.01", partial(sinkhorn, epsilon=0.01))):
        maps = align(*states, *tables, match=match, features=features)
        tensors = maps.carry(states[1], into=states[0])
        for repaired in (False, True):
            if repaired:
                module.load_state_dict(tensors)
                restore(module, deviations(maps, module, wide, batches), batches)
                tensors = {name: tensor.clone() for name, tensor in module.state_dict().items()}
            found[f"carried, {say}{', repaired' * repaired}"] = score(tensors)
            found[f"average of both, {say}{', repaired' * repaired}"] = score(mean([states[0], tensors]))
    return found


def table(results):
    for name in results[0]:
        values = torch.tensor([one[name] for one in results])
        print(f"| {name} | {values.mean():.1f} ± {values.std():.1f} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=500)
    parser.add_argument("--widths", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    start, (train, test), same, several, other, less = time.perf_counter(), digits(), [], [], [], []
    for number in range(given.pairs):
        first, second = (trained(2 * number + seed, train) for seed in (0, 1))
        if not given.widths:
            same.append(pair(first, second, train, test))
            several.append(triple([first, second, trained(2000 + number, train)], train, test))
        small = trained(1000 + number, train, SMALL)
        other.append(widths(first, small, train, test))
        less.append(narrowed(small, first, train, test))
        if time.perf_counter() - start > given.seconds:
            break
    print(f"{len(other)} pairs, {time.perf_counter() - start:.0f} s")
    for results in (same, several, other, less):
        if results:
            table(results)
