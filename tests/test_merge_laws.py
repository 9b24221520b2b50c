"""Laws that every merge method keeps, or says that it does not; a new file in the room is tested by being there."""

import pytest
import torch

from fusion import _family, words
from fusion._family import Family
from fusion._method import Method
from fusion.merge import merge_state_dicts

METHODS = [method for method in (Method.of(word.word) for word in words.list_room("merge")) if method.unit != "adapter"]
# parameters that have no default, and shorter work where the default takes long
GIVEN = {"slerp": {"t": 0.3}, "nearswap": {"t": 0.01}, "wudi": {"steps": 20}}
SHAPES = {
    "model.embed_tokens.weight": (7, 6),
    "model.layers.0.up.weight": (11, 5),
    "model.layers.0.norm.weight": (6,),
    "model.layers.1.conv.weight": (4, 3, 2, 2),
    "model.layers.1.scale": (),
    "model.layers.1.one": (1,),
    "model.layers.1.empty": (0, 5),
    "lm_head.weight": (7, 6),
}
each = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.word)


def those(say):
    """The methods that say so of themselves."""
    found = [method for method in METHODS if say(method)]
    assert found
    return pytest.mark.parametrize("method", found, ids=lambda method: method.word)


def noise(seed, shapes=SHAPES, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * size for name, shape in shapes.items()}


def added(one, other):
    return {name: tensor + other[name] for name, tensor in one.items()}


def many(method, wanted=3):
    fewest, most = method.models
    return max(fewest, min(wanted, most or wanted))


def given(method, models, base, weights=None, seed=0, **params):
    """Keyword arguments of merge_state_dicts: what the method needs, and no more."""
    out = {**GIVEN.get(method.word, {}), **params, "seed": seed}
    if "base" in method.needs:
        out["base"] = base
    if "weights" in method.needs and weights is not None:
        out["weights"] = weights
    if method.inputs:
        out["inputs"] = {name: [statistic(name, i, model) for i, model in enumerate(models)] for name in method.inputs}
    return out


def statistic(name, i, model):
    """A model's statistics: Gram matrices of random inputs (or outputs) of matrices, or positive numbers."""
    generator = torch.Generator().manual_seed(100 + i)
    out = {}
    for key, tensor in model.items():
        if name in ("gram", "output_gram"):
            if tensor.dim() == 2 and tensor.numel():
                x = torch.randn(40, tensor.shape[1 if name == "gram" else 0], generator=generator)
                out[key] = x.T @ x / 40
        else:
            out[key] = torch.rand(tensor.shape, generator=generator) + 0.1
    return out


def models_of(method, size=0.1, shapes=SHAPES, wanted=3):
    base = noise(0, shapes)
    return [added(base, noise(i + 1, shapes, size)) for i in range(many(method, wanted))], base


def apart(merged, other):
    return max(
        float((merged[name].double() - other[name].double()).abs().max()) for name in other if other[name].numel()
    )


@each
def test_models_that_equal_the_base_give_the_base(method, monkeypatch):
    base = noise(0)
    models = [base] * many(method)
    arguments = given(method, models, base)
    params = {name: value for name, value in arguments.items() if name in method.parameters}
    stays = method.equal_stays(torch.ones(len(models)), method.resolve(params, "w"))
    if stays:
        assert apart(merge_state_dicts(method.word, models, **arguments), base) == 0
        # by arithmetic too, not only because equal tensors are copied
        monkeypatch.setattr(Family, "equal", lambda self, after: False)
        assert apart(merge_state_dicts(method.word, models, **arguments), base) < 1e-5


@those(lambda method: "NEUTRAL" in method.constants and method.models[0] == 1)
def test_one_model_with_neutral_parameters_is_that_model(method):
    (model, *_), base = models_of(method)
    arguments = given(method, [model], base, [1.0], **method.constants["NEUTRAL"])
    assert apart(merge_state_dicts(method.word, [model], **arguments), model) < 1e-5


@those(lambda method: method.constants.get("SYMMETRIC", True) and many(method) > 1)
def test_the_order_of_models_does_not_matter(method):
    models, base = models_of(method)
    weights, turned = [0.5, 0.3, 0.2][: len(models)], [*range(1, len(models)), 0]
    arguments = given(method, models, base, weights)
    merged = merge_state_dicts(method.word, models, **arguments)
    if "weights" in arguments:
        arguments["weights"] = [weights[i] for i in turned]
    for name, side in arguments.get("inputs", {}).items():
        arguments["inputs"][name] = [side[i] for i in turned]
    assert apart(merge_state_dicts(method.word, [models[i] for i in turned], **arguments), merged) < 1e-5


@each
@pytest.mark.parametrize("case", ["tiny", "large", "one at the base", "opposite", "identical", "zero", "odd weights"])
def test_finite_in_finite_out_and_inputs_untouched(method, case):
    size = {"tiny": 1e-20, "large": 1e4}.get(case, 0.1)
    models, base = models_of(method, size)
    if case == "one at the base":
        models[0] = {name: tensor.clone() for name, tensor in base.items()}
    if case == "opposite":
        models[-1] = {name: 2 * base[name] - tensor for name, tensor in models[0].items()}
    if case == "identical":
        models = [{name: tensor.clone() for name, tensor in models[0].items()} for _ in models]
    if case == "zero":
        models = [{name: torch.zeros_like(tensor) for name, tensor in base.items()} for _ in models]
        models[0] = {name: tensor.clone() for name, tensor in base.items()}
    weights = [0.7, -0.3, 0.25][: len(models)] if case == "odd weights" else [1.0] * len(models)
    arguments = given(method, models, base, weights)
    before = [{name: tensor.clone() for name, tensor in one.items()} for one in (*models, base)]
    try:
        merged = merge_state_dicts(method.word, models, **arguments)
    except ValueError as error:
        assert case == "odd weights" and "weight" in str(error)  # a sentence about them is as good
        return
    for name, tensor in merged.items():
        assert tensor.shape == SHAPES[name]
        assert torch.isfinite(tensor).all()
    for one, copy in zip((*models, base), before, strict=True):
        assert all(torch.equal(one[name], tensor) for name, tensor in copy.items())


@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtype_in_is_dtype_out(method, dtype):
    models, base = models_of(method)
    models, base = [{n: t.to(dtype) for n, t in m.items()} for m in models], {n: t.to(dtype) for n, t in base.items()}
    merged = merge_state_dicts(method.word, models, **given(method, models, base))
    assert {tensor.dtype for tensor in merged.values()} == {dtype}


@each
def test_bits_are_the_same_whatever_the_chunk(method, monkeypatch):
    # also a second run with the same seed has the same bits: the generator of torch plays no part
    shapes = {
        "model.layers.0.up.weight": (170, 129),
        "model.layers.0.norm.weight": (21_001,),
        "lm_head.weight": (3, 70),
    }
    models, base = models_of(method, shapes=shapes)
    arguments = given(method, models, base, [0.5, 0.3, 0.2][: len(models)], seed=5)
    merged = []
    for chunk in (4096, 4 * 4096, _family.CHUNK):
        torch.manual_seed(chunk)
        monkeypatch.setattr(_family, "CHUNK", chunk)
        merged.append(merge_state_dicts(method.word, models, **arguments))
    assert all(torch.equal(one[name], merged[0][name]) for one in merged for name in shapes)
