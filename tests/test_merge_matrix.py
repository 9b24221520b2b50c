"""Methods that look at singular directions: against their definitions by a float64 SVD, by hand, at deficient rank."""

import gc
import math
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch import tensor

from fusion.merge import _linalg, merge_state_dicts, merge_tensors
from fusion.merge.opcm import opcm

ROOT = Path(__file__).resolve().parent.parent
CLOSE = {"atol": 1e-6, "rtol": 1e-5}
SHAPES = [(12, 5), (5, 12), (9, 9), (1, 7), (7, 1)]
MATRIX_WORDS = ("iso_c", "iso_cts", "tsv_m", "knots", "wudi", "opcm")


def close(actual, expected, **tolerance):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), **(tolerance or CLOSE))


def noise(seed, *shape, scale=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def models(shape, k=3, scale=0.1):
    """(base, K models around it)."""
    base = noise(0, *shape)
    return base, [base + noise(t + 1, *shape, scale=scale) for t in range(k)]


def of_rank(rank, rows, columns, seed=1):
    return noise(seed, rows, rank) @ noise(seed + 1, rank, columns) / rank


def svd(x):
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    return u, s, vh


def polar(x):
    u, _, vh = svd(x)
    return u @ vh


def root_polar(x):
    """The polar factor by this project's own function."""
    x = _linalg.tall(x)
    return _linalg.times(x, _linalg.inverse_root(_linalg.cross(x, x), len(x)))


# the helpers


@pytest.mark.parametrize("shape", [(40, 13), (33, 33), (5000, 7)])
def test_polar_factor_is_that_of_an_svd(shape, monkeypatch):
    x = noise(3, *shape)
    close(root_polar(x), polar(x).float(), atol=3e-7, rtol=0)
    monkeypatch.setattr(_linalg, "BLOCK", 64)  # many blocks, the last one shorter
    close(root_polar(x), polar(x).float(), atol=3e-7, rtol=0)


def test_polar_factor_keeps_its_digits_where_singular_values_span_four_decades():
    u, _, vh = svd(noise(3, 60, 20))
    x = ((u * torch.logspace(0, -4, 20, dtype=torch.float64)) @ vh).float()
    close(root_polar(x), polar(x).float(), atol=1e-6, rtol=0)


def test_polar_factor_of_a_deficient_matrix_is_zero_where_the_matrix_is():
    x = of_rank(3, 30, 10)
    p = root_polar(x).double()
    u, _, vh = svd(x)
    close(p, u[:, :3] @ vh[:3], atol=1e-6, rtol=0)
    assert float(root_polar(torch.zeros(6, 4)).abs().max()) == 0.0


def test_products_take_any_orientation_and_may_overwrite():
    x, a = noise(1, 6, 9), noise(2, 6, 6).double()
    expected = (x.mT.double() @ a).float()
    view = x.clone().mT
    assert _linalg.times(view, a, out=view) is view
    close(view, expected)


# Iso-C


def test_iso_c_by_hand():
    one, other = torch.diag(tensor([3.0, 0.0])), torch.diag(tensor([0.0, 1.0]))
    close(merge_tensors("iso_c", [one, other], base=torch.zeros(2, 2)), [[2.0, 0.0], [0.0, 2.0]])
    close(merge_tensors("iso_c", [one, other], base=torch.zeros(2, 2), weights=[1, -3]), [[3.0, 0.0], [0.0, -3.0]])
    close(merge_tensors("iso_c", [one, other], base=torch.ones(2, 2), scale=0.0), torch.ones(2, 2))


@pytest.mark.parametrize("shape", SHAPES)
def test_iso_c_is_the_mean_singular_value_times_the_polar_factor(shape):
    base, three = models(shape)
    u, s, vh = svd(sum(one.double() - base.double() for one in three))
    expected = base + 0.5 * (s.mean() * u @ vh).float()
    close(merge_tensors("iso_c", three, base=base, scale=0.5), expected)


def test_iso_c_at_deficient_rank_keeps_the_nuclear_norm_and_the_subspace():
    base = torch.zeros(20, 12)
    low = of_rank(4, 20, 12)
    moved = merge_tensors("iso_c", [low], base=base)
    u, s, vh = svd(low)
    close(moved, (s[:4].mean() * u[:, :4] @ vh[:4]).float(), atol=1e-6, rtol=0)
    assert float(svd(moved)[1].sum()) == pytest.approx(float(s[:4].sum()), rel=1e-5)


@pytest.mark.parametrize("word", ["iso_c", "tsv_m"])
def test_left_and_right_are_treated_alike(word):
    base, three = models((7, 13))
    turned = merge_tensors(word, [one.mT for one in three], base=base.mT)
    close(turned.mT, merge_tensors(word, three, base=base))


# TSV-M


def tsv_definition(tasks, r):
    kept = max(1, r // len(tasks))
    parts = [svd(task) for task in tasks]
    u = torch.cat([u[:, :kept] for u, _, _ in parts], 1)
    s = torch.cat([s[:kept] for _, s, _ in parts])
    v = torch.cat([vh[:kept].mT for _, _, vh in parts], 1)
    return (polar(u) * s) @ polar(v).mT


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
@pytest.mark.parametrize("k", [2, 3])
def test_tsv_m_is_its_definition(shape, k):
    base, some = models(shape, k)
    expected = base + tsv_definition([one - base for one in some], min(shape)).float()
    close(merge_tensors("tsv_m", some, base=base), expected, atol=1e-5, rtol=1e-5)


def test_tsv_m_by_hand():
    tasks = [torch.zeros(4, 4), torch.zeros(4, 4)]
    tasks[0][0, 1], tasks[0][1, 0], tasks[1][2, 2], tasks[1][3, 3] = 3.0, 1.0, 5.0, 2.0
    base = noise(1, 4, 4)
    merged = merge_tensors("tsv_m", [base + one for one in tasks], base=base, weights=[1.0, -2.0])
    close(merged, base + tasks[0] - 2 * tasks[1])  # nothing overlaps, so nothing is turned


def test_tsv_m_of_one_is_itself_and_of_equals_is_that_ones_leading_part():
    base, (one,) = models((8, 6), 1)
    close(merge_tensors("tsv_m", [one], base=base), one)
    u, s, vh = svd(one - base)
    leading = base + ((u[:, :3] * s[:3]) @ vh[:3]).float()
    close(merge_tensors("tsv_m", [one, one.clone()], base=base), leading, atol=1e-5, rtol=1e-5)


def test_tsv_m_of_more_models_than_directions_keeps_one_direction_each():
    base, some = models((2, 6), 5)
    assert bool(merge_tensors("tsv_m", some, base=base).isfinite().all())


# Iso-CTS


def iso_cts_definition(tasks, fraction):
    r, k = min(tasks[0].shape), len(tasks)
    own = round((r - int(r * fraction)) / k)
    common = r - own * k
    u, s, vh = svd(sum(tasks))
    lefts, values, rights = [u[:, :common]], [s[:common]], [vh[:common].mT]
    for task in tasks:
        u_t, s_t, vh_t = svd(task - lefts[0] @ (lefts[0].mT @ task))
        lefts.append(u_t[:, :own])
        values.append(s_t[:own])
        rights.append(vh_t[:own].mT)
    return torch.cat(values).mean() * polar(torch.cat(lefts, 1)) @ polar(torch.cat(rights, 1)).mT


@pytest.mark.parametrize("shape", [(14, 10), (10, 14)])
@pytest.mark.parametrize("fraction", [0.0, 0.5, 0.8])
def test_iso_cts_is_its_definition(shape, fraction):
    base, three = models(shape)
    expected = iso_cts_definition([one.double() - base.double() for one in three], fraction)
    merged = merge_tensors("iso_cts", three, base=base, scale=0.7, common_fraction=fraction)
    close(merged, base + 0.7 * expected.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_iso_cts_with_everything_in_common_is_iso_c(shape):
    base, three = models(shape)
    close(
        merge_tensors("iso_cts", three, base=base, common_fraction=1.0),
        merge_tensors("iso_c", three, base=base),
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("word", ["iso_c", "iso_cts", "tsv_m", "knots"])
def test_low_rank_task_vectors_bring_nothing_from_outside_their_spaces(word):
    base = noise(0, 24, 16)
    low = [of_rank(2, 24, 16, seed=5 * t + 1) for t in range(3)]
    moved = merge_tensors(word, [base + one for one in low], base=base) - base
    columns, _, _ = svd(torch.cat(low, 1))
    outside = moved.double() - columns[:, :6] @ (columns[:, :6].mT @ moved.double())
    assert float(moved.norm()) > 0.1 and float(outside.norm()) < 1e-4 * float(moved.norm())


# KnOTS


@pytest.mark.parametrize("shape", [(6, 9), (9, 9), (20, 4)])  # 20 > 3 * 4: the other side of the Gram matrix
def test_knots_is_ties_on_the_right_vectors(shape):
    base, three = models(shape)
    tasks = [one.double() - base.double() for one in three]
    u, s, vh = svd(torch.cat(tasks, 1))
    parts = [part.mT for part in vh.split(shape[1], 1)]  # (in, r) each
    k = max(1, math.floor(0.4 * parts[0].numel()))
    trimmed = [part * (part.abs() >= part.abs().flatten().sort().values[-k]) for part in parts]
    weights = [0.5, 0.3, 0.2]
    sign = sum(w * part for w, part in zip(weights, trimmed)).sign()
    agree = [(part * sign) > 0 for part in trimmed]
    top = sum(w * part * a for w, part, a in zip(weights, trimmed, agree))
    bottom = sum(w * a.double() for w, a in zip(weights, agree))
    merged = torch.where(bottom > 0, top / bottom.clamp(min=1e-9), 0.0)
    expected = base + 0.7 * ((u * s) @ merged.mT).float()
    close(merge_tensors("knots", three, base=base, weights=weights, density=0.4, scale=0.7), expected)


def test_knots_with_the_mean_is_the_weighted_mean_of_task_vectors():
    base, three = models((6, 9))
    expected = base + (0.5 * (three[0] - base) + 0.3 * (three[1] - base) + 0.2 * (three[2] - base))
    close(merge_tensors("knots", three, base=base, weights=[5, 3, 2], combine="mean"), expected)


def test_knots_of_one_model_with_nothing_trimmed_is_that_model():
    for shape in ((6, 9), (20, 4)):
        base, (one,) = models(shape, 1)
        close(merge_tensors("knots", [one], base=base, density=1.0), one)


# WUDI


def test_wudi_is_adam_on_what_the_paper_writes_down():
    base, three = models((6, 8))
    tasks = [(one - base).double() for one in three]
    tau = sum(tasks).clone().requires_grad_()
    adam = torch.optim.Adam([tau], lr=1e-3)
    losses = []
    for _ in range(25):
        loss = sum(((tau - d) @ d.mT).square().sum() / d.square().sum() for d in tasks)
        losses.append(float(loss.detach()))
        adam.zero_grad()
        loss.backward()
        adam.step()
    assert losses[-1] < losses[0]
    merged = merge_tensors("wudi", three, base=base, steps=25, learning_rate=1e-3)
    close(merged, base + tau.detach().float(), atol=2e-6, rtol=0)


def test_wudi_moves_no_further_than_its_steps_and_starts_at_the_sum():
    base, three = models((6, 8))
    start = base + sum(one - base for one in three)
    close(merge_tensors("wudi", three, base=base, steps=0), start)
    moved = merge_tensors("wudi", three, base=base, steps=40, learning_rate=1e-3) - start
    assert 0.01 < float(moved.abs().max()) <= 40 * 1e-3 * 1.1
    assert torch.equal(merge_tensors("wudi", three, base=base), merge_tensors("wudi", three, base=base))


def test_wudi_of_one_model_is_that_model():
    base, (one,) = models((6, 8), 1)
    close(merge_tensors("wudi", [one], base=base, steps=30, learning_rate=0.1), one, atol=3e-7, rtol=0)


# OPCM


def opcm_definition(tasks, alpha):
    merged, weight, lengths = tasks[0], 1.0, [tasks[0].norm()]
    for task in tasks[1:]:
        lengths.append(task.norm())
        u, s, vh = torch.linalg.svd(merged, full_matrices=True)
        split = int((s.cumsum(0) / s.sum() > alpha).float().argmax())
        inside = u.mT @ task @ vh.mT
        inside.diagonal().fill_(0)
        inside[:split, :split] = 0
        raw = weight * merged + u @ inside @ vh
        weight = raw.norm() / (sum(lengths) / len(lengths))
        merged = raw / weight
    return merged


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9])
def test_opcm_is_its_definition(shape, alpha):
    base, four = models(shape, 4)
    expected = opcm_definition([(one - base).double() for one in four], alpha)
    close(merge_tensors("opcm", four, base=base, alpha=alpha), base + expected.float(), atol=1e-5, rtol=1e-5)


def test_opcm_of_equal_models_is_that_model_and_of_vectors_by_hand():
    base, (one,) = models((8, 5), 1)
    close(merge_tensors("opcm", [one] * 3, base=base), one)
    a, b = tensor([3.0, 0.0]), tensor([0.0, 4.0])
    close(merge_tensors("opcm", [a, b], base=torch.zeros(2)), tensor([3.0, 4.0]) * 3.5 / 5)
    close(merge_tensors("opcm", [a, -a], base=torch.zeros(2)), [0.0, 0.0])


def test_opcm_holds_one_model_at_a_time():
    base, alive = torch.zeros(8, 5), []

    def one_by_one():
        for t in range(5):
            gc.collect()
            assert sum(ref() is not None for ref in alive) <= 1
            made = noise(t, 8, 5)
            alive.append(weakref.ref(made))
            yield made

    assert bool(opcm(one_by_one(), base).isfinite().all()) and len(alive) == 5


# all of them


@pytest.mark.parametrize("word", MATRIX_WORDS)
@pytest.mark.parametrize("shape", [(), (1,), (6,), (4, 3, 2), (1, 1), (3, 1)])
def test_every_shape_lives_and_equal_models_leave_the_base(word, shape):
    base, three = models(shape)
    merged = merge_tensors(word, three, base=base)
    assert merged.shape == base.shape and bool(merged.isfinite().all())
    # one model that is the base beside another with a different tensor: the method is really called
    both = merge_state_dicts(
        word, [{"a": base, "b": three[0]}, {"a": base, "b": three[1]}], base={"a": base, "b": base}
    )
    assert torch.equal(both["a"], base)


@pytest.mark.parametrize("word", ["iso_c", "iso_cts", "tsv_m", "wudi"])
def test_what_is_no_matrix_takes_the_mean_of_weighted_task_vectors(word):
    base, three = models((5,))
    close(merge_tensors(word, three, base=base), base + sum(one - base for one in three) / 3)
    if word != "wudi":
        weighted = base + (2 * (three[0] - base) - (three[1] - base)) / 2
        close(merge_tensors(word, three[:2], base=base, weights=[2, -1]), weighted)


@pytest.mark.parametrize("word", ["iso_c", "iso_cts", "tsv_m", "knots"])
def test_zero_task_vectors_and_weights_change_nothing_by_themselves(word):
    base, (one, other) = models((6, 8), 2)
    still = merge_tensors(word, [base.clone(), base.clone()], base=base, weights=[1, 2])
    assert torch.equal(still, base)
    assert bool(merge_tensors(word, [one, base], base=base).isfinite().all())
    if word == "iso_c":  # the others leave room for every model
        close(merge_tensors(word, [one, other], base=base, weights=[1, 0]), merge_tensors(word, [one], base=base))


@pytest.mark.parametrize("word", ["iso_c", "iso_cts", "tsv_m", "knots", "wudi"])
def test_the_order_of_models_does_not_matter(word):
    base, three = models((9, 6))
    given = {} if word == "wudi" else {"weights": [0.5, 0.3, 0.2]}
    turned = {} if word == "wudi" else {"weights": [0.2, 0.5, 0.3]}
    forward = merge_tensors(word, three, base=base, **given)
    close(merge_tensors(word, [three[2], three[0], three[1]], base=base, **turned), forward, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("word", "params", "sentence"),
    [
        ("iso_cts", {"common_fraction": 1.5}, "common_fraction is 1.5; .* from 0 to 1"),
        ("opcm", {"alpha": -0.1}, "alpha is -0.1; .* from 0 to 1"),
        ("wudi", {"steps": -1}, "steps -1 .* neither may be below 0"),
        ("knots", {"density": 2.0}, "density is 2; allowed are numbers from 0 to 1"),
        ("knots", {"weights": [1, -1], "combine": "mean"}, "add up to 0"),
        ("wudi", {"weights": [1, 2]}, "leave the weights out"),
    ],
)
def test_bad_input_gets_a_sentence(word, params, sentence):
    base, two = models((4, 4), 2)
    with pytest.raises(ValueError, match=sentence):
        merge_tensors(word, two, base=base, **params)


def test_bits_on_disk_do_not_depend_on_the_number_of_threads(tmp_path):
    # in a process of its own, where every thread may take four for a product of matrices unless it is told not to
    code = """
import sys, torch
from pathlib import Path
from safetensors.torch import save_file
from fusion.merge import merge_checkpoints
root, models = Path(sys.argv[1]), {}
noise = lambda seed, *shape: torch.randn(shape, generator=torch.Generator().manual_seed(seed))
for t in range(5):
    models[f"m{t}"] = root / f"m{t}"
    models[f"m{t}"].mkdir()
    shapes = ((300, 96), (96, 96), (257, 96), (96, 257), (96,), (4, 3, 2))
    tensors = {f"w{i}": 0.1 * noise(i, *s) + bool(t) * 0.01 * noise(100 * t + i, *s) for i, s in enumerate(shapes)}
    save_file(tensors, models[f"m{t}"] / "model.safetensors")
    (models[f"m{t}"] / "config.json").write_text('{"model_type": "llama"}')
base = models.pop("m0")
for word in ("opcm", "tsv_m", "knots"):
    written = []
    for threads in (1, 4):
        out = root / f"{word}{threads}"
        merge_checkpoints(word, models, out, base=base, threads=threads)
        written.append((out / "model.safetensors").read_bytes())
    assert written[0] == written[1], word
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "4", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
