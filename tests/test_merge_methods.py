"""The methods around directions, magnitudes, masks and columns, by hand and by their defining properties."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import tensor

from fusion.merge import merge_state_dicts, merge_tensors

CLOSE = {"atol": 1e-6, "rtol": 1e-6}
GOLDEN = Path(__file__).parent / "golden" / "merge_more"  # small tensors, some of models that hardly differ
AROUND = ("multislerp", "karcher", "nuslerp")  # with a base, what they do to task vectors


def close(actual, expected, **tolerance):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), **(tolerance or CLOSE))


def noise(seed, *shape, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def turned(a, degrees, seed=9, length=1.0):
    """A vector at this angle to a, of that many times its length, in float64."""
    a = a.double()
    side = noise(seed, len(a)).double()
    side -= a * (a @ side) / (a @ a)
    side *= a.norm() / side.norm()
    return (a * math.cos(math.radians(degrees)) + side * math.sin(math.radians(degrees))) * length


def degrees(a, b):
    a, b = a.double(), b.double()
    a, b = a / a.norm(), b / b.norm()
    return math.degrees(2 * math.asin(min(1.0, float((a - b).norm()) / 2)))


@pytest.mark.parametrize("case", json.loads(GOLDEN.with_suffix(".json").read_text())["cases"], ids=lambda c: c["id"])
def test_as_mergekit_computed(case):
    tensors = load_file(GOLDEN.with_suffix(".safetensors"))
    base = tensors["base"] if case["base"] else None
    models = [tensors[name] for name in case["models"]]
    out = merge_tensors(case["word"], models, base=base, weights=case["weights"], **case["params"])
    close(out, tensors[f"out/{case['id']}"])
    assert not torch.equal(out, tensors["base"])


# slerp, nuslerp, multislerp, karcher


def test_slerp_goes_along_the_arc_with_the_lengths_as_they_are():
    a, b = tensor([1.0, 0.0]), tensor([0.0, 2.0])  # 90 degrees: sin(60) a + sin(30) b at a third
    close(merge_tensors("slerp", [a, b], t=1 / 3), [math.sqrt(3) / 2, 1.0])
    close(merge_tensors("slerp", [a, b], t=0.0), a)
    close(merge_tensors("slerp", [a, b], t=1.0), b)


@pytest.mark.parametrize("angle", [1e-4, 0.005, 0.3, 40.0, 179.0])
def test_slerp_halves_the_angle_however_small(angle):
    a = noise(1, 50_000)
    b = turned(a, angle).float()
    half = merge_tensors("slerp", [a, b], t=0.5)
    assert degrees(a, half) == pytest.approx(degrees(a, b) / 2, rel=2e-3)
    assert float(half.norm()) == pytest.approx(float(a.norm()), rel=1e-5)


def test_slerp_takes_the_straight_line_where_there_is_no_shortest_arc():
    a = tensor([3.0, 4.0])
    for other in (-a, torch.zeros(2), 2 * a):
        close(merge_tensors("slerp", [a, other], t=0.25), 0.75 * a + 0.25 * other)


def test_slerp_as_mergekit_has_it_is_straight_above_a_cosine():
    a = tensor([1.0, 0.0])
    b = turned(a, 1.0, length=3.0).float()
    straight = merge_tensors("slerp", [a, b], t=0.25, lerp_above=0.9995)
    close(straight, 0.75 * a + 0.25 * b, atol=1e-7, rtol=1e-7)
    assert not torch.equal(straight, merge_tensors("slerp", [a, b], t=0.25))


def test_nuslerp_is_slerp_at_the_second_share():
    a, b, base = noise(1, 33), noise(2, 33), noise(3, 33)
    close(merge_tensors("nuslerp", [a, b], weights=[1.5, 0.5]), merge_tensors("slerp", [a, b], t=0.25))
    around = base + merge_tensors("slerp", [a - base, b - base], t=0.25)
    close(merge_tensors("nuslerp", [a, b], base=base, weights=[0.75, 0.25]), around)


def test_multislerp_and_karcher_differ_by_what_the_sphere_bends():
    # unit vectors 60 degrees apart, weights .2 and .8: the normalised mean lies at atan2(.8 sin 60, .2 + .8 cos 60)
    a, b = tensor([1.0, 0.0]), tensor([0.5, math.sqrt(3) / 2])
    mean = merge_tensors("multislerp", [a, b], weights=[0.2, 0.8])
    assert math.degrees(math.atan2(mean[1], mean[0])) == pytest.approx(49.107, abs=1e-3)
    mean = merge_tensors("karcher", [a, b], weights=[0.2, 0.8])
    assert math.degrees(math.atan2(mean[1], mean[0])) == pytest.approx(48.0, abs=1e-3)


def test_multislerp_by_hand():
    # (3 e1, 4 e2), equal weights: direction (1, 1)/sqrt 2, mean length 3.5
    close(merge_tensors("multislerp", [tensor([3.0, 0.0]), tensor([0.0, 4.0])]), [3.5 / math.sqrt(2)] * 2)


def test_karcher_of_equal_lengths_is_slerp():
    a = noise(1, 2000)
    b = turned(a, 70).float()
    for share in (0.5, 0.3):
        slerp = merge_tensors("slerp", [a, b], t=share)
        close(merge_tensors("karcher", [a, b], weights=[1 - share, share]), slerp, atol=2e-5, rtol=1e-4)


def test_karcher_is_where_the_logarithms_cancel():
    models = [noise(seed, 60).double() for seed in range(4)]
    w = tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    mean = merge_tensors("karcher", [m.float() for m in models], weights=w.tolist(), max_iter=100, tol=1e-12).double()
    close(mean.norm(), float(sum(x * m.norm() for x, m in zip(w, models))), rtol=1e-6, atol=0)
    u = mean / mean.norm()
    pull = torch.zeros_like(u)
    for share, model in zip(w, models):
        v = model / model.norm()
        theta = torch.acos(u @ v)
        pull += share * theta / torch.sin(theta) * (v - torch.cos(theta) * u)
    assert float(pull.norm()) < 1e-6


def test_karcher_stops_where_nothing_pulls():
    for tol in (0.0, 1e-5):
        close(merge_tensors("karcher", [torch.ones(3), 2 * torch.ones(3)], tol=tol), 1.5 * torch.ones(3))


def test_karcher_of_almost_equal_models_keeps_their_angles():
    a = noise(1, 20_000)
    b = turned(a, 0.002, seed=2).float()
    c = turned(a, 0.002, seed=3).float()
    mean = merge_tensors("karcher", [a, b, c], tol=1e-12)
    angles = [degrees(mean, x) for x in (a, b, c)]
    flat = [degrees((a.double() + b.double() + c.double()) / 3, x) for x in (a, b, c)]
    assert angles == pytest.approx(flat, rel=1e-2)


@pytest.mark.parametrize("method", AROUND)
def test_directions_that_cancel_or_vanish(method):
    a, zero = tensor([3.0, 4.0]), torch.zeros(2)
    close(merge_tensors(method, [a, -a]), zero)
    close(merge_tensors(method, [zero, zero]), zero)
    close(merge_tensors(method, [a, a], weights=[2.0, 5.0]), a)
    close(merge_tensors(method, [a, zero]), a / 2)  # no direction of its own, half the length
    base = tensor([1.0, -1.0])
    close(merge_tensors(method, [a + base, base - a], base=base), base)
    with pytest.raises(ValueError, match="add up to 0"):
        merge_tensors(method, [a, 2 * a], weights=[1.0, -1.0])


@pytest.mark.parametrize("method", AROUND)
def test_directions_take_weights_of_any_sign_and_sum(method):
    a, b = noise(1, 40), noise(2, 40)
    close(merge_tensors(method, [a, b], weights=[3.0, 1.0]), merge_tensors(method, [a, b], weights=[0.75, 0.25]))
    assert torch.isfinite(merge_tensors(method, [a, b], weights=[2.0, -1.0])).all()


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_one_model_is_its_own_mean(method):
    a, base = noise(1, 40), noise(2, 40)
    close(merge_tensors(method, [a], weights=[0.3]), a)
    close(merge_tensors(method, [a], base=base), a)


@pytest.mark.parametrize("method", ["slerp", "nuslerp", "nearswap"])
def test_two_models_exactly(method):
    params = {} if method == "nuslerp" else {"t": 0.5}
    with pytest.raises(ValueError, match="2"):
        merge_tensors(method, [noise(i, 4) for i in range(3)], **params)


# model_stock, nearswap, expo


def test_model_stock_by_hand():
    base = tensor([1.0, 1.0])
    d = [tensor([1.0, 0.0]), tensor([1.0, 1.0])]  # 45 degrees: s = 2 c / (1 + c)
    s = math.sqrt(2) / (1 + math.sqrt(0.5))
    close(merge_tensors("model_stock", [base + x for x in d], base=base), [1 + s * 1.0, 1 + s * 0.5])


def test_model_stock_ends():
    base, x = tensor([1.0, 2.0, 3.0]), tensor([0.5, -0.25, 1.0])
    close(merge_tensors("model_stock", [base + x], base=base), base + x)  # one model
    close(merge_tensors("model_stock", [base + x] * 3, base=base), base + x)  # identical ones
    close(merge_tensors("model_stock", [base + x, base - x], base=base), base)  # cancelling ones
    close(merge_tensors("model_stock", [base + x, base], base=base), base)  # a zero task vector: cosine 0
    side = tensor([0.25, 0.5, 0.0])
    close(merge_tensors("model_stock", [base + x, base + side], base=base), base)  # right angle


def test_model_stock_with_mergekits_floor_shrinks_small_task_vectors():
    # lengths 1e-4 at cosine 1: the product 1e-8 counts as 1e-6, the cosine as 0.01
    base, x = torch.zeros(4), tensor([1e-4, 0.0, 0.0, 0.0])
    close(merge_tensors("model_stock", [x, x], base=base), x)
    close(merge_tensors("model_stock", [x, x], base=base, norm_floor=1e-6), x * (0.02 / 1.01), atol=1e-12, rtol=1e-4)


def test_nearswap_by_hand():
    a, b = tensor([0.0, 0.0, 1.0, 5.0]), tensor([0.05, 1.0, -1.0, 5.0])
    close(merge_tensors("nearswap", [a, b], t=0.1), [0.05, 0.1, 0.9, 5.0])
    weight = (0.1 / (a - b).abs()).clamp(0, 1).nan_to_num(0.0)
    close(merge_tensors("nearswap", [a, b], t=0.1), weight * b + (1 - weight) * a)
    close(merge_tensors("nearswap", [a, b], t=0.0), a)
    with pytest.raises(ValueError, match="0 or more"):
        merge_tensors("nearswap", [a, b], t=-1.0)


def test_expo_goes_beyond_the_aligned_model():
    aligned, sft = tensor([2.0, 1.0]), tensor([1.0, 3.0])
    close(merge_tensors("expo", [aligned], base=sft, alpha=0.5), [2.5, 0.0])
    close(merge_tensors("expo", [aligned], base=sft, alpha=0.0), aligned)


# varm, sce, ram, magmax, emr, consensus


def test_varm_weighs_by_squared_change():
    base = tensor([1.0, 0.0])
    a, b = base + tensor([1.0, 0.0]), base + tensor([0.0, 3.0])  # weights 1/10 and 9/10
    close(merge_tensors("varm", [a, b], base=base), [1.1, 2.7])
    close(merge_tensors("varm", [base, base], base=base), base)
    close(merge_tensors("varm", [a, base], base=base), a)


SCE = ([tensor([1.0, 4.0, -1.0, 2.0]), tensor([3.0, 2.0, 1.0, 2.0])], torch.zeros(4))


def test_sce_by_hand():
    # variances 1, 1, 1, 0: of the 3 above 0 the top half is one, and the other two tie with it. Weights from the first
    # three entries: 1 + 16 + 1 to 9 + 4 + 1, 18 : 14. Entry 2 sums to 0, which elects +; entry 3 is not selected
    models, base = SCE
    close(merge_tensors("sce", models, base=base, select_topk=0.5), [60 / 32, 100 / 32, 1.0, 2.0])
    close(merge_tensors("sce", models, base=base, select_topk=0.5, variant="mergekit"), [60 / 32, 100 / 32, 1.0, 0.0])
    # all selected: 22 : 18
    close(merge_tensors("sce", models, base=base, select_topk=1.0), [76 / 40, 124 / 40, 1.0, 2.0])


def test_sce_selects_by_variance():
    # variances .01, 4, 1 over two models (mean 0): one of three is the second, weights 2^2 : 2^2
    models = [tensor([0.1, 2.0, 1.0, 0.0]), tensor([-0.1, -2.0, -1.0, 0.0])]
    base = torch.zeros(4)
    close(merge_tensors("sce", models, base=base, select_topk=0.4, variant="mergekit"), [0.0, 2.0, 0.0, 0.0])


def test_sce_keeps_small_changes_apart_where_mergekit_counts_them_equal():
    base = torch.zeros(1000)
    a, b = noise(1, 1000, scale=2e-4).abs(), noise(2, 1000, scale=4e-4).abs()
    w = (a.square().mean() / (a.square().mean() + b.square().mean())).item()
    assert w == pytest.approx(0.2, abs=0.02)
    close(merge_tensors("sce", [a, b], base=base), w * a + (1 - w) * b, atol=1e-9, rtol=1e-5)
    close(merge_tensors("sce", [a, b], base=base, variant="mergekit"), (a + b) / 2, atol=1e-9, rtol=1e-5)


@pytest.mark.parametrize("variant", ["fusechat", "mergekit"])
def test_sce_ends(variant):
    base, a = noise(1, 30), noise(2, 30)
    close(merge_tensors("sce", [a, a], base=base, variant=variant), a)
    close(merge_tensors("sce", [a], base=base, variant=variant), a)
    close(merge_tensors("sce", [base, base], base=base, variant=variant, select_topk=0.1), base)
    with pytest.raises(ValueError, match="mergekit"):
        merge_tensors("sce", [a], base=base, variant="mergkit")


RAM = [tensor([1.0, 0.0, 2.0, 4.0, 1e-6]), tensor([0.0, 3.0, 0.0, -2.0, 0.0])]


def test_ram_averages_only_what_is_shared():
    close(merge_tensors("ram", RAM, base=torch.zeros(5)), [1.0, 3.0, 2.0, 1.0, 0.0])


def test_ram_plus_lifts_what_is_unique():
    # model 1 shares 1 entry and has 2 to itself, model 2 shares 1 and has 1: overlaps 1/2 and 1, clipped to alpha
    base = torch.zeros(5)
    close(merge_tensors("ram", RAM, base=base, r=0.1), [1.02, 3.06, 2.04, 1.0, 0.0])
    close(merge_tensors("ram", RAM, base=base, r=0.1, alpha=0.8), [1.05, 3.24, 2.1, 1.0, 0.0])


def test_ram_counts_over_the_whole_model_when_asked():
    dicts = [{"a": RAM[0], "b": tensor([0.0, 1.0])}, {"a": RAM[1], "b": tensor([5.0, 0.0])}]
    base = {"a": torch.zeros(5), "b": torch.zeros(2)}
    out = merge_state_dicts("ram", dicts, base=base, r=0.1, alpha=1.0, scope="model")  # overlaps 1/3 and 1/2
    close(out["b"], [5.25, 1 + 0.1 / 3])
    with pytest.raises(ValueError, match="scope"):
        merge_tensors("ram", RAM, base=torch.zeros(5), scope="tensors")


def test_magmax_takes_the_largest_change():
    base = tensor([1.0, 1.0, 1.0])
    models = [base + tensor([1.0, -3.0, 2.0]), base + tensor([-2.0, 1.0, -2.0])]
    close(merge_tensors("magmax", models, base=base, scale=1.0), [-1.0, -2.0, 3.0])
    close(merge_tensors("magmax", models, base=base), [0.0, -0.5, 2.0])


def test_emr_elects_masks_and_rescales():
    base = tensor([1.0, 1.0, 1.0, 1.0])
    d = torch.stack([tensor([1.0, -3.0, 2.0, 1.0]), tensor([2.0, 1.0, 0.0, -1.0])])
    out = merge_tensors("emr", list(base + d), base=base, outputs=True)
    tau = tensor([2.0, -3.0, 2.0, 0.0])  # the last cancels: no sign
    close(out.tensor, base + tau)
    assert out.extras["masks"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]] and out.extras["masks"].dtype == torch.uint8
    close(out.extras["delta_l1"].value, [7.0, 4.0])
    close(out.extras["masked_l1"].value, [7.0, 2.0])


def test_emr_of_one_model_gives_it_back():
    base, a = noise(1, 50), noise(2, 50)
    out = merge_tensors("emr", [a], base=base, outputs=True)
    close(out.tensor, a)
    close(out.extras["delta_l1"].value / out.extras["masked_l1"].value, [1.0])


def test_consensus_keeps_what_enough_models_use():
    base = torch.zeros(4)
    models = [tensor([1.0, 2.0, 0.1, 1.0]), tensor([1.0, 0.0, 1.0, -1.0]), tensor([1.0, 0.0, 1.0, 0.0])]
    # tau = 3, 2, 2.1, 0. Entry 0: 1 > ratio * 2 for all at .4, for none at .6; 1: the first alone; 2: the last two;
    # 3: 1 > ratio * 1 for the first two, but they cancel
    out = merge_tensors("consensus", models, base=base, ratio=0.4, outputs=True)
    close(out.tensor, [3.0, 0.0, 2.1, 0.0])
    assert out.extras["kept"].value.tolist() == [2, 3, 2]
    close(merge_tensors("consensus", models, base=base, ratio=0.6), [0.0, 0.0, 2.1, 0.0])
    close(merge_tensors("consensus", models, base=base, ratio=0.6, agree=1, scale=0.5), [0.0, 1.0, 1.05, 0.0])
    with pytest.raises(ValueError, match="agree"):
        merge_tensors("consensus", models[:1], base=base)


# arcee_fusion, pcb


def test_arcee_fusion_keeps_important_changes():
    base = noise(1, 8, 5)
    model = base + noise(2, 8, 5, scale=0.1)
    p, q = torch.log_softmax(model.double(), 1), torch.log_softmax(base.double(), 1)
    importance = (model - base).abs().double() * (p.exp() * (p - q)).sum(1, keepdim=True)
    low, middle, high = (importance.flatten().sort().values[k] for k in (9, 19, 29))  # floor(q * 39)
    expected = torch.where(importance >= middle + 1.5 * (high - low), model, base)
    assert not torch.equal(expected, base) and not torch.equal(expected, model)
    close(merge_tensors("arcee_fusion", [model], base=base), expected)
    close(merge_tensors("arcee_fusion", [base], base=base), base)


def pcb_reference(d, form, density, clip):
    """As defined, on (K, n) float64."""
    size, absolute = d.abs(), d.abs().sort(1).values
    n = d.shape[1]
    cut = int(clip * n)
    low, high = absolute[:, cut : cut + 1], absolute[:, n - cut - 1 : n - cut]
    size = (size.clamp(low, high) - low) / (high - low)
    signed = size * d.sign()
    inter = torch.tanh(d * d.sum(0))
    if form == "vision":
        inter = torch.tanh(signed.unsqueeze(0) * signed.unsqueeze(1)).sum(1)
    balance = (torch.exp(len(d) * size**2) * inter).clamp(min=0)
    floor = balance.sort(1, descending=True).values[:, int(density * n) - 1].unsqueeze(1)
    share = ((balance - floor) / (balance.amax(1, keepdim=True) - floor)).clamp(min=0)
    return share, (d * share).sum(0) / share.sum(0).where(share.sum(0) > 0, 1.0)


@pytest.mark.parametrize("form", ["nlp", "vision"])
def test_pcb_over_the_whole_model(form):
    shapes = {"b": (37,), "a": (9, 11)}
    dicts = [{name: noise(10 * t + len(shape), *shape) for name, shape in shapes.items()} for t in range(3)]
    base = {name: noise(99 + len(shape), *shape) for name, shape in shapes.items()}
    d = torch.stack([torch.cat([(one[k] - base[k]).flatten() for k in shapes]) for one in dicts]).double()
    _, tau = pcb_reference(d, form, 0.3, 0.05)
    out = merge_state_dicts("pcb", dicts, base=base, form=form, density=0.3, clip=0.05, scale=1.5)
    merged = torch.cat([(out[k] - base[k]).flatten() for k in shapes])
    close(merged, 1.5 * tau, atol=2e-5, rtol=1e-3)


def test_pcb_is_of_the_whole_model_and_says_so():
    with pytest.raises(ValueError, match="model"):
        merge_tensors("pcb", [noise(1, 5)], base=noise(2, 5))
    base = {"a": noise(1, 50)}
    close(merge_state_dicts("pcb", [base, base], base=base)["a"], base["a"])


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("sce", {"select_topk": 1.5}),
        ("sce", {"select_topk": -0.1}),
        ("pcb", {"density": 2.0}),
        ("pcb", {"clip": 0.6}),
        ("karcher", {"max_iter": -1}),
        ("karcher", {"tol": -1.0}),
        ("cabs", {"density": [0.5, 1.5]}),
        ("consensus", {"ratio": -1.0}),
    ],
)
def test_shares_outside_their_range_are_refused(method, params):
    base = {"a": noise(1, 20)}
    with pytest.raises(ValueError, match=next(iter(params))):
        merge_state_dicts(method, [{"a": noise(2, 20)}, {"a": noise(3, 20)}], base=base, **params)


# mod_param, widen, cabs


def test_mod_param_chooses_by_where_the_first_models_weight_lies():
    a, b, base = tensor([0.0, 5.0, 9.0, 10.0]), tensor([1.0, 2.0, 3.0, 4.0]), tensor([7.0] * 4)
    out = merge_tensors("mod_param", [a, b], base=base, name="model.layers.0.mlp.up_proj.weight")
    assert out.tolist() == [0.0, 5.0, 3.0, 4.0]  # 0.9 is not below the threshold
    out = merge_tensors("mod_param", [a, b], base=base, name="layers.0.mlp.up_proj.weight", threshold=1.0)
    assert out.tolist() == [0.0, 5.0, 9.0, 4.0]  # the largest element alone
    assert torch.equal(merge_tensors("mod_param", [a, b], base=base, name="model.norm.weight"), base)
    constant = torch.ones(4)
    assert torch.equal(merge_tensors("mod_param", [constant, b], base=base, name="mlp"), constant)


def test_widen_of_a_vector_by_hand():
    base = torch.zeros(2)
    models = [tensor([1.0, 2.0]), tensor([4.0, -3.0])]
    # ranks / 2: (0, .5) and (.5, 0), mean .25: the larger of each model is calibrated to 1, the smaller is a softmax
    soft = 1 / (1 + math.exp(0.5))
    close(merge_tensors("widen", models, base=base), [soft * 1 + 4, 2 - 3 * soft])
    close(merge_tensors("widen", models, base=base, ratio=9.0), [soft + 4 * (1 - soft), 2 * (1 - soft) - 3 * soft])


def test_widen_of_a_matrix_by_hand():
    base = torch.eye(2)
    longer = tensor([[3.0, 0.0], [0.0, 1.0]])  # column 0 grew, no direction turned
    turned = tensor([[1.0, 1.0], [0.0, 0.0]])  # column 1 turned by 90 degrees, no length changed
    # column 0 of `longer`: its length ranks above the mean and scores 1, its direction ties with the other's: 1/2.
    # column 1 of `turned` ranks second in length (a tie, by order) and in direction: both score 1
    first = (1 + 0.5) / 2
    close(merge_tensors("widen", [longer, turned], base=base, name="w"), [[1 + 2 * first, 1.0], [0.0, 0.0]])
    rows = merge_tensors("widen", [longer.T, turned.T], base=base, name="model.embed_tokens.weight")
    close(rows, tensor([[1 + 2 * first, 1.0], [0.0, 0.0]]).T)


def test_widen_ends():
    base, a = noise(1, 6, 4), noise(2, 6, 4)
    close(merge_tensors("widen", [a], base=base), a)
    close(merge_tensors("widen", [base, base], base=base), base)
    zeros = torch.zeros(6, 4)
    assert torch.isfinite(merge_tensors("widen", [a, zeros], base=zeros)).all()
    conv = noise(3, 4, 3, 2, 2)
    close(merge_tensors("widen", [conv], base=torch.zeros_like(conv)), conv)


def test_cabs_never_keeps_a_weight_twice():
    base = torch.zeros(8)
    a = tensor([4.0, 3.0, 2.0, 1.0, 1.0, 1.0, 5.0, 0.0])
    b = tensor([9.0, 8.0, 1.0, 7.0, 0.0, 0.0, 6.0, 3.0])
    # 2:4 of a: entries 0, 1 and 6, 4 (the first of those that tie); of what is left of b: 3, 2 and 7
    out = merge_tensors("cabs", [a, b], base=base, weights=[1.0, 10.0], density=0.5, block=4, outputs=True)
    close(out.tensor, [4.0, 3.0, 10.0, 70.0, 1.0, 0.0, 5.0, 30.0])
    assert out.extras["kept"].value.tolist() == [4, 3]
    # by magnitude over the tensor: a keeps 6, 0; b of the others 1, 3
    close(merge_tensors("cabs", [a, b], base=base, density=0.25, block=0), [4.0, 8.0, 0.0, 7.0, 0.0, 0.0, 5.0, 0.0])


def test_cabs_ends():
    base, a, b = noise(1, 7, 3), noise(2, 7, 3), noise(3, 7, 3)
    for block in (0, 4, 256):
        close(merge_tensors("cabs", [a], base=base, density=1.0, block=block), a)
        close(merge_tensors("cabs", [a, b], base=base, density=[0.0, 1.0], block=block), b)
        close(merge_tensors("cabs", [base, base], base=base, block=block), base)
    with pytest.raises(ValueError, match="block"):
        merge_tensors("cabs", [a], base=base, block=-1)


def test_cabs_blocks_do_not_depend_on_how_many_are_sorted_at_a_time():
    from fusion.merge import cabs

    x = noise(1, 4 * cabs.PIECE * 2 + 3).abs()
    mask = cabs._largest(x, 0.5, 4)
    whole = mask[:-3].view(-1, 4)
    assert (whole.sum(1) == 2).all() and mask[-3:].sum() == 1
    assert torch.equal(whole, x[:-3].view(-1, 4).argsort(1, descending=True).argsort(1) < 2)
