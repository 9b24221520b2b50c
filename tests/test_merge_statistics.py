"""Methods fed with statistics: by hand, against a dense solver, and where a statistic is missing."""

import pytest
import torch
from torch import tensor

from fusion.merge import merge_state_dicts, merge_tensors

CLOSE = {"atol": 1e-6, "rtol": 1e-5}


def close(actual, expected, **tolerance):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), **(tolerance or CLOSE))


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gram_of(seed, n, rows=None):
    x = noise(seed, rows or 4 * n, n)
    return x.mT @ x / len(x)


# Fisher


def fisher(tensors, fishers, **given):
    return merge_tensors("fisher", tensors, inputs={"fisher": fishers}, scope="tensor", **given)


def test_fisher_by_hand():
    models = [tensor([1.0, 1.0, 1.0]), tensor([5.0, 5.0, 5.0])]
    fishers = [tensor([3.0, 0.0, 0.0]), tensor([1.0, 2.0, 0.0])]
    plain = fisher(models, fishers, normalize=False, floor=0.0)
    close(plain, [2.0, 5.0, 3.0])  # no information at all: the mean
    close(fisher(models, fishers, normalize=False, floor=0.0, weights=[1, 3]), [3.0, 5.0, 4.0])
    close(fisher(models, fishers, normalize=False, floor=1.0), [(4 + 10) / 6, (1 + 15) / 4, 3.0])
    # |F| = 3 and sqrt(5)
    share = 5**-0.5
    close(fisher(models, fishers, normalize=True, floor=0.0), [(1 + 5 * share) / (1 + share), 5.0, 3.0])


def test_fisher_normalises_by_the_whole_model():
    models = [{"a": tensor([1.0]), "b": tensor([1.0])}, {"a": tensor([2.0]), "b": tensor([2.0])}]
    fishers = [{"a": tensor([3.0]), "b": tensor([4.0])}, {"a": tensor([1.0]), "b": tensor([0.0])}]  # norms 5 and 1
    merged = merge_state_dicts("fisher", models, inputs={"fisher": fishers}, floor=0.0)
    close(merged["a"], [(0.6 * 1 + 1 * 2) / 1.6])
    close(merged["b"], [1.0])
    with pytest.raises(ValueError, match="merge_state_dicts gives it that"):
        merge_tensors("fisher", [m["a"] for m in models], inputs={"fisher": [f["a"] for f in fishers]})


def test_fisher_of_any_size_and_one_model():
    one, other, information = noise(1, 40), noise(2, 40), noise(3, 40).square()
    close(fisher([one], [information]), one)
    tiny = [information * 1e-30, noise(4, 40).square() * 1e-30]  # squares of these are no float32
    large = [1e30 * part for part in tiny]
    close(fisher([one, other], tiny, floor=0.0), fisher([one, other], large, floor=0.0), atol=1e-5, rtol=1e-5)
    close(fisher([one, other], [information, torch.zeros(40)], floor=0.0), one)


# RegMean


def regmean(tensors, grams, **given):
    return merge_tensors("regmean", tensors, inputs={"gram": grams}, **given)


def test_regmean_by_hand():
    # one output, two inputs: model 0 was fed (1, 0) alone and model 1 (0, 1) alone
    grams = [torch.diag(tensor([1.0, 0.0])), torch.diag(tensor([0.0, 1.0]))]
    close(regmean([tensor([[1.0, 2.0]]), tensor([[3.0, 4.0]])], grams), [[1.0, 4.0]])


@pytest.mark.parametrize("off_diagonal", [1.0, 0.9, 0.0])
def test_regmean_is_its_formula(off_diagonal):
    tensors, grams = [noise(t, 4, 6) for t in range(3)], [gram_of(9 + t, 6) for t in range(3)]
    weights = [0.5, 0.3, 0.2]
    eye = torch.eye(6)
    shrunk = [w * (g * eye + off_diagonal * g * (1 - eye)).double() for w, g in zip(weights, grams)]
    expected = sum(w.double() @ g for w, g in zip(tensors, shrunk)) @ sum(shrunk).inverse()
    close(regmean(tensors, grams, off_diagonal=off_diagonal, weights=weights), expected.float())


