"""Online merging in one process: published trajectories, identities, windows, resuming, and what is refused."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fusion.merge import merge_tensors
from fusion.merge._draw import Draw
from fusion.online import OnlineMerge
from tests.bench.online_memory import allocated

GOLDEN = Path(__file__).parent / "golden" / "online_merging"
CASES = json.loads(GOLDEN.with_suffix(".json").read_text())["cases"]
STEPS = 8


def tensors(prefix):
    stored = load_file(GOLDEN.with_suffix(".safetensors"))
    return {name.rsplit("/", 1)[1]: t for name, t in stored.items() if name.rsplit("/", 1)[0] == prefix}


@pytest.mark.parametrize("case", [c for c in CASES if c["id"] != "adam"], ids=lambda c: c["id"])
def test_trajectories_of_the_published_optimizers(case):
    start, base = tensors("reference"), tensors("base")
    weights = {name: torch.nn.Parameter(t.clone()) for name, t in start.items()}
    optimizer = torch.optim.SGD(weights.values(), lr=1.0)
    method = "ties" if "onties" in case["id"] else "dare"
    merge = OnlineMerge(method, alpha=case["alpha"], density=case["reserve_p"], semantics="code")
    merge.attach(optimizer, weights.items(), {name: start[name] - base[name] for name in start})
    for step in range(STEPS):
        for name, update in tensors(f"update/{step}").items():
            weights[name].grad = -update
        optimizer.step()
        for name, expected in tensors(f"out/{case['id']}/{step}").items():
            torch.testing.assert_close(weights[name].data, expected, atol=1e-6, rtol=0)


def network(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(7, 13), torch.nn.Tanh(), torch.nn.Linear(13, 5))


def vectors(model, size=1e-2):
    g = torch.Generator().manual_seed(9)
    return {n: torch.randn(p.shape, generator=g) * size for n, p in model.named_parameters()}


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        g = torch.Generator().manual_seed(100 + step)
        optimizer.zero_grad()
        model(torch.randn(16, 7, generator=g)).square().mean().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=False),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


@pytest.mark.parametrize("method", ["dare", "ties"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_nothing_to_merge_is_the_bare_optimizer_bit_by_bit(method, make):
    bare, merged = network(), network()
    optimizer = make(merged.parameters())
    OnlineMerge(method, alpha=0.0, density=1.0).attach(optimizer, merged.named_parameters(), vectors(merged))
    expected = train(bare, make(bare.parameters()), 5)
    assert all(torch.equal(a, b) for a, b in zip(train(merged, optimizer, 5), expected, strict=True))


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("method", ["linear", "dare", "ties", "breadcrumbs"])
@pytest.mark.parametrize("semantics", ["paper", "code"])
def test_one_step_is_the_methods_own(method, semantics, make):
    bare, merged = network(), network()
    start = [p.detach().clone() for p in bare.parameters()]
    task = vectors(merged)
    density = None if method == "linear" else 0.5
    how = OnlineMerge(method, alpha=0.3, density=density, semantics=semantics, seed=3)
    optimizer = make(merged.parameters())
    how.attach(optimizer, merged.named_parameters(), task)
    after = train(bare, make(bare.parameters()), 1)
    got = train(merged, optimizer, 1)
    _, params = how.checked()
    for (name, _), old, new, out in zip(merged.named_parameters(), start, after, got, strict=True):
        tau = task[name]
        given = dict(params)
        if semantics == "code" and method == "dare":
            mask = Draw(3, name, 0, tau.numel()).uniform(1).view_as(tau) < 0.5
            tau, given["density"] = (tau / 0.5).clamp(-1, 1) * mask, [0.5, 1.0]
        step = merge_tensors(
            method,
            [new - old, tau],
            base=torch.zeros_like(old),
            weights=[0.7, 0.3],
            seed=3,
            step=1,
            name=name,
            **given,
        )
        torch.testing.assert_close(out, old + step, atol=1e-7, rtol=1e-6)


def test_a_window_merges_what_its_steps_add_up_to_and_every_parameter_moves():
    bare, merged = network(), network()
    start = [p.detach().clone() for p in bare.parameters()]
    optimizer = OPTIMIZERS["adamw"](merged.parameters())
    how = OnlineMerge("ties", alpha=0.2, density=0.5, every=4)
    how.attach(optimizer, merged.named_parameters(), vectors(merged))
    plain = OPTIMIZERS["adamw"](bare.parameters())
    expected = train(bare, plain, 3)
    assert all(torch.equal(a, b) for a, b in zip(train(merged, optimizer, 3), expected, strict=True))
    after, got = train(bare, plain, 1, 3), train(merged, optimizer, 1, 3)  # weight decay is in the update
    for (name, _), old, new, out in zip(merged.named_parameters(), start, after, got, strict=True):
        step = merge_tensors(
            "ties",
            [new - old, vectors(merged)[name]],
            base=torch.zeros_like(old),
            weights=[0.8, 0.2],
            name=name,
            **how.checked()[1],
        )
        torch.testing.assert_close(out, old + step, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize(("method", "every"), [("dare", 1), ("ties", 1), ("dare", 4), ("ties", 4)])
def test_saved_and_resumed_is_the_uninterrupted_run_bit_by_bit(method, every):
    how = OnlineMerge(method, alpha=0.1, density=0.4, every=every, seed=5)

    def begin(model):
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        return optimizer, how.attach(optimizer, model.named_parameters(), vectors(model))

    whole = network()
    optimizer, _ = begin(whole)
    expected = train(whole, optimizer, 12)
    first = network()
    optimizer, handle = begin(first)
    train(first, optimizer, 6)  # in the middle of the second window of four
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict(), handle.state_dict()))
    second = network(1)
    second.load_state_dict(saved[0])
    optimizer, handle = begin(second)
    optimizer.load_state_dict(saved[1])
    handle.load_state_dict(saved[2])
    assert all(torch.equal(a, b) for a, b in zip(train(second, optimizer, 6, 6), expected, strict=True))


def test_detached_is_bare_again():
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    handle = OnlineMerge("dare", alpha=1.0, density=1.0).attach(optimizer, model.named_parameters(), vectors(model))
    handle.detach()
    bare = network()
    expected = train(bare, OPTIMIZERS["sgd"](bare.parameters()), 3)
    assert all(torch.equal(a, b) for a, b in zip(train(model, optimizer, 3), expected, strict=True))


def test_it_says_what_it_did():
    model = network()
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    handle = OnlineMerge("ties", alpha=0.5, density=0.5).attach(
        optimizer, model.named_parameters(), vectors(model, 1.0)
    )
    train(model, optimizer, 1)
    assert handle.readings == {}
    handle.watch = True
    train(model, optimizer, 1, 1)
    assert 0 < handle.readings["update_kept"] < 1 and 0 < handle.readings["sign_conflicts"] < 1
    assert handle.readings["merged_norm"] > 0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda m, v: v.pop("0.weight"), "no task vector for '0.weight'"),
        (lambda m, v: v.update({"0.weight": torch.ones(3, 3)}), r"'0.weight' is \(13, 7\) in the model and \(3, 3\)"),
        (lambda m, v: [t.zero_() for t in v.values()], "reference and base are the same model"),
        (lambda m, v: m.bfloat16(), "keep float32 master weights"),
    ],
)
def test_what_cannot_merge_is_said(change, sentence):
    model = network()
    task = vectors(model)
    change(model, task)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=sentence):
        OnlineMerge("ties", alpha=0.1, density=0.5).attach(optimizer, model.named_parameters(), task)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"method": "tise"}, "did you mean 'ties'"),
        ({"method": "tsv_m"}, "shards of a model in training"),
        ({"method": "ties", "alpha": 2.0}, "from 0 to 1"),
        ({"method": "ties", "semantics": "papers"}, "did you mean 'paper'"),
        ({"method": "ties", "params": {"densty": 1.0}}, "did you mean 'density'"),
        ({"method": "ties", "density": 0.5, "params": {"scope": "model"}}, "tensor by tensor"),
        ({"method": "linear", "density": 0.5}, "linear has no density"),
    ],
)
def test_what_cannot_be_meant_is_said(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        OnlineMerge(**given)


def test_an_optimizer_with_other_parameters_is_refused():
    model, other = network(), network(1)
    with pytest.raises(ValueError, match="does not know the layout of SGD"):
        OnlineMerge("ties", alpha=0.1, density=0.5).attach(
            torch.optim.SGD(other.parameters(), lr=0.1), model.named_parameters(), vectors(model)
        )


@pytest.mark.parametrize("density", [0.1, 0.75])
def test_a_mask_that_is_drawn_once_leaves_kept_entries_only(density):
    model = torch.nn.Linear(700, 500, bias=False)  # more than one chunk
    task = vectors(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    how = OnlineMerge("dare", alpha=0.5, density=density, semantics="code", seed=2)
    held = how.attach(optimizer, model.named_parameters(), task).vectors["weight"]
    kept = Draw(2, "weight", 0, 350_000).uniform(1).view(500, 700) < density
    if density < 0.5:
        size = held.index.numel() * held.index.element_size() + held.value.numel() * held.value.element_size()
        assert size == 8 * int(kept.sum()) < 0.85 * 350_000
    else:
        assert held.numel() * held.element_size() == 4 * 350_000
    start = model.weight.detach().clone()
    model.weight.grad = torch.zeros_like(start)
    optimizer.step()
    expected = start + 0.5 * (task["weight"] / density).clamp(-1, 1) * kept
    torch.testing.assert_close(model.weight.data, expected, atol=1e-7, rtol=1e-6)


def test_a_density_that_varies_with_depth_masks_each_layer_by_its_own():
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(torch.nn.Linear(60, 50, bias=False) for _ in range(2))})
    task = vectors(model)
    params = {"density": {"layers": [0.2, 0.8]}}
    how = OnlineMerge("dare", alpha=1.0, semantics="code", seed=2, params=params)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    how.attach(optimizer, model.named_parameters(), task)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for density, (name, p) in zip((0.2, 0.8), model.named_parameters(), strict=True):
        kept = Draw(2, name, 0, 3000).uniform(1).view(50, 60) < density
        expected = start[name] + (task[name] / density).clamp(-1, 1) * kept
        torch.testing.assert_close(p.data, expected, atol=1e-6, rtol=1e-6)


def test_shards_that_are_copied_too_are_refused():
    from torch.distributed import HashStore, destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("copies", "shards"))
        weight = torch.nn.Parameter(distribute_tensor(torch.ones(4, 2), mesh, [Replicate(), Shard(0)]))
        optimizer = torch.optim.SGD([weight], lr=0.1)
        with pytest.raises(ValueError, match="w lies on a mesh of 2 axes: online merging knows FSDP2 over one"):
            OnlineMerge("dare", alpha=0.5, density=0.5).attach(optimizer, [("w", weight)], {"w": torch.ones(4, 2)})
    finally:
        destroy_process_group()


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
@pytest.mark.parametrize("method", ["ties", "dare"])
def test_pinned_task_vectors_give_the_same_bits(method, device):
    """On the CPU they stay where they are; of a GPU's weights they lie in the host's pinned memory."""
    found = []
    for pinned in (False, True):
        model = network().to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        merge = OnlineMerge(method, alpha=0.1, density=0.5, pinned=pinned)
        halves = {name: vector.bfloat16() for name, vector in vectors(model).items()}
        handle = merge.attach(optimizer, model.named_parameters(), halves)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        found.append([p.detach().cpu() for p in model.parameters()])
        kept = list(handle.vectors.values())
        assert all(v.dtype == torch.bfloat16 for v in kept)
        assert {v.device.type for v in kept} == {"cpu" if pinned else device}
        assert all(v.is_pinned() == (pinned and device == "cuda") for v in kept)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_a_step_takes_four_bytes_a_parameter_and_no_more_for_many_tensors(method):
    """Histograms of all tensors at once would take 1.2 MB each."""
    weights = {str(i): torch.nn.Parameter(torch.randn(50_000)) for i in range(40)}
    task = {name: torch.randn(50_000).bfloat16() for name in weights}
    optimizer = torch.optim.SGD(weights.values(), lr=0.1)
    OnlineMerge(method, alpha=0.1, density=0.5).attach(optimizer, weights.items(), task)
    for parameter in weights.values():
        parameter.grad = torch.randn(50_000)
    size = 40 * 50_000
    _, peak = allocated(optimizer.step)
    assert 4 * size <= peak < 4 * size + 6_000_000
