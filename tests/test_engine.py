"""Merging in memory: parameters, checks, the primitives, and the six basic methods by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion._method import Method, Region
from fusion._params import depths, layer_of, resolved
from fusion.merge import _compiled, _x, merge_state_dicts, merge_tensors
from fusion.merge._sampled import sampled
from fusion.merge._x import Max, Min, Running, Sum, joined, values

A, B = torch.tensor([1.0, -4.0, 3.0, 0.5, 0.0]), torch.tensor([2.0, 2.0, -1.0, 0.25, 0.0])
ZERO = torch.zeros(5)


@pytest.fixture(params=["compiled", "torch"])
def machinery(request, monkeypatch):
    if request.param == "torch":
        monkeypatch.setattr(_compiled, "library", lambda: None)


def close(got, want):
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=got.dtype), atol=1e-6, rtol=1e-6)


# --- the basic methods, by hand ---


def test_linear():
    close(merge_tensors("linear", [A, B], weights=[3, 1]), (3 * A + B) / 4)
    close(merge_tensors("linear", [A, B], weights=[3, 1], normalize=False), 3 * A + B)
    close(merge_tensors("linear", [A, B]), (A + B) / 2)
    close(merge_tensors("linear", [A, B], weights=[2, -1]), 2 * A - B)
    close(merge_tensors("linear", [A, A], weights=[1, 1], normalize=False), 2 * A)  # equal, and yet not copied
    with pytest.raises(ValueError, match="add up to 0"):
        merge_tensors("linear", [A, B], weights=[1, -1])


def test_task_arithmetic():
    base = torch.ones(5)
    close(
        merge_tensors("task_arithmetic", [A, B], base=base, weights=[0.5, -1], scale=0.5),
        1 + 0.5 * (0.5 * (A - 1) - (B - 1)),
    )


@pytest.mark.parametrize(
    ("params", "want"),
    [
        # two of five stay: -4 and 3 of A; 2 and 2 of B
        ({"density": 0.4}, [2, -4, 3, 0, 0]),
        # three of five stay: 1, -4, 3 and 2, 2, -1; all elect +, -, +
        ({"density": 0.6}, [1.5, -4, 3, 0, 0]),
        ({"density": 0.6, "weights": [1, 3]}, [7 / 4, 2, 0, 0, 0]),  # 3 * 2 outvotes -4; 3 - 3 elects nobody
        ({"density": 0.6, "weights": [1, 3], "elect": "unweighted"}, [7 / 4, -4, 3, 0, 0]),
        ({"density": 0.6, "weights": [1, 3], "elect": "count"}, [7 / 4, 2, 3, 0, 0]),  # one against one elects +
        ({"density": 0.6, "weights": [1, 3], "elect": "count", "normalize": False}, [7 / 2, 6, 3, 0, 0]),
        ({"density": 0.6, "weights": [1, 3], "elect": "count", "combine": "sum", "scale": 0.5}, [3.5, 3, 1.5, 0, 0]),
        ({"density": 0.2, "count": "plus_one"}, [2, -4, 3, 0, 0]),
        ({"density": [0.2, 0.4]}, [2, -4, 0, 0, 0]),
        ({"density": 0.0}, [0, 0, 0, 0, 0]),
        ({"density": 1.0}, [1.5, -4, 3, 0.375, 0]),
        # w d elects -, -, +, +: B alone, -2 / -1; both, whose weights cancel; both again; A alone
        ({"density": 1.0, "weights": [1, -1]}, [2, 0, 0, 0.5, 0]),
    ],
)
def test_ties(params, want, machinery):
    close(merge_tensors("ties", [A, B], base=ZERO, **params), want)


def test_ties_keeps_all_that_tie():
    even = torch.tensor([1.0, -1.0, 1.0, 0.5])
    out = merge_tensors("ties", [even], base=torch.zeros(4), density=0.25, outputs=True)
    close(out.tensor, [1, -1, 1, 0])
    assert out.extras["kept"].value.tolist() == [3]


def test_ties_over_the_whole_model():
    model = {"a": torch.tensor([5.0, 4.0]), "b": torch.tensor([[1.0, 2.0]]), "c": torch.tensor(3.0)}
    base = {name: torch.zeros_like(tensor) for name, tensor in model.items()}
    out = merge_state_dicts("ties", [model], base=base, density=0.6, scope="model")
    close(out["a"], [5, 4])
    close(out["b"], [[0, 0]])
    close(out["c"], 3)
    with pytest.raises(ValueError, match="merge_state_dicts"):
        merge_tensors("ties", [A], base=ZERO, scope="model")
    with pytest.raises(ValueError, match="ties.density .* whole model"):
        merge_state_dicts("ties", [model], base=base, density={"layers": [0.2, 0.8]}, scope="model")


def test_ties_refuses_a_divided_sum():
    with pytest.raises(ValueError, match="a sum is not divided"):
        merge_tensors("ties", [A], base=ZERO, combine="sum", normalize=True)


@pytest.mark.parametrize(
    ("params", "want"),
    [
        # sorted magnitudes 10 9 ... 1: the largest goes, five stay
        ({"density": 0.5, "gamma": 0.1}, [0, 9, 8, 7, 6, 5, 0, 0, 0, 0]),
        ({"density": 0.5, "gamma": 0.0}, [10, 9, 8, 7, 6, 0, 0, 0, 0, 0]),
        ({"density": 1.0, "gamma": 0.2}, [0, 0, 8, 7, 6, 5, 4, 3, 2, 1]),  # outliers go whatever is kept
        ({"density": 0.9, "gamma": 0.2}, [0, 0, 8, 7, 6, 5, 4, 3, 2, 1]),
        ({"density": 1.0, "gamma": 0.0}, [10, 9, 8, 7, 6, 5, 4, 3, 2, 1]),
        ({"density": 0.01, "gamma": 0.1}, [0, 9, 0, 0, 0, 0, 0, 0, 0, 0]),
        ({"density": 0.0, "gamma": 0.1}, [0] * 10),
        ({"density": 1.0, "gamma": 1.0}, [0] * 10),
    ],
)
def test_breadcrumbs(params, want, machinery):
    sign = torch.tensor([1.0, -1.0] * 5)
    d = torch.arange(10.0, 0.0, -1.0) * sign
    close(merge_tensors("breadcrumbs", [d], base=torch.zeros(10), **params), torch.tensor(want) * sign)


def test_consensus_sums_what_agrees_undivided():
    for word, params in (("breadcrumbs", {"gamma": 0.0}), ("dare", {}), ("della", {"epsilon": 0.0})):
        out = merge_tensors(
            word, [A, B], base=ZERO, weights=[1, 0.25], density=1.0, consensus="ties", scale=2.0, **params
        )
        close(out, [2 * 1.5, 2 * -4, 2 * 3, 2 * 0.5625, 0])
        plain = merge_tensors(word, [A, B], base=ZERO, weights=[1, 0.25], density=1.0, **params)
        close(plain, A + 0.25 * B)


@pytest.mark.parametrize("word", ["dare", "della"])
def test_thinned_task_vectors(word, machinery):
    d = torch.randn(200, 500, generator=torch.Generator().manual_seed(0)).abs() + 0.1
    zero, params = torch.zeros_like(d), {"epsilon": 0.0} if word == "della" else {}
    thin = {
        how: merge_tensors(word, [d], base=zero, density=0.25, rescale=how, seed=1, **params)
        for how in ("none", "inverse", "l1")
    }
    kept = thin["none"] != 0
    close(thin["none"], d * kept)
    close(thin["inverse"], 4 * d * kept)
    assert abs(float(kept.double().mean()) - 0.25) < 5 * (0.1875 / d.numel()) ** 0.5
    close(thin["l1"].double().sum(), d.double().sum())
    close(thin["l1"], d * kept * (d.double().sum() / (d * kept).double().sum()).float())
    other = merge_tensors(word, [d], base=zero, density=0.25, rescale="none", seed=2, **params)
    assert not torch.equal(other, thin["none"])
    close(merge_tensors("dare", [d], base=zero, density=0.0, rescale="inverse"), zero)


def test_one_model_is_drawn_apart_from_the_next():
    d = torch.ones(10_000)
    both = merge_tensors("dare", [d, d], base=torch.zeros(10_000), density=0.5, rescale="none")
    assert abs(float((both == 2).double().mean()) - 0.25) < 0.03


def test_della_keeps_larger_entries_more_often(machinery):
    rows, length = 4000, 5
    d = torch.tensor([0.3, -0.1, 0.5, 0.2, -0.4]).repeat(rows, 1)
    chance = torch.tensor([0.5, 0.3, 0.7, 0.4, 0.6])  # 0.3 + 2 * 0.2 * place / 4
    out = merge_tensors("della", [d], base=torch.zeros_like(d), density=0.5, epsilon=0.2)
    kept = out != 0
    assert (kept.double().mean(0) - chance).abs().max() < 5 * (0.25 / rows) ** 0.5
    close(out, d / chance * kept)
    one = merge_tensors("della", [d.flatten()], base=torch.zeros(rows * length), density=0.5, epsilon=0.2)
    assert one.shape == (rows * length,)
    for bad in ({"density": 0.1, "epsilon": 0.1}, {"density": 0.9, "epsilon": 0.2}):
        with pytest.raises(ValueError, match="above 0 and at most 1"):
            merge_tensors("della", [d], base=torch.zeros_like(d), **bad)


# --- primitives ---

floats = st.floats(-1e4, 1e4, width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, 3e38])


@settings(max_examples=60, deadline=None)
@given(st.lists(floats, min_size=1, max_size=40), st.integers(0, 40), st.booleans())
def test_threshold_is_the_kth_largest_magnitude(numbers, k, compiled):
    x, k = torch.tensor([numbers, numbers[::-1]]), min(k, len(numbers))
    with pytest.MonkeyPatch.context() as patch:
        if not compiled:
            patch.setattr(_compiled, "library", lambda: None)
        places = torch.tensor([[k, 1], [len(numbers), k]])
        high = _x.high_counts(x).long()
        low = _x.low_counts(x, _x.bucket(high.unsqueeze(1), places)[0]).long()
    got = _x.threshold(high, low, places)
    order = x.abs().sort(dim=1, descending=True).values
    want = [[float(order[row, place - 1]) if place else float("inf") for place in places[row]] for row in range(2)]
    assert got.tolist() == want
    least = want[0][0]
    assert torch.equal(_x.trimmed(x[0], least), torch.where(x[0].abs() >= least, x[0], 0.0))


@pytest.mark.parametrize("n", [1, 7, 511, 4096, 4097, 300_000])
def test_sums_do_not_depend_on_chunks(n):
    x = torch.randn(3, n, generator=torch.Generator().manual_seed(n)) * 10 ** torch.randn(3, 1)
    whole = {"total": Sum(_x.total(x)), "gram": Sum(_x.gram(x))}
    for chunk in (4096, 8192, 131072):
        parts = [
            {"total": Sum(_x.total(x[:, at : at + chunk])), "gram": Sum(_x.gram(x[:, at : at + chunk]))}
            for at in range(0, n, chunk)
        ]
        for name, value in values(joined(parts)).items():
            assert torch.equal(value, whole[name].value)
    close(whole["total"].value, x.double().sum(1))
    close(whole["gram"].value, x.double() @ x.double().T)
    assert torch.equal(_x.total(x[1]), whole["total"].value[1])  # nor on what else is summed beside it


@pytest.mark.parametrize("n", [1, 4096, 150_001])
def test_compiled_sums_have_the_same_bits(n, monkeypatch):
    x = torch.randn(4, n, generator=torch.Generator().manual_seed(0))
    assert _compiled.loops(x) is not None, "the C compiler that the tests need is missing"
    origin = x[3].clone()
    given = (x,), (x, origin), (x - origin,)
    products, squares = [_x.gram(*one) for one in given], [_x.squares(*one) for one in given]
    assert all(torch.equal(one.diagonal(), two) for one, two in zip(products, squares, strict=True))
    assert torch.equal(products[1], products[2])
    monkeypatch.setattr(_compiled, "library", lambda: None)
    for one, product, square in zip(given, products, squares, strict=True):
        assert torch.equal(_x.gram(*one), product) and torch.equal(_x.squares(*one), square)


@pytest.mark.parametrize("start, n", [(0, 150_001), (0, 1), (4096 * 16 - 100, 5000), (4096 * 19 + 4000, 70_000)])
@pytest.mark.parametrize("with_base", [True, False])
def test_sampled_products_are_those_of_every_16th_block(start, n, with_base, monkeypatch):
    draw = torch.Generator().manual_seed(n)
    x, out, base = (torch.randn(*shape, n, generator=draw) for shape in ((3,), (), ()))
    found, counts = sampled(x, base if with_base else None, out, start)
    chosen = [i for i in range(n) if (start + i) // 4096 % 16 == 0]
    origin = (base if with_base else x.mean(0))[chosen].double()
    rows = torch.stack([*(x[:, chosen] - origin), out[chosen] - origin, origin])
    torch.testing.assert_close(found, rows @ rows.T, rtol=1e-5, atol=1e-3)
    signs = rows[:3].sign()
    assert counts.tolist() == [len(chosen), int((signs.amin(0) < 0).logical_and(signs.amax(0) > 0).sum())]
    monkeypatch.setattr(_compiled, "library", lambda: None)
    plain, same = sampled(x, base if with_base else None, out, start)
    torch.testing.assert_close(plain, found, rtol=1e-6, atol=1e-3)
    assert torch.equal(same, counts)


def test_without_a_compiler_it_says_so_and_goes_on(monkeypatch):
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.warns(UserWarning, match=r"longer, with the same result: there is no C compiler"):
        assert _compiled._library() is None


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    compiler = tmp_path / "cc"
    compiler.write_text("#!/bin/sh\necho it is no good >&2\nexit 3\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("FUSION_CACHE", str(tmp_path / "cache"))
    with pytest.warns(UserWarning, match="does not compile .*_loops.c: it is no good"):
        assert _compiled._library() is None
    assert not list((tmp_path / "cache").iterdir()), "nothing half-made is left"


@pytest.mark.parametrize("length", [1, 5, 576, 5000])
def test_row_sums_are_each_rows_own(length):
    x = torch.randn(2, 9 * length, generator=torch.Generator().manual_seed(length))
    rows = _x.row_total(x, 9)
    close(rows, x.double().unflatten(1, (9, length)).sum(2))
    assert torch.equal(rows[:, 3:5], _x.row_total(x[:, 3 * length : 5 * length], 2))


@pytest.mark.parametrize("kind", ["random", "half", "alike", "zeros"])
def test_ranks(kind, machinery):
    x = torch.randn(20, 700, generator=torch.Generator().manual_seed(0))
    x = {"random": x, "half": x.bfloat16().float(), "alike": 1 + x * 1e-4, "zeros": x * (x > 1)}[kind]
    if kind == "alike":
        x[:, ::7] = 0  # zeros among nearly equal ones are the worst case of the first sort
    want = x.abs().sort(dim=1, stable=True).indices
    assert torch.equal(_x.ranks(x).long().gather(1, want), torch.arange(700).expand(20, -1))


def test_readings_combine_by_kind_in_any_order():
    parts = [
        {"n": Sum(torch.tensor(2**31 - 1, dtype=torch.int32)), "x": Sum(torch.tensor(0.1, dtype=torch.float64)),
         "most": Max(torch.tensor([i, -i])), "least": Min(torch.tensor([float(i)]))}
        for i in range(7)
    ]  # fmt: skip
    forward, backward = Running(), Running()
    for i in range(7):
        forward.add(i, parts[i])
        backward.add(6 - i, parts[6 - i])
    assert forward.values()["n"] == 7 * (2**31 - 1)
    assert forward.values()["most"].tolist() == [6, 0] and forward.values()["least"].tolist() == [0.0]
    assert all(torch.equal(forward.values()[name], value) for name, value in backward.values().items())
    assert parts[0]["most"].value.tolist() == [0, 0]  # what was handed in stays


# --- parameters ---


def test_layers_of_names():
    names = ["tower.layers.26.w", "model.layers.7.mlp.experts.30.up_proj.weight", "model.layers.15.w", "lm_head.weight"]
    found = depths(names)
    assert found == {"tower.layers.": 27, "model.layers.": 16}
    assert [layer_of(name, found) for name in names] == [(26, 27), (7, 16), (15, 16), None]
    assert _x.is_embedding("model.embed_tokens.weight") and _x.is_embedding("transformer.wte.weight")
    assert not any(map(_x.is_embedding, ("lm_head.weight", "model.norm.weight", "embed_out.weight")))


@pytest.mark.parametrize(
    ("value", "name", "layer", "want"),
    [
        ({"layers": [0.2, 0.8]}, "h.0.w", (0, 4), 0.2),
        ({"layers": [0.2, 0.8]}, "h.1.w", (1, 4), 0.4),
        ({"layers": [0.2, 0.8]}, "h.3.w", (3, 4), 0.8),
        ({"layers": [0, 1, 0]}, "h.2.w", (2, 5), 1.0),
        ({"layers": [0, 1, 0]}, "h.3.w", (3, 5), 0.5),
        ({"layers": [0.2, 0.8]}, "h.0.w", (0, 1), 0.2),
        ({"layers": [0.7]}, "h.3.w", (3, 4), 0.7),
        ({"layers": [0.2, 0.8]}, "model.embed_tokens.weight", None, 0.2),
        ({"layers": [0.2, 0.8]}, "lm_head.weight", None, 0.8),
        ({"layers": [0.2, 0.8], "other": 0.5}, "lm_head.weight", None, 0.5),
        ({"match": {"*.mlp.*": 0.3, "*": 0.5}}, "h.0.mlp.w", (0, 1), 0.3),
        ({"match": {"*.mlp.*": {"layers": [0, 1]}, "*": 0.5}}, "h.1.mlp.w", (1, 2), 1.0),
        ([0.1, {"layers": [0, 1]}], "h.1.w", (1, 3), [0.1, 0.5]),
        ("count", "h.1.w", (1, 3), "count"),
    ],
)
def test_parameters_of_one_tensor(value, name, layer, want):
    assert resolved(value, name, layer, "x") == pytest.approx(want)


def test_parameters_vary_by_layer_and_by_name():
    names = ["emb.weight", "layers.0.mlp.w", "layers.1.mlp.w", "layers.2.attn.w", "head.weight"]
    model, base = dict.fromkeys(names, A), dict.fromkeys(names, ZERO)
    out = merge_state_dicts("task_arithmetic", [model], base=base, scale={"layers": [0.0, 1.0]})
    for name, scale in zip(names, (0, 0, 0.5, 1, 1), strict=True):
        close(out[name], scale * A)
    out = merge_state_dicts("task_arithmetic", [model], base=base, scale={"match": {"*.mlp.*": 2, "*": 3}})
    for name, scale in zip(names, (3, 2, 2, 3, 3), strict=True):
        close(out[name], scale * A)
    per_model = [{"layers": [1.0, 0.0]}, 1.0]
    out = merge_state_dicts("ties", [model, model], base=base, density=per_model, combine="sum")
    close(out["layers.0.mlp.w"], 2 * A)
    close(out["layers.2.attn.w"], A)


# --- sentences ---

SENTENCES = [
    ("tie", [A], {"base": ZERO}, "unknown merge method 'tie'; did you mean 'ties'?"),
    ("ties", [A], {"base": ZERO, "densty": 1.0}, "ties has no parameter 'densty'; did you mean 'density'?"),
    ("ties", [A], {}, "ties works on what changed since a common base"),
    ("ties", [A], {"base": ZERO, "density": 1.5}, "density is 1.5; allowed are numbers from 0 to 1"),
    ("ties", [A], {"base": ZERO, "density": "half"}, "ties.density: a number or a list of a number is needed"),
    ("ties", [A, B], {"base": ZERO, "density": [0.5]}, "ties.density: 1 values for 2 models"),
    ("ties", [A], {"base": ZERO, "density": {"layer": [1]}}, "varies is {layers: .* or {match: "),
    ("ties", [A], {"base": ZERO, "density": {"layers": ["a"]}}, "interpolates between numbers"),
    ("ties", [A], {"base": ZERO, "density": {"match": {"*.mlp": 0.5}}}, "no pattern under match fits the tensor 'w'"),
    ("ties", [A], {"base": ZERO, "elect": "wheighted"}, "ties.elect: 'weighted' or 'unweighted' or 'count' is needed"),
    ("ties", [A, B], {"base": ZERO, "weights": [1]}, "ties: 1 weights for 2 models"),
    ("ties", [A], {"base": ZERO, "weights": [float("nan")]}, "they must be finite"),
    ("linear", [], {}, "linear merges at least 1 models, besides the base, and was given 0"),
    ("slerp", [A], {"t": 0.5}, "slerp merges 2 models, besides the base, and was given 1"),
    ("slerp", [A, B], {}, "slerp needs 't'"),
    ("slerp", [A, B], {"t": 0.5, "weights": [1, 2]}, "leave the weights out, or all 1"),
    ("slerp", [A, B], {"t": float("nan")}, "slerp.t: a number is needed here, not NaN"),
    ("ties", [A, B], {"base": ZERO, "density": [0.5, float("nan")]}, "ties.density: a number .* not NaN"),
    ("linear", [A.to(torch.float8_e4m3fn)], {}, r"'w' of model 0 is quantised \(torch.float8_e4m3fn\)"),
    ("linear", [A, B[:4]], {}, r"'w' has shape \(4,\) in model 1 and \(5,\) in model 0"),
    ("linear", [A, B.half()], {}, "'w' is torch.float16 in model 1 and torch.float32 in model 0"),
    ("linear", [A, B / 0], {}, "'w' of model 1 has NaN in it"),
    ("ties", [A], {"base": ZERO + float("inf")}, "'w' of the base has infinity in it"),
    ("linear", [A.long(), B.long()], {}, "'w' holds whole numbers .* that differ"),
    ("linear", [A.half() * 1e4, B.half()], {"weights": [9, 1], "normalize": False}, "torch.float16 has no room for"),
    ("linear", [A], {"inputs": {"fishr": [A]}}, "linear reads no statistic 'fishr'"),
    ("fisher", [A], {"scope": "tensor"}, "fisher reads the statistic 'fisher' of each model; give it"),
    ("fisher", [A, B], {"scope": "tensor", "inputs": {"fisher": [A[:2], B]}}, r"needs .fisher. .* model 0 has .*2,"),
]  # fmt: skip


@pytest.mark.parametrize(("word", "tensors", "params", "sentence"), SENTENCES)
def test_bad_input_gets_a_sentence(word, tensors, params, sentence):
    with pytest.raises(ValueError, match=sentence):
        merge_tensors(word, tensors, name="w", **params)


def test_weights_of_one_each_say_what_leaving_them_out_says():
    for word in ("sce", "model_stock", "magmax"):
        plain = merge_tensors(word, [A, B], base=ZERO)
        assert torch.equal(merge_tensors(word, [A, B], base=ZERO, weights=[1, 1.0]), plain)


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({"gram": {"w": torch.eye(5)}}, "is one dict, and regmean reads one of each model; give a list of 2"),
        ({"gram": [torch.eye(5)] * 2}, r"inputs\['gram'\] of model 0 is a Tensor"),
        ({"gram": [{"v.w": torch.eye(5)}] * 2}, "about 'v.w', which no model has; did you mean 'u.w'"),
    ],
)
def test_statistics_that_are_of_nothing_get_a_sentence(inputs, sentence):
    with pytest.raises(ValueError, match=sentence):
        merge_state_dicts("regmean", [{"u.w": A.expand(2, 5)}, {"u.w": B.expand(2, 5)}], inputs=inputs)


def test_state_dicts_must_have_the_same_tensors():
    one, other = {"a": A, "b": B}, {"a": A}
    with pytest.raises(ValueError, match="model 1 lacks the tensor 'b', which model 0 has"):
        merge_state_dicts("linear", [one, other])
    with pytest.raises(ValueError, match="model 0 lacks the tensor 'b', which the base has"):
        merge_state_dicts("ties", [other], base=one)
    with pytest.raises(ValueError, match="no post word here reads a statistic 'x'"):
        merge_state_dicts("linear", [one], inputs={"x": {}})
    with pytest.raises(ValueError, match="unknown post word 'line'"):
        merge_state_dicts("linear", [one], base=one, post=[{"line": {}}])


def test_live_shards_take_element_methods():
    with pytest.raises(ValueError, match="della needs whole rows"):
        Method.of("della").check({}, 2, live=True)
    Method.of("dare").check({}, 2, live=True)


def test_steps_draw_anew_and_seeds_repeat():
    d, zero = torch.ones(1000), torch.zeros(1000)
    first, again, later = (merge_tensors("dare", [d], base=zero, step=step) for step in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, later)


def test_online_merging_calls_them_with_sums():
    """[update, task vector] about base 0, weighted 1 - alpha and alpha: alpha 0 and density 1 is the bare update."""
    sums = {
        "linear": {"normalize": False},
        "task_arithmetic": {},
        "ties": {"combine": "sum", "normalize": False, "density": 1.0},
        "dare": {"density": 1.0, "rescale": "none"},
        "breadcrumbs": {"density": 1.0, "gamma": 0.0},
    }
    for word, params in sums.items():
        method = Method.of(word)
        concrete = method.resolve(method.check(params, 2, weights=True, live=True), "w")
        stats = {}
        region = Region(torch.stack([A, B]), ZERO, torch.tensor([1.0, 0.0]), "w", (5,), step=3)
        for index in range(method.needed(concrete)):
            found = values(method.call_pass(index, region, concrete))
            stats = method.settle({**stats, **found}, concrete, region.weights)
            region = Region(region.tensors, ZERO, region.weights, "w", (5,), stats=stats, step=3)
        assert torch.equal(method.call(region, concrete).tensor, A), word


@pytest.mark.parametrize(("word", "params"), [("ties", {}), ("breadcrumbs", {"gamma": 0.0})])
def test_no_pass_is_made_where_everything_stays(word, params, monkeypatch):
    method = Method.of(word)
    everything = method.resolve(method.check({"density": [1.0, 1.0], **params}, 2), "w")
    assert method.needed(everything) == 0 and method.needed({**everything, "density": [1.0, 0.5]}) == 2
    quick = merge_tensors(word, [A, B], base=ZERO, density=1.0, **params)
    monkeypatch.setattr(Method, "needed", lambda self, params: 2)
    assert torch.equal(merge_tensors(word, [A, B], base=ZERO, density=1.0, **params), quick)
