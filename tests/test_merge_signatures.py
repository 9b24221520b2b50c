"""The signatures that code outside of this project calls: every parameter by its name, every value it may have."""

import pytest
import torch

from fusion.merge import merge_state_dicts, merge_tensors

# what is promised of what is not said
DEFAULTS = {
    "linear": {"normalize": True},
    "task_arithmetic": {"scale": 1.0},
    "model_stock": {"norm_floor": 0.0},
    "ram": {"epsilon": 1e-5, "r": 0.0, "alpha": 0.2},
    "ties": {"elect": "weighted", "scope": "tensor", "combine": "mean", "count": "floor"},
    "dare": {"consensus": "none"},
    "della": {"consensus": "none"},
    "breadcrumbs": {"consensus": "none"},
}
# word -> the values that each parameter may have
CALLS = [
    ("linear", {"normalize": [True, False]}),
    ("task_arithmetic", {"scale": [1.0, 0.5]}),
    ("ties", {"density": [0.4, [0.4, 0.8]], "scale": [0.5, 1.0], "normalize": [True, False], "elect": ["weighted"]}),
    ("ties", {"elect": ["weighted", "unweighted", "count"], "count": ["floor", "plus_one"]}),
    ("ties", {"combine": ["mean", "sum"], "scope": ["tensor", "model"]}),
    ("dare", {"density": [0.5, [0.5, 0.9]], "rescale": ["inverse", "l1", "none"], "scale": [0.5]}),
    ("dare", {"consensus": ["none", "ties"]}),
    ("della", {"density": [0.5], "epsilon": [0.1, [0.05, 0.1]], "rescale": ["inverse", "l1", "none"], "scale": [0.5]}),
    ("della", {"consensus": ["none", "ties"]}),
    ("breadcrumbs", {"density": [0.5, 1.0], "gamma": [0.05], "consensus": ["none", "ties"], "scale": [0.5]}),
    ("sce", {"select_topk": [0.5, 1.0], "variant": ["fusechat", "mergekit"]}),
    ("slerp", {"t": [0.3, 0.0]}),
    ("nuslerp", {}),
    ("multislerp", {}),
    ("karcher", {"max_iter": [10], "tol": [1e-5]}),
    ("model_stock", {"norm_floor": [0.0, 1e-6]}),
    ("ram", {"epsilon": [1e-5], "r": [0.0, 0.1], "alpha": [0.2]}),
    ("nearswap", {"t": [0.01]}),
    ("magmax", {"scale": [0.5]}),
    ("iso_c", {"scale": [1.0]}),
    ("iso_cts", {"scale": [1.0], "common_fraction": [0.8]}),
    ("tsv_m", {"scale": [1.0]}),
    ("emr", {}),
    ("fisher", {"normalize": [False], "floor": [1e-6], "scope": ["tensor"]}),
    ("fisher", {"normalize": [True, False], "floor": [1e-6, 0.0], "scope": ["model"]}),
    ("regmean", {"off_diagonal": [0.9, 1.0], "ridge": [0.0, 0.1]}),
]
BASELESS = ("linear", "slerp", "nearswap", "fisher", "regmean")
UNWEIGHTED = ("sce", "slerp", "model_stock", "ram", "nearswap", "magmax", "emr", "iso_c", "iso_cts", "tsv_m")


def noise(seed: int) -> torch.Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(seed))


BASE, A, B = noise(0), noise(0) + 0.1 * noise(1), noise(0) + 0.1 * noise(2)
GRAM = [noise(n).T @ noise(n) for n in (3, 4)]
INPUTS = {"fisher": {"fisher": [noise(5).abs(), noise(6).abs()]}, "regmean": {"gram": GRAM}}


def combinations(values: dict) -> list[dict]:
    """Each value of each parameter, the others at their first."""
    first = {name: several[0] for name, several in values.items()}
    return [first, *({**first, name: one} for name, several in values.items() for one in several[1:])]


@pytest.mark.parametrize(
    ("word", "values"), CALLS, ids=lambda value: value if isinstance(value, str) else ",".join(value)
)
def test_every_parameter_goes_by_its_name(word, values):
    for params in combinations(values):
        given = {"base": None if word in BASELESS else BASE, "inputs": INPUTS.get(word)}
        given["weights"] = None if word in UNWEIGHTED else [0.5, 0.3]
        sides = {name: [{"tensor": one} for one in tensors] for name, tensors in INPUTS.get(word, {}).items()}
        below = None if given["base"] is None else {"tensor": BASE}
        model = merge_state_dicts(
            word, [{"tensor": A}, {"tensor": B}], below, given["weights"], sides or None, **params
        )["tensor"]
        assert model.shape == A.shape and torch.isfinite(model).all()
        if params.get("scope") != "model":
            assert torch.equal(merge_tensors(word, [A, B], **given, **params), model)


@pytest.mark.parametrize("word", DEFAULTS)
def test_defaults_are_those_that_were_promised(word):
    base = None if word in BASELESS else BASE
    named = merge_tensors(word, [A, B], base=base, **DEFAULTS[word])
    assert torch.equal(merge_tensors(word, [A, B], base=base), named)


def test_first_and_second_model_are_told_apart():
    assert torch.equal(merge_tensors("slerp", [A, B], t=0), A)
    assert torch.allclose(merge_tensors("slerp", [A, B], t=1), B, atol=1e-6)
    near = merge_tensors("nearswap", [A, B], t=0.05)
    assert torch.allclose(near, A + (B - A).clamp(-0.05, 0.05), atol=1e-6)
