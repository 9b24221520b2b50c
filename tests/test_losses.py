"""Laws of the divergences and of the chunked head, against dense formulas in float64."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fusion.losses._head import chunked_loss
from fusion.losses._pick import pick
from fusion.losses._rows import INF, Fold, Rows, fold, group_logsumexp
from fusion.losses.forward_kl import forward_kl
from fusion.losses.jsd import jsd
from fusion.losses.reverse_kl import reverse_kl

N, D, V, K = 40, 8, 23, 5
DIVERGENCES = {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "jsd": jsd, "jsd_0.1": partial(jsd, beta=0.1)}
BIASED_ON_DRAWS = {"reverse_kl": reverse_kl, "jsd": jsd}


def logs(n=N, width=V, seed=0, scale=2.0):
    return torch.log_softmax(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) * scale, 1)


def truncated(log_p, k):
    """Top-k rows of dense log-probabilities, with two padded entries."""
    values, ids = log_p.topk(k, 1)
    outside = log_p.double().exp().scatter(1, ids, 0.0).sum(1).log().float()
    rows = Rows(ids, values, outside, "truncated", torch.ones(len(ids), dtype=torch.bool))
    return rows.pad(k + 2)


def sampled(log_p, draws, seed=0):
    """Rows of `draws` independent draws, as distinct ids and shares."""
    drawn = torch.multinomial(log_p.exp(), draws, True, generator=torch.Generator().manual_seed(seed))
    counts = torch.zeros_like(log_p).scatter_add(1, drawn, torch.ones_like(drawn, dtype=log_p.dtype))
    width = int((counts > 0).sum(1).max())
    values, ids = counts.sort(1, descending=True)
    values, ids = values[:, :width], ids[:, :width].masked_fill(values[:, :width] == 0, -1)
    n = len(log_p)
    return Rows(ids, (values / draws).log(), torch.full((n,), -INF), "sampled", torch.ones(n, dtype=torch.bool))


def dense_buckets(log_p, log_q, rows):
    """Both distributions on the K listed buckets and the rest, written out in float64."""
    p, q = log_p.double().exp(), log_q.double().exp()
    out = []
    for t in range(len(rows)):
        ids = [int(i) for i in rows.ids[t] if i >= 0]
        others = [i for i in range(p.shape[1]) if i not in ids]
        out.append([torch.cat([x[t, ids], x[t, others].sum().view(1)]) for x in (p, q)])
    return torch.stack([a for a, _ in out]), torch.stack([b for _, b in out])


def dense_divergence(name, p, q):
    def kl(a, b):
        return torch.where(a > 0, a * (a / b).log(), 0.0).sum(1)

    if name == "forward_kl":
        return kl(p, q)
    if name == "reverse_kl":
        return kl(q, p)
    beta = 0.1 if "0.1" in name else 0.5
    m = beta * p + (1 - beta) * q
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


@pytest.fixture
def setting():
    g = torch.Generator().manual_seed(1)
    hidden = torch.randn(N, D, generator=g, requires_grad=True)
    weight = torch.randn(V, D, generator=g, requires_grad=True)
    labels = torch.randint(0, V, (N,), generator=g)
    labels[:4] = -100
    rows_at = torch.sort(torch.randperm(N - 4, generator=g)[:22] + 4)[0]
    return hidden, weight, labels, rows_at


def student_index():
    """Three tokens in bucket 2, two in bucket 9, one token without a bucket."""
    index = torch.arange(V)
    index[[4, 17]] = 2
    index[11] = 9
    index[20] = -1
    return index


def run(setting, rows, divergence=forward_kl, index=None, weight=0.3, everywhere=True, eager=False, **options):
    hidden, head, labels, rows_at = setting
    hidden, head = hidden.detach().requires_grad_(), head.detach().requires_grad_()
    counts = options.pop("counts", (36, 22))
    options.setdefault("rows_at", rows_at if rows is not None else None)
    labels = options.pop("labels", labels)
    parameters = [head] if eager else None
    loss, sums = chunked_loss(
        hidden, lambda x: x @ head.T, labels, rows, index, divergence, weight, everywhere, counts,
        parameters=parameters, **options,
    )  # fmt: skip
    loss.backward()
    return loss.detach(), hidden.grad, head.grad, sums


# ---- divergences ----


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("k", [1, K, V])
def test_truncated_equals_the_dense_formula_on_k_plus_one_buckets(name, k):  # M3, also k = V
    log_p, log_q = logs(seed=1), logs(seed=2).requires_grad_()
    rows = truncated(log_p, k)
    value = DIVERGENCES[name](log_q, rows)
    p, q = dense_buckets(log_p, log_q, rows)
    expected = dense_divergence(name, p, q)
    torch.testing.assert_close(value, expected.float(), atol=1e-5, rtol=1e-5)
    (mine,) = torch.autograd.grad(value.sum(), log_q)
    (theirs,) = torch.autograd.grad(expected.sum(), log_q)
    torch.testing.assert_close(mine, theirs.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_all_entries_equal_the_whole_distribution(name):  # M3
    log_p, log_q = logs(seed=1), logs(seed=2)
    sparse = DIVERGENCES[name](log_q, truncated(log_p, V))
    torch.testing.assert_close(sparse, DIVERGENCES[name](log_q, Rows.whole(log_p)), atol=1e-5, rtol=1e-5)
    dense = dense_divergence(name, log_p.double().exp(), log_q.double().exp())
    torch.testing.assert_close(sparse, dense.float(), atol=1e-5, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, V), st.sampled_from(sorted(DIVERGENCES)), st.floats(0.1, 30.0))
def test_never_negative(seed, k, name, scale):  # L2
    value = DIVERGENCES[name](logs(seed=seed, scale=scale), truncated(logs(seed=seed + 1, scale=scale), k))
    assert value.isfinite().all() and (value > -1e-5).all()


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("k", [1, K, V])
def test_student_equal_to_teacher_has_no_loss_and_no_gradient(name, k):  # L1 on buckets and tail
    log_p = logs(seed=3)
    logits = log_p.clone().requires_grad_()
    value = DIVERGENCES[name](torch.log_softmax(logits, 1), truncated(log_p, k))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert value.abs().max() < 1e-5 and gradient.abs().max() < 1e-5


@pytest.mark.parametrize("name", DIVERGENCES)
def test_targets_shifted_by_one_row_show(name):  # the planted error that must not pass
    log_p = logs(seed=3)
    assert DIVERGENCES[name](log_p, truncated(log_p, K)).abs().max() < 1e-5
    assert DIVERGENCES[name](log_p, truncated(log_p.roll(1, 0), K)).mean() > 0.05


def test_draws_give_the_cross_entropy_to_them():
    log_p, log_q = logs(seed=1), logs(seed=2)
    rows = sampled(log_p, 7)
    shares = torch.zeros(N, V).scatter_add(1, rows.ids.clamp(min=0), rows.log_probs.exp())
    torch.testing.assert_close(forward_kl(log_q, rows), -(shares * log_q).sum(1))


def test_draws_are_unbiased():  # M4 for the loss: value and gradient over 10^5 draws
    log_p, n = logs(1, seed=1), 2000
    logits = logs(1, seed=2).clone().requires_grad_()
    rows = sampled(log_p.expand(n, V), 50)
    value = forward_kl(torch.log_softmax(logits, 1).expand(n, V), rows).mean()
    (gradient,) = torch.autograd.grad(value, logits)
    p, q = log_p.exp(), torch.softmax(logits.detach(), 1)
    assert abs(value - (-(p * q.log()).sum())) < 0.02
    assert (gradient - (q - p)).abs().max() < 0.01


@pytest.mark.parametrize("name", BIASED_ON_DRAWS)
def test_draws_are_refused_where_no_estimate_is_unbiased(name):
    with pytest.raises(ValueError, match=f"{name} has no unbiased estimate from sampled targets.*top_k or nucleus"):
        BIASED_ON_DRAWS[name](logs(), sampled(logs(), 4))


def test_ends_of_jsd_are_the_two_divergences():  # L8
    log_p, log_q = logs(seed=1, scale=0.5), logs(seed=2, scale=0.5)
    for rows in (truncated(log_p, K), Rows.whole(log_p)):
        forward, reverse = forward_kl(log_q, rows), reverse_kl(log_q, rows)
        assert torch.equal(jsd(log_q, rows, beta=0.0), forward)
        assert torch.equal(jsd(log_q, rows, beta=1.0), reverse)
        torch.testing.assert_close(jsd(log_q, rows, beta=1e-3) / 1e-3, forward, rtol=0.02, atol=1e-3)
        torch.testing.assert_close(jsd(log_q, rows, beta=1 - 1e-3) / 1e-3, reverse, rtol=0.02, atol=1e-3)
    with pytest.raises(ValueError, match=r"beta is 1\.5; it must lie between 0"):
        jsd(log_q, Rows.whole(log_p), beta=1.5)


def test_temperature_on_all_entries():  # L4
    logits, log_p, t = torch.randn(N, V, generator=torch.Generator().manual_seed(5)), logs(seed=1), 2.5
    log_q = torch.log_softmax(logits / t, 1)
    values, ids = log_p.sort(1, descending=True)
    rows = Rows(ids, values, torch.full((N,), -INF), "whole", torch.ones(N, dtype=torch.bool))
    for name, divergence in DIVERGENCES.items():
        p = torch.softmax(log_p.double() / t, 1)
        dense = dense_divergence(name, p, log_q.double().exp()) * t**2
        torch.testing.assert_close(divergence(log_q, rows, temperature=t), dense.float(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [truncated(logs(), K), sampled(logs(), 4)], ids=["truncated", "sampled"])
def test_temperature_is_refused_on_what_is_known_in_part(rows):
    with pytest.raises(ValueError, match=f"temperature 2.0 needs whole targets without a tail, these are {rows.kind}"):
        forward_kl(logs(), rows, temperature=2.0)


SURE = torch.tensor([[0.0, -INF, -INF, -INF], [-INF, -INF, -INF, 0.0]])


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize(
    "log_q", [SURE, SURE.roll(1, 1), torch.tensor([[0.0, -40.0, -80.0, -120.0]] * 2), SURE.bfloat16()]
)
def test_finite_at_zero_and_one(name, log_q):  # L9
    targets = [
        Rows.whole(SURE),
        Rows(torch.tensor([[0, -1], [2, -1]]), torch.tensor([[0.0, -INF]] * 2), torch.full((2,), -INF), "truncated",
             torch.ones(2, dtype=torch.bool)),
        Rows(torch.tensor([[0, 3], [1, -1]]), torch.tensor([[-0.7, -INF], [-3.0, -INF]]), torch.tensor([-0.7, -0.05]),
             "truncated", torch.ones(2, dtype=torch.bool)),
    ]  # fmt: skip
    for rows in targets:
        logits = log_q.clone().requires_grad_()
        value = DIVERGENCES[name](torch.log_softmax(logits, 1), rows)
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert value.dtype == torch.float32 and value.isfinite().all() and gradient.isfinite().all()


def test_zero_entries_and_padding_have_exactly_no_gradient():
    log_q = logs(1, 6, seed=4).requires_grad_()
    rows = Rows(torch.tensor([[1, 4, -1]]), torch.tensor([[0.0, -INF, -INF]]), torch.tensor([-INF]), "truncated",
                torch.ones(1, dtype=torch.bool))  # fmt: skip
    (gradient,) = torch.autograd.grad(forward_kl(log_q, rows).sum(), log_q)
    assert gradient.tolist() == [[0.0, -1.0, 0.0, 0.0, 0.0, 0.0]]


def test_half_precision_is_computed_in_float32():  # L9
    log_p, log_q = logs(seed=1), logs(seed=2).bfloat16()
    for name, divergence in DIVERGENCES.items():
        value = divergence(log_q, truncated(log_p, K))
        torch.testing.assert_close(value, divergence(log_q.float(), truncated(log_p, K)), msg=name)


def test_a_sure_student_still_learns_the_tail():
    # log(1 - sum of the listed) is 0 or noise here; the sum over the others is not
    logits = torch.tensor([[30.0, 0.0, 0.0, 0.0]], requires_grad=True)
    rows = Rows(torch.tensor([[0]]), torch.tensor([[math.log(0.5)]]), torch.tensor([math.log(0.5)]), "truncated",
                torch.ones(1, dtype=torch.bool))  # fmt: skip
    (gradient,) = torch.autograd.grad(forward_kl(torch.log_softmax(logits, 1), rows).sum(), logits)
    torch.testing.assert_close(gradient, torch.tensor([[0.5, -1 / 6, -1 / 6, -1 / 6]]))


# ---- buckets ----


def test_fold_adds_the_mass_of_joined_tokens():  # M2
    log_q = logs()
    folded = fold(log_q, student_index()).exp()
    q = log_q.exp()
    torch.testing.assert_close(folded[:, 2], q[:, [2, 4, 17]].sum(1))
    torch.testing.assert_close(folded[:, 9], q[:, [9, 11]].sum(1))
    assert (folded[:, [4, 11, 17]] == 0).all() and torch.equal(folded[:, 20], q[:, 20])
    torch.testing.assert_close(folded.sum(1), torch.ones(N))  # M1


def test_fold_onto_other_ids():
    index = torch.tensor([1, 2, 0, 3])  # a permutation, and bucket 3 at home
    log_q = logs(width=4)
    torch.testing.assert_close(fold(log_q, index)[:, [1, 2, 0, 3]], log_q)
    assert not Fold.build(index).plain and Fold.build(torch.arange(4)).plain


def test_group_logsumexp_takes_infinities():
    values = torch.tensor([-200.0, -201.0, -INF, 3.0], requires_grad=True)
    sums = group_logsumexp(values, torch.tensor([0, 0, 1, 3]), 4)
    torch.testing.assert_close(sums, torch.tensor([-200 + math.log1p(math.exp(-1)), -INF, -INF, 3.0]))
    (gradient,) = torch.autograd.grad(sums[[0, 3]].sum(), values)
    torch.testing.assert_close(gradient, torch.tensor([0.7310586, 0.2689414, 0.0, 1.0]))


def test_rows_cat_select_and_refusals():
    a, b = truncated(logs(), 3), truncated(logs(seed=1), K)
    both = Rows.cat([a, b])
    assert len(both) == 2 * N and both.ids.shape[1] == K + 2
    torch.testing.assert_close(both.mass(), torch.ones(2 * N, dtype=torch.float64), atol=1e-5, rtol=0)  # M1
    torch.testing.assert_close(both.select(slice(N, None)).log_probs, b.log_probs)
    assert not Rows.empty(3, "sampled").present.any()
    with pytest.raises(ValueError, match="sampled, truncated"):
        Rows.cat([a, sampled(logs(), 3)])
    with pytest.raises(ValueError, match="no kind 'dense'"):
        Rows(a.ids, a.log_probs, a.tail, "dense", a.present)


@pytest.mark.parametrize("with_rest", [False, True])
def test_pick_has_the_gradients_of_the_plain_formula(with_rest):
    logits = (logs(4, 6) * 3).requires_grad_()
    picks, listed = torch.tensor([0, 7, 13, 22, 22]), torch.tensor([7, 8, 22] + list(range(12, 18)))
    outside = torch.ones(24, dtype=torch.bool).index_fill(0, listed, False).view(4, 6)
    weights = torch.randn(5), torch.tensor([0.3, -2.0, 0.0, 1.0]), torch.randn(4)
    mine = pick(logits, picks, listed, with_rest)
    plain = (
        logits.view(-1)[picks],
        logits.masked_fill(~outside, -1e9).logsumexp(1) if with_rest else mine[1],
        logits.logsumexp(1),
    )
    shown = [0, 1, 3]  # row 2 lists all
    for a, b in zip(mine, plain, strict=True):
        torch.testing.assert_close(a[shown], b[shown])

    def total(parts):
        rest = (parts[1][shown] * weights[1][shown]).sum() if with_rest else 0.0
        return (parts[0] * weights[0]).sum() + rest + (parts[2] * weights[2]).sum()

    torch.testing.assert_close(
        torch.autograd.grad(total(mine), logits), torch.autograd.grad(total(plain), logits), atol=1e-6, rtol=1e-5
    )
    assert not with_rest or mine[1][2] == -INF


# ---- the head in chunks ----


def dense_loss(setting, rows, divergence, index, w, everywhere, counts=(36, 22)):
    """The same loss from one full (N, V) log-softmax."""
    hidden, head, labels, rows_at = setting
    hidden, head = hidden.detach().requires_grad_(), head.detach().requires_grad_()
    log_q = torch.log_softmax(hidden @ head.T, 1)
    ce = F.cross_entropy(hidden @ head.T, labels, ignore_index=-100, reduction="none")
    weight = torch.full((N,), w) if not everywhere else torch.ones(N).index_fill(0, rows_at, w)
    kd = divergence(fold(log_q if index is None else log_q, torch.arange(V) if index is None else index)[rows_at], rows)
    loss = (ce * weight).sum() / counts[0] + (1 - w) * kd.sum() / (counts[0] if everywhere else counts[1])
    loss.backward()
    return loss.detach(), hidden.grad, head.grad


def folded_targets(kind, index):
    log_p = logs(22, seed=8)
    if index is not None:
        log_p = fold(log_p, index)
        log_p[:, 20] = -INF  # a token without a bucket is never named
        log_p = torch.log_softmax(log_p, 1)
    return {"sampled": lambda: sampled(log_p, 6), "truncated": lambda: truncated(log_p, K),
            "whole": lambda: Rows.whole(log_p)}[kind]()  # fmt: skip


CASES = [(n, k) for n in DIVERGENCES for k in ("sampled", "truncated", "whole") if n == "forward_kl" or k != "sampled"]


@pytest.mark.parametrize("eager", [False, True], ids=["checkpointed", "eager"])
@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("index", [None, student_index()], ids=["tokens", "folded"])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_chunked_equals_dense(setting, name, kind, index, everywhere, eager):  # L3 with the dense loss as the one chunk
    rows = folded_targets(kind, index)
    expected = dense_loss(setting, rows, DIVERGENCES[name], index, 0.3, everywhere)
    for chunk in (1, 7, 16, 1000):
        found = run(setting, rows, DIVERGENCES[name], index, 0.3, everywhere, eager, chunk=chunk)
        for a, b in zip(found[:3], expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_sums_for_the_log(setting):
    rows = folded_targets("truncated", None)
    *_, sums = run(setting, rows, weight=0.3)
    hidden, head, labels, rows_at = setting
    ce = F.cross_entropy(hidden @ head.T, labels, ignore_index=-100, reduction="sum")
    kd = forward_kl(torch.log_softmax(hidden @ head.T, 1)[rows_at], rows).sum()
    torch.testing.assert_close(torch.stack([sums["ce_sum"], sums["kd_sum"]]), torch.stack([ce, kd]).detach())
    assert (sums["labels"], sums["targets"]) == (36, 22) and not sums["ce_sum"].requires_grad


@pytest.mark.parametrize("index", [None, student_index()], ids=["tokens", "folded"])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_student_s_own_words_teach_it_nothing(setting, name, index):  # L1 through folding, chunks and tail
    hidden, head, labels, rows_at = setting
    log_q = torch.log_softmax(hidden @ head.T, 1).detach()[rows_at]
    own = log_q if index is None else fold(log_q, index)
    if index is not None:
        own = own.clone()
        own[:, 20] = -INF  # the token without a bucket is in the tail
    ids = own.topk(K, 1)[1]
    outside = log_q.double().exp().sum(1) - own.double().exp().gather(1, ids).sum(1)
    rows = Rows(ids, own.gather(1, ids), outside.log().float(), "truncated", torch.ones(len(ids), dtype=torch.bool))
    loss, of_hidden, of_head, _ = run(setting, rows, DIVERGENCES[name], index, weight=0.0, everywhere=False, chunk=9)
    assert abs(loss) < 1e-6 and of_hidden.abs().max() < 1e-6 and of_head.abs().max() < 1e-6
    moved = rows.select(torch.arange(len(rows)).roll(1))
    assert run(setting, moved, DIVERGENCES[name], index, weight=0.0, everywhere=False)[0] > 0.05


def test_temperature_through_the_head(setting):  # L4
    log_p, t = logs(22, seed=8), 1.7
    values, ids = log_p.sort(1, descending=True)
    rows = Rows(ids, values, torch.full((22,), -INF), "whole", torch.ones(22, dtype=torch.bool))
    loss, of_hidden, *_ = run(setting, rows, temperature=t, weight=0.4, chunk=9)
    hidden, head, labels, rows_at = setting
    x = hidden.detach().requires_grad_()
    logits = x @ head.detach().T
    ce = F.cross_entropy(logits, labels, ignore_index=-100, reduction="none")
    kd = F.kl_div(torch.log_softmax(logits[rows_at] / t, 1), torch.softmax(log_p / t, 1), reduction="sum") * t**2
    dense = ((ce * torch.ones(N).index_fill(0, rows_at, 0.4)).sum() + 0.6 * kd) / 36
    dense.backward()
    torch.testing.assert_close(loss, dense.detach())
    torch.testing.assert_close(of_hidden, x.grad, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match="student's own vocabulary"):
        run(setting, rows, index=student_index(), temperature=t)
    with pytest.raises(ValueError, match="needs whole targets"):
        run(setting, truncated(log_p, K), temperature=t)


@pytest.mark.parametrize("eager", [False, True], ids=["checkpointed", "eager"])
def test_no_gradient_reaches_prompt_and_padding(setting, eager):  # L5
    hidden, head, labels, _ = setting
    labels = labels.clone()
    labels[-3:] = -100
    everywhere = torch.arange(N)
    rows = truncated(logs(N, seed=8), K)
    masked = run(setting, rows, labels=labels, rows_at=everywhere, counts=(33, 33), eager=eager)
    assert (masked[1][:4] == 0).all() and (masked[1][-3:] == 0).all() and (masked[1][4:-3] != 0).any(1).all()
    assert (masked[3]["labels"], masked[3]["targets"]) == (33, 33)
    shifted = run(setting, rows, labels=labels.roll(1), rows_at=everywhere, counts=(33, 33), eager=eager)
    assert (shifted[1] - masked[1]).abs().max() > 1e-3 and (shifted[1][4] == 0).all()


def test_rows_at_all_positions_equal_rows_at_some(setting):
    *_, labels, rows_at = setting
    some = truncated(logs(22, seed=8), K)
    absent = Rows.empty(N, "truncated").pad(some.ids.shape[1])
    present = absent.present.index_fill(0, rows_at, True)
    full = Rows(absent.ids.index_copy(0, rows_at, some.ids), absent.log_probs.index_copy(0, rows_at, some.log_probs),
                absent.tail.index_copy(0, rows_at, some.tail), "truncated", present)  # fmt: skip
    for a, b in zip(run(setting, full, rows_at=None)[:3], run(setting, some)[:3], strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="22 rows for 40 positions; pass rows_at"):
        run(setting, some, rows_at=None)


@pytest.mark.parametrize("eager", [False, True], ids=["checkpointed", "eager"])
@pytest.mark.parametrize("everywhere", [True, False])
@pytest.mark.parametrize("parts", [4, 8])
def test_accumulation_gives_the_same_gradient(setting, everywhere, parts, eager):  # L6
    hidden, head, labels, rows_at = setting
    rows = sampled(logs(22, seed=8), 6)
    whole = run(setting, rows, everywhere=everywhere, eager=eager)
    of_hidden, of_head, loss = [], torch.zeros_like(head), 0.0
    for start in range(0, N, N // parts):  # the first part has labels at one position only, or none
        stop = start + N // parts
        here = (rows_at >= start) & (rows_at < stop)
        part = (hidden[start:stop], head, labels[start:stop], rows_at[here] - start)
        value, a, b, _ = run(part, rows.select(here), everywhere=everywhere, eager=eager)
        loss, of_head = loss + value, of_head + b
        of_hidden.append(a)
    torch.testing.assert_close(loss, whole[0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(torch.cat(of_hidden), whole[1], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(of_head, whole[2], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("eager", [False, True], ids=["checkpointed", "eager"])
def test_a_batch_without_labels_still_reaches_the_head(setting, eager):
    rows = truncated(logs(22, seed=8), K)
    loss, of_hidden, of_head, sums = run(setting, rows, labels=torch.full((N,), -100), eager=eager, counts=(5, 5))
    assert loss == 0 and (of_hidden == 0).all() and (of_head == 0).all() and sums["labels"] == 0


@pytest.mark.parametrize("labelled", [0, 1, 36])
def test_the_head_runs_as_often_as_asked(setting, labelled):  # or ranks with fewer labels would leave others waiting
    hidden, head, labels, rows_at = setting
    labels = labels.masked_fill(torch.arange(N) >= 4 + labelled, -100)
    rows, seen = truncated(logs(22, seed=8), K), []
    results = []
    for calls in (1, 7):
        x, w = hidden.detach().requires_grad_(), head.detach().requires_grad_()
        seen.append([])

        def counted(s, w=w, seen=seen):
            seen[-1].append(len(s))
            return s @ w.T

        loss, _ = chunked_loss(x, counted, labels, rows, None, forward_kl, 0.3, True, (36, 22), chunk=9,
                               rows_at=rows_at, calls=calls)  # fmt: skip
        forward = len(seen[-1])
        loss.backward()
        assert len(seen[-1]) == 2 * forward  # once more in backward
        assert forward == max(calls, -(-labelled // 9))
        results.append((loss.detach(), x.grad, w.grad))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("eager", [False, True], ids=["checkpointed", "eager"])
def test_without_targets_it_is_the_language_model_loss(setting, eager):
    hidden, head, labels, _ = setting
    loss, of_hidden, *_ = run(setting, None, counts=(36, 0), eager=eager, chunk=9)
    x = hidden.detach().requires_grad_()
    plain = F.cross_entropy(x @ head.T, labels, ignore_index=-100)
    plain.backward()
    torch.testing.assert_close(loss, plain.detach())
    torch.testing.assert_close(of_hidden, x.grad, atol=1e-6, rtol=1e-5)


def test_eager_gradients_scale_once_and_leave_frozen_parts_alone(setting):
    hidden, head, labels, rows_at = setting
    frozen = head.detach()
    x = hidden.detach().requires_grad_()
    rows = sampled(logs(22, seed=8), 6)
    loss, _ = chunked_loss(x, lambda s: s @ frozen.T, labels, rows, None, forward_kl, 0.3, True, (36, 22),
                           rows_at=rows_at, parameters=[frozen])  # fmt: skip
    (loss * 3.0).backward(retain_graph=True)
    torch.testing.assert_close(x.grad, run(setting, rows)[1] * 3.0, atol=1e-6, rtol=1e-5)
    with pytest.raises(RuntimeError, match="no second backward"):
        loss.backward()


@pytest.mark.parametrize("eager", [False, True], ids=["checkpointed", "eager"])
def test_bfloat16_autocast(setting, eager):  # L9 through the head
    hidden, head, labels, rows_at = setting
    rows = sampled(logs(22, seed=8), 6)
    linear = torch.nn.Linear(D, V)
    grads = []
    for enabled in (True, False):
        x = hidden.detach().requires_grad_()
        linear.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss, _ = chunked_loss(x, linear, labels, rows, student_index(), forward_kl, 0.3, True, (36, 22), chunk=9,
                                   rows_at=rows_at, parameters=[*linear.parameters()] if eager else None)  # fmt: skip
        loss.backward()
        assert loss.dtype == torch.float32
        grads.append(linear.weight.grad.clone())
    torch.testing.assert_close(grads[0], grads[1], atol=0.02, rtol=0.1)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


@pytest.mark.parametrize("eager", [False, True], ids=["checkpointed", "eager"])
@pytest.mark.parametrize("kind", ["sampled", "truncated"])
def test_no_tensor_of_all_positions_and_tokens(kind, eager):  # L7
    n, width, chunk = 512, 800, 64
    g = torch.Generator().manual_seed(0)
    setting = (torch.randn(n, D, generator=g), torch.randn(width, D, generator=g), torch.randint(0, width, (n,)),
               torch.arange(0, n, 2))  # fmt: skip
    log_p = logs(n // 2, width)
    rows = sampled(log_p, 16) if kind == "sampled" else truncated(log_p, 16)
    index = torch.arange(width)
    index[100:200] = 7
    with Largest() as seen:
        run(setting, rows, index=index, counts=(n, n // 2), chunk=chunk, eager=eager)
    assert seen.numel <= chunk * width + chunk
    with Largest() as seen:  # the hook sees a full tensor where there is one
        F.cross_entropy(setting[0] @ setting[1].T, setting[2])
    assert seen.numel == n * width


def test_partitions_side_by_side_give_what_each_gives_alone() -> None:
    hidden, weight, labels = torch.randn(6, 5), torch.randn(7, 5), torch.randint(0, 7, (6,))
    coarse, fine = Fold.build(torch.tensor([0, 0, 2, 2, 4, 5, 6])), Fold.build(torch.arange(7))
    rows = Rows(
        torch.tensor([[0, 2], [4, -1]] * 3),
        torch.log(torch.tensor([[0.25, 0.75], [1.0, 0.0]] * 3)),
        torch.full((6,), -math.inf),
        "sampled",
        torch.ones(6, dtype=torch.bool),
    )
    second = torch.tensor([False, True] * 3)

    def loss(rows: Rows, fold: Fold) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return chunked_loss(hidden, lambda h: h @ weight.T, labels, rows, fold, forward_kl, 0.5, True, (6, 6))

    apart = [loss(replace(rows, present=second == part), fold)[1]["kd_sum"] for part, fold in enumerate((coarse, fine))]
    shifted = replace(rows, ids=torch.where((rows.ids >= 0) & second[:, None], rows.ids + 7, rows.ids))
    together = loss(shifted, Fold.cat([coarse, fine]))[1]["kd_sum"]
    torch.testing.assert_close(together, apart[0] + apart[1])