def test_regmean_fits_both_models_outputs_best():
    inputs = [noise(t, 50, 6) for t in range(2)]
    tensors = [noise(5 + t, 3, 6) for t in range(2)]
    targets = torch.cat([x @ w.mT for x, w in zip(inputs, tensors)])
    best = torch.linalg.lstsq(torch.cat(inputs), targets).solution.mT
    close(regmean(tensors, [x.mT @ x for x in inputs], off_diagonal=1.0), best, atol=1e-5, rtol=1e-5)


def test_regmean_of_equal_grams_or_a_large_ridge_is_the_mean():
    tensors, gram = [noise(t, 4, 6) for t in range(3)], gram_of(9, 6)
    close(regmean(tensors, [gram] * 3), sum(tensors) / 3)
    far = regmean(tensors, [gram_of(9 + t, 6) for t in range(3)], ridge=1e6)
    close(far, sum(tensors) / 3, atol=1e-5, rtol=0)


def test_regmean_keeps_the_mean_where_nobody_looked():
    directions = torch.linalg.qr(noise(1, 6, 6)).Q
    seen, unseen = directions[:, :4], directions[:, 4:]
    tensors = [noise(t, 3, 6) for t in range(2)]
    grams = [seen @ gram_of(7 + t, 4) @ seen.mT for t in range(2)]
    merged = regmean(tensors, grams, off_diagonal=1.0)
    expected = sum(w @ g for w, g in zip(tensors, grams))
    close(merged @ sum(grams), expected, atol=1e-5, rtol=1e-5)  # the normal equations hold
    assert bool(merged.isfinite().all()) and float((merged @ unseen).abs().max()) < 10
    dead = [torch.diag(tensor([1.0, 0.0])), torch.diag(tensor([3.0, 0.0]))]
    close(regmean([tensor([[1.0, 2.0]]), tensor([[3.0, 4.0]])], dead, off_diagonal=1.0), [[2.5, 3.0]])


def test_regmean_judges_each_channel_on_its_own_scale():
    scale = torch.logspace(0, 5, 6)  # activations that differ by five decades, Gram entries by ten
    tensors = [noise(t, 3, 6) for t in range(2)]
    grams = [gram_of(7 + t, 6) for t in range(2)]
    merged = regmean(tensors, grams, off_diagonal=1.0)
    scaled = [g * scale * scale[:, None] for g in grams]
    close(regmean([w / scale for w in tensors], scaled, off_diagonal=1.0) * scale, merged, atol=1e-4, rtol=1e-4)


def test_regmean_averages_what_has_no_gram():
    models = [{"w": noise(t, 3, 4), "norm": noise(t, 4)} for t in range(2)]
    grams = [{"w": gram_of(t, 4)} for t in range(2)]
    merged = merge_state_dicts("regmean", models, inputs={"gram": grams}, weights=[1, 3])
    close(merged["norm"], (models[0]["norm"] + 3 * models[1]["norm"]) / 4)


# MaTS


def mats(tensors, mode, given=None, **inputs):
    return merge_tensors("mats", tensors, mode=mode, inputs=inputs, tolerance=1e-9, **(given or {}))


def test_mats_is_the_other_methods_where_they_coincide():
    tensors, grams = [noise(t, 4, 6) for t in range(3)], [gram_of(9 + t, 6) for t in range(3)]
    fishers = [noise(20 + t, 4, 6).square() for t in range(3)]
    close(mats(tensors, "identity"), sum(tensors) / 3)
    close(
        mats(tensors, "gram", {"off_diagonal": 0.9}, gram=grams), regmean(tensors, grams, off_diagonal=0.9), atol=1e-5,
        rtol=1e-5,
    )  # fmt: skip
    plain = fisher(tensors, fishers, normalize=False, floor=0.0)
    close(mats(tensors, "diagonal", {"iterations": 500}, fisher=fishers), plain, atol=1e-4, rtol=1e-4)


