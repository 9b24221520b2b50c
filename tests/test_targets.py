"""What is kept of a distribution is unbiased and whole, what is stored comes back, what is damaged is refused."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusion._pack import FLOOR, GRID, pack, unpack
from fusion.targets import DocumentTargets, Header, Rule, Store, Writer, select, text_digest, uniforms

RULES = {
    "draws": Rule(draws=16),
    "one draw": Rule(draws=1),
    "k = 1": Rule(top_k=1),
    "k = 7": Rule(top_k=7),
    "k = V": Rule(top_k=300),
    "nucleus": Rule(nucleus=0.9, cap=20),
    "whole nucleus": Rule(nucleus=1.0, cap=300),
}


def logits_of(rows: int, vocabulary: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def row_mass(entries) -> np.ndarray:
    owner = np.repeat(np.arange(len(entries.lengths)), entries.lengths.numpy())
    mass = np.bincount(owner, weights=np.exp(entries.log_probs.double().numpy()), minlength=len(entries.lengths))
    return mass + np.exp(entries.tail.double().numpy())


def document(rule: Rule, vocabulary: int = 300, rows: int = 40, seed: int = 0, scale: float = 3.0) -> DocumentTargets:
    """A document whose row 0 and row 5 have no prediction."""
    generator = np.random.default_rng(seed)
    entries = select(logits_of(rows, vocabulary, seed, scale), rule, torch.from_numpy(generator.random(rows)))
    lengths, ids, log_probs, tail, normaliser = (column.numpy() for column in entries)
    nll = generator.exponential(3.0, rows).astype(np.float32)
    owner = np.repeat(np.arange(rows), lengths)
    kept = ~np.isin(owner, [0, 5])
    lengths[[0, 5]], nll[[0, 5]], tail[[0, 5]] = 0, np.nan, -np.inf
    return DocumentTargets(
        ids=generator.integers(vocabulary, size=rows),
        ends=np.cumsum(generator.choice([0, 1, 3, 4, 300], rows)),
        nll=nll,
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        entry_ids=ids[kept],
        entry_log_probs=log_probs[kept],
        tail=tail,
    )


def header(rule: Rule, vocabulary: int = 300, **changes) -> Header:
    plain = Header("t", "m" * 32, "k" * 32, rule, "float32", vocabulary, max_length=64, batch_tokens=256, seed=0)
    return replace(plain, **changes)


def canonical(said: DocumentTargets) -> tuple[np.ndarray, np.ndarray]:
    owner = np.repeat(np.arange(len(said.ids)), np.diff(said.offsets))
    order = np.lexsort((said.entry_ids, -said.entry_log_probs, owner))
    return said.entry_ids[order], said.entry_log_probs[order]


def close(read: DocumentTargets, said: DocumentTargets, kind: str) -> None:
    """Ids are the same bit for bit, log-probabilities within the bound of the format."""
    ids, log_probs = canonical(said)
    log_probs = np.maximum(log_probs, FLOOR)
    for name in ("ids", "ends", "offsets"):
        np.testing.assert_array_equal(getattr(read, name), getattr(said, name))
    np.testing.assert_array_equal(read.entry_ids, ids)
    if kind == "sampled":
        np.testing.assert_array_equal(read.entry_log_probs, log_probs)
    else:
        assert np.abs(read.entry_log_probs - log_probs).max(initial=0) <= GRID + 3e-5 < 0.02
    np.testing.assert_array_equal(np.isneginf(read.tail), np.isneginf(said.tail))
    tailed = np.isfinite(said.tail)
    assert np.abs(read.tail[tailed] - np.maximum(said.tail[tailed], FLOOR)).max(initial=0) <= GRID + 3e-5
    np.testing.assert_allclose(read.nll, said.nll, rtol=2**-11)


# ------------------------------------------------------------------------------------------------ what is kept


@pytest.mark.parametrize("name", RULES)
def test_entries_and_tail_add_up_to_one_before_and_after_the_store(name: str) -> None:  # M1
    rule = RULES[name]
    entries = select(logits_of(40, 300), rule, torch.rand(40, dtype=torch.float64))
    np.testing.assert_allclose(row_mass(entries), 1, atol=1e-5)
    said = document(rule)
    read = unpack(pack(said, rule.kind(300), rule.draws, 300))
    owner = np.repeat(np.arange(40), np.diff(read.offsets))
    mass = np.bincount(owner, weights=np.exp(read.entry_log_probs.astype(float)), minlength=40)
    present = np.diff(read.offsets) > 0
    np.testing.assert_allclose((mass + np.exp(read.tail.astype(float)))[present], 1, atol=1e-5)


def test_draws_are_unbiased_and_counts_are_floor_or_ceiling() -> None:  # M4
    rows, vocabulary, draws = 100_000, 40, 16
    logits = logits_of(1, vocabulary, scale=2.0)
    p = torch.softmax(logits.double(), dim=1)[0].numpy()
    u = uniforms(3, "0123456789abcdef" * 2, rows)
    entries = select(logits.expand(rows, vocabulary), Rule(draws=draws), torch.from_numpy(u))
    owner = np.repeat(np.arange(rows), entries.lengths.numpy())
    counts = np.zeros((rows, vocabulary), np.int64)
    counts[owner, entries.ids.numpy()] = np.rint(np.exp(entries.log_probs.numpy()) * draws)
    assert (counts.sum(axis=1) == draws).all()
    assert ((counts == np.floor(draws * p)) | (counts == np.ceil(draws * p))).all()
    error = counts.mean(axis=0) / draws - p
    fraction = draws * p - np.floor(draws * p)  # a count is Bernoulli around its floor
    deviation = np.sqrt(fraction * (1 - fraction) / rows) / draws
    assert (np.abs(error) <= 5 * deviation + 1e-12).all()
    # what independent draws would do: p (1 - p) / draws a row; never more than that here, and mostly much less
    assert (counts / draws).var(axis=0).sum() < 0.5 * (p * (1 - p) / draws).sum()


@given(st.integers(1, 700), st.integers(1, 40), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_draws_follow_the_cumulative_sum(vocabulary: int, draws: int, seed: int) -> None:
    logits = logits_of(3, vocabulary, seed, scale=4.0)
    u = np.random.default_rng(seed).random(3)
    entries = select(logits, Rule(draws=draws), torch.from_numpy(u))
    mass = np.exp((logits - logits.amax(1, keepdim=True)).numpy()).astype(np.float64)
    sums = np.cumsum(mass, axis=1)
    start = 0
    for row in range(3):
        at = (u[row] + np.arange(draws)) / draws * sums[row, -1]
        expected, counts = np.unique(np.searchsorted(sums[row], at, side="right"), return_counts=True)
        stop = start + int(entries.lengths[row])
        np.testing.assert_array_equal(entries.ids[start:stop].numpy(), expected)
        np.testing.assert_allclose(entries.log_probs[start:stop].exp().numpy() * draws, counts, rtol=1e-5)
        start = stop


def test_the_edges_of_the_unit_interval_draw_tokens_with_mass() -> None:
    logits = torch.full((2, 600), -1e4)
    logits[:, 256:300] = 0.0  # nothing before and nothing after has any mass in float32
    edge = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    entries = select(logits, Rule(draws=50), edge)
    assert 256 <= int(entries.ids.min()) and int(entries.ids.max()) < 300
    np.testing.assert_allclose(row_mass(entries), 1, atol=1e-6)


def test_truncated_entries_are_the_true_log_probabilities() -> None:
    logits = logits_of(5, 1000)
    entries = select(logits, Rule(top_k=9), torch.zeros(5, dtype=torch.float64))
    values, ids = torch.log_softmax(logits.double(), dim=1).topk(9)
    np.testing.assert_array_equal(entries.ids.numpy(), ids.flatten().numpy())
    np.testing.assert_allclose(entries.log_probs.numpy(), values.flatten().numpy(), atol=1e-5)
    np.testing.assert_allclose(entries.tail.numpy(), np.log1p(-values.exp().sum(1).numpy()), atol=1e-4)


def test_a_nucleus_is_the_smallest_set_with_its_mass_or_the_cap() -> None:
    logits = logits_of(200, 100)
    entries = select(logits, Rule(nucleus=0.8, cap=12), torch.zeros(200, dtype=torch.float64))
    ordered = torch.softmax(logits.double(), dim=1).sort(dim=1, descending=True).values.numpy()
    smallest = (np.cumsum(ordered, axis=1) < 0.8).sum(axis=1) + 1
    np.testing.assert_array_equal(entries.lengths.numpy(), np.minimum(smallest, 12))


def test_a_peaked_row_keeps_the_digits_of_its_tail() -> None:
    logits = torch.zeros(1, 1000)
    logits[0, 0] = 30.0  # 1 - p has no digit left in float32
    entries = select(logits, Rule(top_k=1), torch.zeros(1, dtype=torch.float64))
    assert abs(float(entries.tail[0]) - (np.log(999) - 30)) < 1e-4


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("rule", [Rule(draws=4), Rule(top_k=4), Rule(nucleus=0.9)])
def test_a_row_that_is_not_finite_is_marked_and_its_neighbours_are_not(value: float, rule: Rule) -> None:
    logits = logits_of(3, 50)
    logits[1, 7] = value
    entries = select(logits, rule, torch.rand(3, dtype=torch.float64))
    assert torch.isfinite(entries.normaliser).tolist() == [True, False, True]


def test_uniforms_are_uniform_and_depend_on_seed_document_and_row() -> None:
    u = uniforms(0, "ab" * 16, 20_000)
    assert 0 <= u.min() and u.max() < 1 and abs(u.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.03
    np.testing.assert_array_equal(u[:100], uniforms(0, "ab" * 16, 100))
    for other in (uniforms(1, "ab" * 16, 100), uniforms(0, "ab" * 15 + "ac", 100), uniforms(0, "bb" + "ab" * 15, 100)):
        assert not (other == u[:100]).any()


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"draws": 16, "top_k": 4}, "draws and top_k are both given"),
        ({"draws": 0}, "draws is 0; it must be positive"),
        ({"nucleus": 1.5}, r"nucleus \(1.5\) in \(0, 1\]"),
        ({"nucleus": 0.9, "cap": 0}, r"cap \(0\) at least 1"),
    ],
)
def test_a_rule_that_can_not_be_followed_is_a_sentence(fields: dict, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Rule.of(**fields)


def test_sixteen_draws_are_the_default_and_kinds_are_named() -> None:
    assert Rule.of() == Rule(draws=16)
    kinds = [Rule.of(**f).kind(50) for f in ({"draws": 3}, {"top_k": 49}, {"top_k": 50}, {"nucleus": 0.5})]
    assert kinds == ["sampled", "truncated", "whole", "truncated"]


# ------------------------------------------------------------------------------------------------ the format


@given(st.sampled_from(sorted(RULES)), st.integers(0, 10**6), st.sampled_from([0.01, 3.0, 60.0]))
@settings(max_examples=60, deadline=None)
def test_what_is_packed_comes_back(name: str, seed: int, scale: float) -> None:  # C1
    rule = RULES[name]
    said = document(rule, seed=seed, scale=scale)
    close(unpack(pack(said, rule.kind(300), rule.draws, 300)), said, rule.kind(300))


@pytest.mark.parametrize("vocabulary", [1, 2, 256, 257, 65536, 65537, 262144])
def test_every_width_of_ids_comes_back(vocabulary: int) -> None:
    said = document(Rule(draws=8), vocabulary=vocabulary, rows=8)
    close(unpack(pack(said, "sampled", 8, vocabulary)), said, "sampled")


def test_an_empty_document_comes_back() -> None:
    none = np.zeros(0, np.int64)
    empty = DocumentTargets(none, none, np.zeros(0, np.float32), np.zeros(1, np.int64), none, np.zeros(0), np.zeros(0))
    for kind, draws in (("sampled", 16), ("truncated", 0)):
        read = unpack(pack(empty, kind, draws, 100))
        assert len(read.ids) == len(read.entry_ids) == len(read.tail) == 0 and read.offsets.tolist() == [0]


def test_log_probabilities_far_down_are_stored_at_the_floor() -> None:
    said = document(Rule(top_k=300), scale=500.0)
    read = unpack(pack(said, "whole", 0, 300))
    expected = np.maximum(canonical(said)[1], -200)
    assert np.abs(read.entry_log_probs - expected).max() <= GRID + 1e-4
    assert np.isfinite(read.entry_log_probs).all()


def test_bytes_a_token_stay_below_the_budget_on_peaked_distributions(
    tmp_path: Path,
) -> None:  # C6; bench/store.py: real
    limits = {Rule(draws=16): 24, Rule(top_k=10): 36, Rule(top_k=50): 160}
    rows, vocabulary = 400, 49152
    generator = torch.Generator().manual_seed(0)
    ranks = torch.log(torch.arange(1, vocabulary + 1, dtype=torch.float32))  # Zipf: about what a model's rows look like
    logits = -1.3 * ranks + torch.randn(rows, vocabulary, generator=generator)
    for rule, limit in limits.items():
        chance = torch.rand(rows, generator=generator, dtype=torch.float64)
        lengths, ids, log_probs, tail, _ = (column.numpy() for column in select(logits, rule, chance))
        said = DocumentTargets(
            ids=ids[np.cumsum(lengths) - lengths],
            ends=4 * np.arange(rows),
            nll=np.random.default_rng(0).exponential(3.0, rows).astype(np.float32),
            offsets=np.concatenate([[0], np.cumsum(lengths)]),
            entry_ids=ids,
            entry_log_probs=log_probs,
            tail=tail,
        )
        writer = Writer(tmp_path / str(limit), header(rule, vocabulary))
        writer.write(0, {"0" * 32: (said, np.ones(rows, bool))})
        assert writer.finish(1, tmp_path).bytes_per_token <= limit


# ------------------------------------------------------------------------------------------------ the store


@pytest.fixture
def store(tmp_path: Path) -> tuple[Path, dict[str, DocumentTargets]]:
    """Three shards of two documents each, with a tokenizer."""
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "tokenizer.json").write_text("{}")
    writer = Writer(tmp_path / "store", header(Rule(top_k=7)))
    documents = {f"{n:032x}": document(Rule(top_k=7), seed=n) for n in range(6)}
    for shard in range(3):
        keys = list(documents)[2 * shard : 2 * shard + 2]
        writer.write(shard, {key: (documents[key], np.ones(40, bool)) for key in keys})
    writer.finish(3, tmp_path / "teacher")
    return tmp_path / "store", documents


def test_documents_are_read_by_their_digest(store) -> None:
    path, documents = store
    read = Store.open(path, model="m" * 32, tokenizer="k" * 32, text=text_digest(reversed(list(documents))))
    read.verify()
    assert list(read) == list(documents) and len(read) == 6 and "f" * 32 not in read
    for digest, said in documents.items():
        close(read[digest], said, "truncated")
    assert read.kind == "truncated" and (read.tokenizer / "tokenizer.json").exists()
    assert read.header.tokens == 240 and read.header.documents == 6 and read.header.rows == 6 * 38
    files = [*path.glob("*.safetensors"), *path.glob("0*.json")]
    assert read.header.bytes == sum(file.stat().st_size for file in files)
    assert not list(path.glob("*.part"))
    with pytest.raises(KeyError, match="has no document ffff"):
        read["f" * 32]


def test_a_store_goes_to_worker_processes(store) -> None:
    path, documents = store
    read = Store.open(path)
    digest = next(iter(documents))
    assert read[digest].ids.tolist() == pickle.loads(pickle.dumps(read))[digest].ids.tolist()
    loader = torch.utils.data.DataLoader(_Tokens(read, list(documents)), num_workers=1, batch_size=None)
    assert [len(ids) for ids in loader] == [40] * 6


class _Tokens(torch.utils.data.Dataset):
    def __init__(self, store: Store, digests: list[str]):
        self.store, self.digests = store, digests

    def __len__(self) -> int:
        return len(self.digests)

    def __getitem__(self, n: int) -> np.ndarray:
        return self.store[self.digests[n]].ids


@pytest.mark.parametrize("what", ["model", "tokenizer", "text"])
def test_another_digest_is_refused(store, what: str) -> None:  # C3
    with pytest.raises(ValueError, match=f"was recorded from another {what} .* asked for {'0' * 32}"):
        Store.open(store[0], **{what: "0" * 32})


def test_an_unfinished_store_and_another_version_are_refused(store) -> None:
    path, _ = store
    content = json.loads((path / "store.json").read_text())
    content["header"]["version"] = 99
    (path / "store.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is a store of version 99, this fusion reads 1"):
        Store.open(path)
    (path / "store.json").unlink()
    with pytest.raises(ValueError, match="is no finished store of targets: it has no store.json"):
        Store.open(path)


def test_a_damaged_shard_is_named(store) -> None:  # C5
    path, documents = store
    place = path / "00001.safetensors"
    content = bytearray(place.read_bytes())
    content[-5] ^= 1
    place.write_bytes(content)
    read = Store.open(path)
    read[list(documents)[0]]  # another shard
    with pytest.raises(ValueError, match="00001.safetensors is corrupt"):
        read[list(documents)[2]]
    with pytest.raises(ValueError, match="00001.safetensors is corrupt"):
        Store.open(path).verify()
    place.write_bytes(content[:-1])
    with pytest.raises(ValueError, match="00001.safetensors is .* bytes long instead of"):
        Store.open(path)
    place.unlink()
    with pytest.raises(ValueError, match="00001.safetensors is missing"):
        Store.open(path)


def test_a_shard_counts_as_complete_only_whole_and_for_the_same_settings(store) -> None:
    path, documents = store
    digests = list(documents)[:2]
    assert Writer(path, header(Rule(top_k=7))).complete(0, digests)
    assert not Writer(path, header(Rule(top_k=8))).complete(0, digests)
    assert not Writer(path, header(Rule(top_k=7), seed=1)).complete(0, digests)
    assert not Writer(path, header(Rule(top_k=7))).complete(0, digests[::-1])
    assert not Writer(path, header(Rule(top_k=7))).complete(3, digests)
    (path / "00000.safetensors").write_bytes(b"half of it")
    assert not Writer(path, header(Rule(top_k=7))).complete(0, digests)
