"""What follows a merge, by hand."""

import pytest
import torch

from fusion.merge import merge_state_dicts
from fusion.post.aim import aim
from fusion.post.lines import lines
from fusion.post.repair import repair

BASE, MERGED = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([2.0, 4.0, 2.0, 4.0])


@pytest.mark.parametrize(
    ("name", "layer", "params", "share"),
    [
        ("model.layers.0.w", (0, 5), {"alpha": 0.2}, 0.2),
        ("model.layers.1.w", (1, 5), {"alpha": 0.2}, 0.4),  # beta is 1 - alpha
        ("model.layers.4.w", (4, 5), {"alpha": 0.2}, 1.0),
        ("model.layers.3.w", (3, 5), {"alpha": 0.1, "beta": 0.4}, 0.4),
        ("model.layers.0.w", (0, 1), {"alpha": 0.3}, 0.3),  # a single layer
        ("model.embed_tokens.weight", None, {"alpha": 0.3}, 0.3),
        ("embed_out.weight", None, {"alpha": 0.3}, 1.0),
        ("transformer.wte.weight", None, {"alpha": 0.3, "beta": 0.2}, 0.3),
        ("model.norm.weight", None, {"alpha": 0.3, "beta": 0.2}, 0.5),
        ("lm_head.weight", None, {"alpha": 0.3}, 1.0),
        ("lm_head.weight", None, {"alpha": 0.3, "outside": "alpha"}, 0.3),
    ],
)
def test_lines_scales_by_depth(name, layer, params, share):
    out = lines(MERGED, BASE, name=name, layer=layer, **params)
    torch.testing.assert_close(out, BASE + share * (MERGED - BASE))


def test_lines_follows_a_merge():
    names = ["model.embed_tokens.weight", "model.layers.0.w", "model.layers.1.w", "model.layers.2.w", "lm_head.weight"]
    base = dict.fromkeys(names, BASE)
    model = dict.fromkeys(names, MERGED)
    out = merge_state_dicts("task_arithmetic", [model], base=base, post=[{"lines": {"alpha": 0.2}}])
    for name, share in zip(names, (0.2, 0.2, 0.6, 1.0, 1.0), strict=True):
        torch.testing.assert_close(out[name], BASE + share * (MERGED - BASE))
    with pytest.raises(ValueError, match="base"):
        merge_state_dicts("linear", [model], post=[{"lines": {"alpha": 0.2}}])
    with pytest.raises(ValueError, match="outside"):
        merge_state_dicts("linear", [model], base=base, post=[{"lines": {"alpha": 0.2, "outside": "head"}}])


def test_aim_relaxes_columns_by_their_activations():
    a = torch.tensor([1.0, 4.0])
    out = aim(MERGED, BASE, inputs={"activations": a}, shape=(2, 2), omega=0.4)
    # r = 1 - .6 * .25 and 1 - .6
    torch.testing.assert_close(out, torch.tensor([1 + 0.85, 2 + 0.8, 3 - 0.85, 4.0]))
    torch.testing.assert_close(aim(MERGED, BASE, inputs={"activations": a}, shape=(2, 2), omega=1.0), MERGED)
    # any number of whole rows
    rows = aim(MERGED[2:], BASE[2:], inputs={"activations": a}, shape=(2, 2), omega=0.4)
    assert torch.equal(rows, out[2:])


def test_aim_leaves_what_has_no_statistics():
    assert torch.equal(aim(MERGED, BASE, inputs={"activations": None}, shape=(4,)), MERGED)
    assert torch.equal(aim(MERGED, BASE, inputs={"activations": torch.zeros(2)}, shape=(2, 2)), MERGED)
    with pytest.raises(ValueError, match=r"\(3,\) do not fit .* \(2, 2\)"):
        aim(MERGED, BASE, inputs={"activations": torch.ones(3)}, shape=(2, 2))
    for wrong in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="mean magnitudes"):
            aim(MERGED, BASE, inputs={"activations": torch.tensor([1.0, wrong])}, shape=(2, 2))


def test_aim_follows_a_merge():
    shape, names = (2, 2), ("model.layers.0.w", "model.layers.0.bias")
    base = {names[0]: BASE.view(shape), names[1]: BASE}
    model = {names[0]: MERGED.view(shape), names[1]: MERGED}
    activations = {names[0]: torch.tensor([1.0, 4.0])}
    post = [{"aim": {"omega": 0.4}}, {"lines": {"alpha": 0.5}}]
    out = merge_state_dicts("task_arithmetic", [model], base=base, inputs={"activations": activations}, post=post)
    torch.testing.assert_close(out[names[0]], torch.tensor([[1.425, 2.4], [2.575, 4.0]]))
    torch.testing.assert_close(out[names[1]], (BASE + MERGED) / 2)


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({}, "aim reads the statistic 'activations' of the base; give inputs one dict"),
        ({"activations": [{"w": torch.ones(2)}]}, "aim reads .* of the base; give inputs one dict"),
        ({"activations": {"model.w": torch.ones(2)}}, "about 'model.w', which no model has; did you mean 'model.v'"),
    ],
)
def test_aim_is_never_left_out_in_silence(inputs, sentence):
    model, base = {"model.v": MERGED.view(2, 2)}, {"model.v": BASE.view(2, 2)}
    with pytest.raises(ValueError, match=sentence):
        merge_state_dicts("task_arithmetic", [model], base=base, inputs=inputs, post=["aim"])


def test_repair_gives_rows_the_mean_length():
    tensors = torch.tensor([[3.0, 0.0, 1.0, 1.0, 0.0, 0.0], [0.0, 4.0, 1.0, 1.0, 0.0, 0.0]])
    merged = 0.25 * tensors[0] + 0.75 * tensors[1]  # (0.75, 3), (1, 1), (0, 0)
    out = repair(merged, tensors, torch.tensor([0.5, 1.5]), shape=(3, 2))
    factor = (0.25 * 3 + 0.75 * 4) / (0.75**2 + 9) ** 0.5
    torch.testing.assert_close(out, torch.tensor([0.75 * factor, 3 * factor, 1.0, 1.0, 0.0, 0.0]))
    assert torch.equal(repair(merged, tensors, torch.ones(2), shape=(6,)), merged)
    bounded = repair(merged, tensors, torch.tensor([0.5, 1.5]), shape=(3, 2), most=1.0)
    assert torch.equal(bounded, merged)
    with pytest.raises(ValueError, match="most is 0.5"):
        repair(merged, tensors, torch.ones(2), shape=(3, 2), most=0.5)
    with pytest.raises(ValueError, match="all weights are 0"):
        repair(merged, tensors, torch.zeros(2), shape=(3, 2))


def test_repair_follows_a_merge_without_a_base():
    generator = torch.Generator().manual_seed(0)
    one, other = ({"w": torch.randn(5, 40, generator=generator)} for _ in range(2))
    out = merge_state_dicts("linear", [one, other], weights=[0.5, 0.5], post=["repair"])["w"]
    torch.testing.assert_close(out.norm(dim=1), (one["w"].norm(dim=1) + other["w"].norm(dim=1)) / 2)
    torch.testing.assert_close(torch.cosine_similarity(out, one["w"] + other["w"]), torch.ones(5))