def test_mats_with_both_sides_solves_the_kronecker_system():
    tensors = [noise(t, 4, 5) for t in range(3)]
    rights, lefts = [gram_of(9 + t, 5) for t in range(3)], [gram_of(30 + t, 4) for t in range(3)]
    weights = [0.5, 0.3, 0.2]
    system = sum(w * torch.kron(a.double(), b.double()) for w, a, b in zip(weights, lefts, rights))
    side = sum(w * a.double() @ t.double() @ b.double() for w, a, t, b in zip(weights, lefts, tensors, rights))
    expected = torch.linalg.solve(system, side.flatten()).view(4, 5)
    merged = mats(tensors, "kronecker", {"weights": weights}, gram=rights, output_gram=lefts)
    close(merged, expected.float(), atol=1e-5, rtol=1e-5)


def test_mats_averages_what_is_no_matrix_and_what_it_is_told_to():
    models = [{"embed.weight": noise(t, 3, 4), "norm": noise(t, 4), "w": noise(t, 2, 4)} for t in range(2)]
    grams = [{"w": gram_of(t, 4)} for t in range(2)]
    mode = {"match": {"*embed*": "identity", "*": "gram"}}
    merged = merge_state_dicts("mats", models, inputs={"gram": grams}, mode=mode, weights=[1, 3])
    for name in ("embed.weight", "norm"):
        close(merged[name], (models[0][name] + 3 * models[1][name]) / 4)
    with pytest.raises(ValueError, match="'embed.weight' has no statistic 'gram'"):
        merge_state_dicts("mats", models, inputs={"gram": grams})


def test_mats_goes_from_the_mean_as_far_as_its_iterations():
    tensors, grams = [noise(t, 4, 6) for t in range(2)], [gram_of(9 + t, 6) for t in range(2)]
    solution = mats(tensors, "gram", gram=grams)
    errors = [
        float((mats(tensors, "gram", {"iterations": n}, gram=grams) - solution).norm()) for n in (0, 1, 3, 30)
    ]  # fmt: skip
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-5
    close(mats(tensors, "gram", {"iterations": 0}, gram=grams), sum(tensors) / 2)
    close(mats([tensors[0]], "gram", gram=grams[:1]), tensors[0])


# uncertainty


def uncertainty(tensors, base, fishers, given=None, **inputs):
    return merge_tensors("uncertainty", tensors, base=base, inputs={"fisher": fishers, **inputs}, **(given or {}))


def test_uncertainty_by_hand():
    base, models = torch.zeros(3), [tensor([1.0, 1.0, 1.0]), tensor([2.0, 2.0, 2.0])]
    fishers = [tensor([3.0, 0.0, 0.0]), tensor([1.0, 1.0, 0.0])]
    close(uncertainty(models, base, fishers, {"prior": 0.0}), [5 / 4, 2.0, 3.0])
    # H_0 = 1: (4 * 1 + 2 * 2) / 5, (1 * 1 + 2 * 2) / 2, (1 + 2) / 1
    close(uncertainty(models, base, fishers, {"prior": 1.0}), [8 / 5, 5 / 2, 3.0])
    own = uncertainty(models, base, fishers, {"prior": 0.0}, base_fisher=[torch.ones(3)] * 2)
    close(own, [8 / 5, 5 / 2, 3.0])
    # weights: H = 1 + 0.5 * 3 + 0.5 * 1, parts 0.5 * 4 * 1 + 0.5 * 2 * 2
    close(uncertainty(models, base, fishers, {"prior": 1.0, "weights": [0.5, 0.5]})[0], 4 / 3)
    close(uncertainty(models, base, fishers, {"prior": 1.0, "scale": 0.5}), [4 / 5, 5 / 4, 3 / 2])


