"""Laws of the fusion rules, and small cases by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion.fuse.avg_ce import avg_ce
from fusion.fuse.geometric import geometric
from fusion.fuse.min_ce import min_ce
from fusion.fuse.mixture import mixture
from fusion.fuse.weighted import weighted
from fusion.losses._rows import INF, Rows

N, V = 12, 9
RULES = {"min_ce": min_ce, "avg_ce": avg_ce, "mixture": mixture, "geometric": geometric, "weighted": weighted}
CASES = [(name, kind) for name in RULES for kind in ("sampled", "truncated", "whole")
         if kind != "sampled" or name not in ("geometric", "weighted")]  # fmt: skip
LOG2 = math.log(2)


def logs(seed, n=N, width=V, scale=1.5):
    return torch.log_softmax(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) * scale, 1)


def teacher(kind, seed, k=5, missing=()):
    log_p = logs(seed)
    present = torch.ones(N, dtype=torch.bool)
    present[list(missing)] = False
    if kind == "whole":
        rows = Rows.whole(log_p)
        ids, values, tail = rows.ids.clone(), rows.log_probs, rows.tail
    elif kind == "truncated":
        values, ids = log_p.topk(k, 1)
        tail = log_p.exp().scatter(1, ids, 0.0).sum(1).log()
    else:
        drawn = torch.multinomial(log_p.exp(), 8, True, generator=torch.Generator().manual_seed(seed))
        counts = torch.zeros(N, V).scatter_add(1, drawn, torch.ones(N, 8))
        values, ids = counts.sort(1, descending=True)
        ids, values, tail = ids.masked_fill(values == 0, -1), (values / 8).log(), torch.full((N,), -INF)
    ids = ids.masked_fill(~present.unsqueeze(1), -1)
    values = values.masked_fill(~present.unsqueeze(1), -INF)
    return Rows(ids, values, tail.masked_fill(~present, -INF), kind, present)


def dense(rows, width=V):
    """(N, V + 1) float64 probabilities, the tail last."""
    out = torch.zeros(len(rows), width + 2, dtype=torch.float64)
    out.scatter_add_(1, rows.ids.masked_fill(rows.ids < 0, width + 1), rows.log_probs.double().exp())
    return torch.cat([out[:, :width], rows.tail.double().exp().unsqueeze(1)], 1)


def same(a, b, tolerance=1e-6):
    assert torch.equal(a.present, b.present)
    torch.testing.assert_close(dense(a)[a.present], dense(b)[a.present], atol=tolerance, rtol=0)


def scores(m, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(m, N, generator=g) + 0.5, torch.rand(m, N, generator=g) * 3 + 1


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_one_teacher_is_itself(name, kind):  # F1, alone and where the other has no target
    one, two = teacher(kind, 1), teacher(kind, 2, missing=range(N))
    same(RULES[name]([one], *scores(1)), one)
    per_byte, per_token = scores(2)
    unread = torch.tensor([[0.0], [math.nan]])  # a teacher that did not read the window has no score
    same(RULES[name]([one, two], per_byte + unread, per_token + unread), one)
    same(RULES[name]([two, one], per_byte + unread.flip(0), per_token + unread.flip(0)), one)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_same_teacher_twice_is_that_teacher(name, kind):  # F2
    one = teacher(kind, 1, missing=[3])
    same(RULES[name]([one, one], *scores(2)), one)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_order_of_teachers_does_not_matter(name, kind):  # F3
    three = [teacher(kind, s, missing=[s]) for s in (1, 2, 3)]
    per_byte, per_token = scores(3)
    order = [2, 0, 1]
    same(
        RULES[name](three, per_byte, per_token),
        RULES[name]([three[m] for m in order], per_byte[order], per_token[order]),
    )


@pytest.mark.parametrize("name", ["mixture", "geometric", "weighted"])
@pytest.mark.parametrize("kind", ["sampled", "truncated", "whole"])
def test_all_weight_on_one_teacher_gives_that_teacher(name, kind):  # F4
    if (name, kind) in CASES:
        a, b = teacher(kind, 1, missing=[0]), teacher(kind, 2, missing=[4])
        fused = RULES[name]([a, b], *scores(2), weights=(0.0, 2.0))
        same(fused, b)
        assert not fused.present[4]  # a teacher of weight 0 does not step in


@pytest.mark.parametrize("kind", ["sampled", "truncated", "whole"])
@pytest.mark.parametrize("unit", ["byte", "token"])
def test_cold_average_is_the_minimum(kind, unit):  # F4
    three = [teacher(kind, s) for s in (1, 2, 3)]
    s = scores(3)
    same(avg_ce(three, *s, unit=unit, temperature=1e-6), min_ce(three, *s, unit=unit))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["truncated", "whole", "sampled"]), st.integers(1, V), st.integers(1, V))
def test_mass_is_conserved(seed, kind, k, other):  # M1, M2
    for name in (n for n, allowed in CASES if allowed == kind):
        fused = RULES[name]([teacher(kind, seed, k), teacher(kind, seed + 1, other, missing=[1])], *scores(2, seed))
        mass = fused.mass()[fused.present]
        torch.testing.assert_close(mass, torch.ones_like(mass), atol=1e-5, rtol=0)
        for row in fused.ids:
            named = row[row >= 0].tolist()
            assert len(named) == len(set(named))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.01, 0.99), st.integers(1, V))
def test_a_mixture_of_truncated_rows_is_a_true_coarsening(seed, w, k):
    a, b = teacher("truncated", seed, k), teacher("truncated", seed + 1, 5)
    fused = mixture([a, b], *scores(2), weights=(w, 1 - w))
    truth = w * logs(seed).double().exp() + (1 - w) * logs(seed + 1).double().exp()
    for t in range(N):
        ids = fused.ids[t][fused.ids[t] >= 0]
        assert set(ids.tolist()) == set(a.ids[t].tolist()) & set(b.ids[t].tolist())
        torch.testing.assert_close(
            fused.log_probs[t][fused.ids[t] >= 0].double().exp(), truth[t, ids], atol=1e-6, rtol=0
        )
        rest = truth[t].sum() - truth[t, ids].sum()
        assert abs(fused.tail[t].double().exp() - rest) < 1e-6 or not fused.present[t]


@pytest.mark.parametrize("kind", ["whole", "sampled"])
def test_a_mixture_is_the_weighted_sum(kind):
    a, b = teacher(kind, 1), teacher(kind, 2)
    fused = mixture([a, b], *scores(2), weights=(3, 1))
    torch.testing.assert_close(dense(fused), 0.75 * dense(a) + 0.25 * dense(b), atol=1e-7, rtol=0)
    assert (fused.log_probs.diff(dim=1)[fused.ids[:, 1:] >= 0] <= 0).all()  # heaviest first


def test_pooled_draws_are_unbiased():  # M4 for the mixture, 16 draws of each teacher in 6000 rows
    n = 6000
    p = [logs(s, 1).exp() for s in (1, 2)]
    pools = []
    for seed, q in enumerate(p):
        drawn = torch.multinomial(q.expand(n, V), 16, True, generator=torch.Generator().manual_seed(seed))
        counts = torch.zeros(n, V).scatter_add(1, drawn, torch.ones(n, 16))
        ids = torch.arange(V).expand(n, V).masked_fill(counts == 0, -1)
        present = torch.ones(n, dtype=torch.bool)
        pools.append(Rows(ids, (counts / 16).log(), torch.full((n,), -INF), "sampled", present))
    nats = torch.ones(2, n)
    mean = dense(mixture(pools, nats, nats, weights=(0.7, 0.3))).mean(0)[:V]
    truth = 0.7 * p[0][0] + 0.3 * p[1][0]
    assert (mean - truth).abs().max() < 0.005


def test_a_whole_teacher_knows_the_zeros_of_a_truncated_one_s_list():
    some = Rows(torch.tensor([[0, 5]]), torch.tensor([[0.5, 0.3]]).log(), torch.tensor([0.2]).log(), "truncated",
                torch.ones(1, dtype=torch.bool))  # fmt: skip
    every = Rows(torch.tensor([[0, 1]]), torch.tensor([[0.9, 0.1]]).log(), torch.tensor([-INF]), "whole",
                 torch.ones(1, dtype=torch.bool))  # fmt: skip
    nats = torch.ones(2, 1)
    fused = mixture([some, every], nats, nats)
    expected = torch.zeros(1, V + 1, dtype=torch.float64)
    expected[0, [0, 5, V]] = torch.tensor([0.7, 0.15, 0.15], dtype=torch.float64)  # bucket 1 is in the tail
    assert fused.kind == "truncated"
    torch.testing.assert_close(dense(fused), expected, atol=1e-6, rtol=0)
    pooled = geometric([some, every], nats, nats)  # what either gives nothing has nothing
    masses = [math.sqrt(0.5 * 0.9), math.sqrt(0.2 * 0.1)]
    expected[0, [0, 5, V]] = torch.tensor([masses[0], 0.0, masses[1]], dtype=torch.float64) / sum(masses)
    torch.testing.assert_close(dense(pooled), expected, atol=1e-6, rtol=0)


def test_geometric_of_whole_rows_is_exact():
    a, b = logs(1), logs(2)
    fused = geometric([Rows.whole(a), Rows.whole(b)], *scores(2), weights=(3, 1))
    expected = torch.softmax(0.75 * a.double() + 0.25 * b.double(), 1)
    torch.testing.assert_close(dense(fused)[:, :V], expected, atol=1e-6, rtol=0)


def test_geometric_of_truncated_rows_pools_the_rest_as_one_bucket():
    a, b = teacher("truncated", 1), teacher("truncated", 2)
    fused = geometric([a, b], *scores(2))
    for t in range(N):
        ids = sorted(set(a.ids[t].tolist()) & set(b.ids[t].tolist()))
        coarse = [
            torch.cat([p[t, ids], 1 - p[t, ids].sum().view(1)])
            for p in (logs(1).double().exp(), logs(2).double().exp())
        ]
        product = (coarse[0] * coarse[1]).sqrt()
        torch.testing.assert_close(dense(fused)[t, [*ids, V]], product / product.sum(), atol=1e-5, rtol=0)


def test_no_common_bucket_is_no_target():
    def only(i, tail):
        return Rows(torch.tensor([[i]]), torch.tensor([[0.0]]), torch.tensor([tail]), "truncated", torch.tensor([True]))

    nats = torch.ones(2, 1)
    for tail in (-INF, -20.0):
        assert not geometric([only(1, tail), only(2, tail)], nats, nats).present.any()
    assert not mixture([only(1, -20.0), only(2, -20.0)], nats, nats).present.any()
    # complete rows know that the other's bucket has nothing of theirs
    torch.testing.assert_close(
        dense(mixture([only(1, -INF), only(2, -INF)], nats, nats))[0, [1, 2, V]],
        torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64),
    )


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.floats(0.01, 1.0), min_size=3, max_size=3))
def test_cross_entropy_of_a_mixture_is_convex(seed, weights):  # F5: -log of the mixture <= mean of -logs <= the largest
    three = [teacher("whole", seed + m) for m in range(3)]
    w = torch.tensor(weights).double() / sum(weights)
    ce = -torch.stack([dense(t)[:, :V].log() for t in three])  # of every token that could be the truth
    fused = -dense(mixture(three, *scores(3), weights=weights))[:, :V].log()
    mean = (w.view(3, 1, 1) * ce).sum(0)
    assert (fused <= mean + 1e-6).all() and (mean <= ce.amax(0) + 1e-6).all()


@pytest.mark.parametrize("rule", [min_ce, avg_ce])
def test_weights_do_not_depend_on_how_fine_a_tokenizer_is(rule):  # F6
    two = [teacher("whole", 1), teacher("whole", 2)]
    nats, content, tokens = torch.tensor([[30.0], [33.0]]), 40, torch.tensor([[10.0], [10.0]])
    finer = torch.tensor([[10.0], [20.0]])  # the second teacher says the same with twice as many tokens
    at = {n: ((nats / content).expand(2, N), (nats / n_tokens).expand(2, N))
          for n, n_tokens in (("coarse", tokens), ("fine", finer))}  # fmt: skip
    same(rule(two, *at["coarse"]), rule(two, *at["fine"]))
    by_token = [dense(rule(two, *at[n], unit="token")) for n in at]
    assert (by_token[0] - by_token[1]).abs().max() > 1e-3  # the published rule changes its mind


def test_min_ce_by_hand():
    three = [teacher("truncated", s, missing=[0] if s == 2 else []) for s in (1, 2, 3)]
    per_byte = torch.tensor([[0.9], [0.2], [0.7]]).repeat(1, N)
    per_byte[:, 1] = torch.tensor([0.5, 0.5, 0.5])  # a tie goes to the first
    per_byte[:, 2] = torch.tensor([0.5, math.nan, 0.4])
    per_byte[:, 3] = math.nan
    fused = min_ce(three, per_byte, torch.ones(3, N))
    assert fused.present.tolist() == [False] + [True] * (N - 1)  # the best has no target, nobody steps in
    chosen = [0, 2, 0] + [1] * (N - 4)
    for t, m in enumerate(chosen, 1):
        assert torch.equal(fused.ids[t], three[m].ids[t]) and torch.equal(fused.log_probs[t], three[m].log_probs[t])
        assert fused.tail[t] == three[m].tail[t]
    by_token = min_ce(three, per_byte, per_byte.flip(0), unit="token")
    assert torch.equal(by_token.ids[5], three[1].ids[5])


def test_avg_ce_by_hand():
    a, b = teacher("whole", 1), teacher("whole", 2)
    per_byte, per_token = torch.tensor([[LOG2], [2 * LOG2]]).expand(2, N), torch.tensor([[1.0], [2.0]]).expand(2, N)
    w = 1 / (1 + math.exp(-1 / 0.5))  # 1 against 2 bits per byte
    fused = avg_ce([a, b], per_byte, per_token, temperature=0.5)
    torch.testing.assert_close(dense(fused), w * dense(a) + (1 - w) * dense(b), atol=1e-6, rtol=0)
    r = [math.exp(math.exp(-1)), math.exp(math.exp(-2))]
    fused = avg_ce([a, b], per_byte, per_token, unit="token")
    torch.testing.assert_close(dense(fused), (r[0] * dense(a) + r[1] * dense(b)) / sum(r), atol=1e-6, rtol=0)
    unscored = per_byte.clone()
    unscored[1, 0], unscored[:, 1] = math.nan, math.nan
    fused = dense(avg_ce([a, b], unscored, per_token))
    torch.testing.assert_close(fused[0], dense(a)[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(fused[1], (dense(a) + dense(b))[1] / 2, atol=1e-6, rtol=0)


@pytest.mark.parametrize("score", ["entropy", "max_prob"])
def test_weighted_by_hand(score):
    a, b = teacher("truncated", 1), teacher("truncated", 2)
    full = [dense(x) for x in (a, b)]
    sure = [(p * p.clamp(min=1e-300).log()).sum(1) if score == "entropy" else p[:, :V].amax(1) for p in full]
    w = torch.softmax(torch.stack([sure[0] / 0.3 + math.log(3), sure[1] / 0.3]), 0)
    fused = weighted([a, b], *scores(2), weights=(3, 1), score=score, temperature=0.3)
    for t in range(N):
        ids = sorted(set(a.ids[t].tolist()) & set(b.ids[t].tolist()))
        expected = w[0, t] * full[0][t, ids] + w[1, t] * full[1][t, ids]
        torch.testing.assert_close(dense(fused)[t, ids], expected, atol=1e-6, rtol=0)


def test_no_target_anywhere_stays_none():
    for name, rule in RULES.items():
        nothing = teacher("truncated", 1, missing=range(N))
        fused = rule([nothing, nothing], torch.full((2, N), math.nan), torch.full((2, N), math.nan))
        assert not fused.present.any() and (fused.ids < 0).all() and not fused.tail.isnan().any(), name


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda a, s: geometric([a["sampled"]] * 2, *s), "geometric has no unbiased result from sampled targets"),
        (lambda a, s: weighted([a["sampled"]] * 2, *s), "weighted has no unbiased result from sampled targets"),
        (lambda a, s: mixture([a["sampled"], a["whole"]], *s), "mixture cannot fuse sampled with whole targets"),
        (lambda a, s: min_ce([a["sampled"], a["truncated"]], *s), "record all teachers by one rule"),
        (lambda a, s: min_ce([a["whole"]] * 2, *s, unit="bite"), "allowed are byte, token; did you mean 'byte'"),
        (lambda a, s: weighted([a["whole"]] * 2, *s, score="entropi"), "did you mean 'entropy'"),
        (lambda a, s: mixture([a["whole"]] * 2, *s, weights=(1.0,)), "1 weights for 2 teachers"),
        (lambda a, s: mixture([a["whole"]] * 2, *s, weights=(-1.0, 2.0)), "not negative, and not all 0"),
        (lambda a, s: avg_ce([a["whole"]] * 2, *s, temperature=0.0), "temperature is 0.0; it must be above 0"),
        (lambda a, s: avg_ce([a["whole"]] * 3, *s), r"shape \(teachers, positions\) = \(3, 12\), got \(2, 12\)"),
        (lambda a, s: mixture([], *s), "mixture has no teacher to fuse"),
    ],
)  # fmt: skip
def test_bad_input_gets_a_sentence(call, sentence):
    rows = {kind: teacher(kind, 1) for kind in ("sampled", "truncated", "whole")}
    with pytest.raises(ValueError, match=sentence):
        call(rows, scores(2))