def test_uncertainty_of_one_model_is_itself_and_with_a_sure_base_task_arithmetic():
    base, one, other, information = noise(0, 30), noise(1, 30), noise(2, 30), noise(3, 30).square()
    close(uncertainty([one], base, [information]), one)
    sure = uncertainty([one, other], base, [information, information * 2], {"prior": 1e8})
    close(sure, one + other - base, atol=1e-5, rtol=1e-5)
    negative = uncertainty([one, other], base, [information, information * 2], {"weights": [1, -1]})
    assert bool(negative.isfinite().all())


# one for all


@pytest.mark.parametrize(
    ("word", "given", "sentence"),
    [
        ("fisher", {"inputs": {"fisher": [torch.ones(2, 2), -torch.ones(2, 2)]}, "scope": "tensor"},
         "'fisher' of 'w' in model 1 has negative"),
        ("fisher", {"inputs": {"fisher": [torch.full((2, 2), torch.nan), torch.ones(2, 2)]}, "scope": "tensor"},
         "'fisher' of 'w' in model 0 has negative entries, or infinity or NaN"),
        ("fisher", {"inputs": {"fisher": [torch.ones(2, 2)] * 2}, "scope": "tensor", "floor": -1.0}, "floor is -1"),
        ("fisher", {"inputs": {"fisher": [torch.ones(2, 2)] * 2}, "scope": "tensor", "weights": [1, -1]},
         "no weight may be negative"),
        ("fisher", {"inputs": {"fisher": [torch.ones(2, 2), None]}, "scope": "tensor"}, "'w'.*model 1 has none"),
        ("regmean", {"inputs": {"gram": [torch.ones(2, 2), None]}}, "'w' has the statistic 'gram'.* not in model 1"),
        ("regmean", {"inputs": {"gram": [torch.ones(3, 3)] * 2}}, r"\(3, 3\); \(2, 2\) is needed"),
        ("regmean", {"inputs": {"gram": [torch.eye(2), torch.full((2, 2), torch.nan)]}},
         "'gram' of 'w' in model 1 has infinity or NaN"),
        ("regmean", {}, "reads the statistic 'gram' of each model"),
        ("regmean", {"inputs": {"gram": [torch.eye(2)] * 2}, "off_diagonal": 2.0}, "allowed are 0 to 1"),
        ("regmean", {"inputs": {"gram": [torch.eye(2)] * 2}, "weights": [0, 0]}, "not all 0"),
        ("mats", {}, "'w' has no statistic 'gram', which is needed here; mode: {match: {'w': identity"),
        ("mats", {"mode": "diagonal", "inputs": {"fisher": [None, None]}}, "'w' has no statistic 'fisher'"),
        ("mats", {"mode": "diagonal", "inputs": {"fisher": [torch.ones(3)] * 2}}, r"\(2, 2\) is needed"),
        ("mats", {"mode": "kronecker", "inputs": {"gram": [torch.eye(2)] * 2, "output_gram": [None, None]}},
         "'w' has no statistic 'output_gram'"),
        ("mats", {"iterations": -1}, "iterations -1"),
        ("uncertainty", {"inputs": {"fisher": [torch.ones(2, 2)] * 2}, "prior": -1.0}, "prior is -1"),
        ("uncertainty", {}, "reads the statistic 'fisher' of each model"),
    ],
)  # fmt: skip
def test_bad_input_gets_a_sentence(word, given, sentence):
    with pytest.raises(ValueError, match=sentence):
        merge_tensors(word, [noise(1, 2, 2), noise(2, 2, 2)], base=noise(3, 2, 2), name="w", **given)


def test_fisher_without_normalize_is_of_one_tensor():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 6.0])
    f = [torch.tensor([1.0, 3.0]), torch.tensor([1.0, 1.0])]
    got = merge_tensors("fisher", [a, b], inputs={"fisher": f}, normalize=False, floor=0.0)
    assert torch.allclose(got, torch.tensor([2.0, 3.0]))
