"""Bits per byte and BLiMP against brute force, and evaluate over models, metrics, domains and ranks."""

import json
import math
import multiprocessing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from fusion import _scratch, sources
from fusion.data import Document, encode
from fusion.job import Job
from fusion.metrics._score import windows
from fusion.metrics.bits_per_byte import bits_per_byte, standard_error
from fusion.metrics.blimp import blimp
from fusion.recipe import DataRef, ModelRef, Recipe
from fusion.steps import evaluate as step

TEXT = [
    "The quick brown fox jumps over the lazy dog; they are there, and thereafter the others followed them home.",
    "Die Straße führt über die Brücke. Größe, Übermut und Käse täuschen nicht. 日本語 😀",
    "def add(a, b):\n    return a + b  # 201 items\n\nfor i in range(10):\n\tprint(i)\n",
    "x",
    "In the beginning was the word, and the word was with the reader, and the reader was without a word. " * 3,
]
CONFIGS = {
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gpt2": {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 512},
}
KINDS = [("llama", "bpe"), ("gpt2", "unigram"), ("llama", "bytes"), ("gpt2", "wordpiece")]


@pytest.fixture(scope="module")
def made():
    """(model, tokenizer) of an architecture and a kind of tokenizer; weights large enough to have opinions."""
    known = {}

    def make(architecture="llama", kind="bpe"):
        if (architecture, kind) not in known:
            tokenizer = _scratch.fast(_scratch.train(kind, 420, TEXT * 4))
            config = {"model_type": architecture, **CONFIGS[architecture]}
            model = _scratch.initialise("m", config, tokenizer, 0, "models.m").eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() > 1:
                        parameter.mul_(5.0)
            known[architecture, kind] = (model, tokenizer)
        return known[architecture, kind]

    return make


DOCUMENTS = [Document.of(text) for text in TEXT]


def brute(model, ids: list[int], first: int) -> float:
    """Nats of ids[first:], one whole forward pass, in float64."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double()
    return -sum(logits[t - 1].log_softmax(-1)[ids[t]].item() for t in range(max(first, 1), len(ids)))


# ---------------------------------------------------------------------------------------------- bits per byte


@pytest.mark.parametrize("architecture, kind", KINDS)
def test_bits_per_byte_equals_brute_force(made, architecture, kind):
    model, tokenizer = made(architecture, kind)
    nats, size, tokens = 0.0, 0, 0
    for text in TEXT:
        ids = tokenizer(text)["input_ids"]  # <bos> and the text: the end token is not scored
        nats += brute(model, ids, 1)
        size += len(text.encode())
        tokens += len(ids) - 1
    found = bits_per_byte(model, tokenizer, DOCUMENTS)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert (found["bytes"], found["tokens"], found["documents"]) == (size, tokens, len(TEXT))
    assert found["tokens_per_byte"] == pytest.approx(tokens / size)


def test_batches_and_wide_windows_change_nothing(made):
    model, tokenizer = made()
    expected = bits_per_byte(model, tokenizer, DOCUMENTS)["bits_per_byte"]
    for tokens in (1, 100, 10**6):
        got = bits_per_byte(model, tokenizer, DOCUMENTS, batch_tokens=tokens)["bits_per_byte"]
        assert got == pytest.approx(expected, rel=1e-6)
    longest = max(len(encode(tokenizer, document).ids) for document in DOCUMENTS)
    for window, stride in ((longest, 1), (longest + 1, longest), (512, 500)):
        got = bits_per_byte(model, tokenizer, DOCUMENTS, window=window, stride=stride)["bits_per_byte"]
        assert got == pytest.approx(expected, rel=1e-6)
    assert bits_per_byte(model, tokenizer, DOCUMENTS) == bits_per_byte(model, tokenizer, DOCUMENTS)


def test_order_of_documents_does_not_matter(made):
    model, tokenizer = made()
    there, back = (bits_per_byte(model, tokenizer, docs) for docs in (DOCUMENTS, DOCUMENTS[::-1]))
    assert there["bits_per_byte"] == pytest.approx(back["bits_per_byte"], rel=1e-7)


@pytest.mark.parametrize(
    "total, window, stride", [(1, 8, 4), (8, 8, 4), (9, 8, 4), (50, 8, 7), (50, 8, 1), (51, 10, 3)]
)
def test_windows_score_every_row_once_with_enough_context(total, window, stride):
    ids = np.arange(100, 100 + total)
    found = windows(0, ids, np.ones(total, bool), window, stride)
    assert sorted(row for piece in found for row in piece.rows) == list(range(1, total))
    for piece in found:
        assert len(piece.ids) <= window and piece.ids[0] == 100
        for row in piece.rows:
            place = row - piece.offset
            assert piece.ids[place] == ids[row]
            assert place >= min(row, window - stride)


def test_long_documents_equal_brute_force_over_windows(made):
    model, tokenizer = made()
    ids = tokenizer(TEXT[4])["input_ids"]
    window, stride = 32, 12
    nats, done = 0.0, 1
    for stop in [window, *range(window + stride, len(ids) + stride, stride)]:
        stop = min(stop, len(ids))
        piece = [ids[0], *ids[max(1, stop - window + 1) : stop]]
        nats += brute(model, piece, len(piece) - (stop - done))
        done = stop
        if stop == len(ids):
            break
    found = bits_per_byte(model, tokenizer, [DOCUMENTS[4]], window=window, stride=stride)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / len(TEXT[4].encode()), rel=1e-5)


def test_a_short_model_gets_a_window_that_fits(made):
    tokenizer = made()[1]
    config = {"model_type": "gpt2", **CONFIGS["gpt2"], "n_positions": 16}
    model = _scratch.initialise("short", config, tokenizer, 0, "models.short").eval()
    found = bits_per_byte(model, tokenizer, DOCUMENTS)
    assert found["window"] == 16 and math.isfinite(found["bits_per_byte"])


@pytest.mark.parametrize("architecture, kind", KINDS[:3])
def test_uniform_models_pay_for_their_tokens(made, architecture, kind):
    """Equal logits cost log2(V) bits a token, whatever the tokenizer: bits per byte are tokens / bytes times that."""
    tokenizer = made(architecture, kind)[1]
    flat = _scratch.initialise("flat", {"model_type": architecture, **CONFIGS[architecture]}, tokenizer, 0, "m")
    with torch.no_grad():
        flat.get_output_embeddings().weight.zero_()
    found = bits_per_byte(flat.eval(), tokenizer, DOCUMENTS)
    assert found["bits_per_byte"] == pytest.approx(math.log2(len(tokenizer)) * found["tokens_per_byte"], rel=1e-6)


def test_two_tokenizers_of_one_distribution_agree(made):
    """A source of independent bytes, spelt by bytes and by pairs of bytes: one distribution, the same bits per byte."""
    rng = np.random.default_rng(3)
    letters, chances = "abcd", np.array([0.5, 0.25, 0.15, 0.1])
    text = "".join(rng.choice(list(letters), size=400, p=chances))
    entropy = -sum(math.log2(chances[letters.index(c)]) for c in text) / len(text)
    found = {}
    for name in ("bytes", "pairs"):
        pairs = [a + b for a in letters for b in letters] if name == "pairs" else []
        vocabulary = {token: i for i, token in enumerate([_scratch.BOS, _scratch.EOS, _scratch.PAD, *letters, *pairs])}
        raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[(p[0], p[1]) for p in pairs]))
        # Two letters at a time, so that every token is a pair.
        raw.pre_tokenizer = pre_tokenizers.Split(Regex("..?"), "isolated")
        raw.decoder = decoders.Fuse()
        tokenizer = _scratch.fast(raw)
        config = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "tie_word_embeddings": False}
        model = _scratch.initialise(name, config, tokenizer, 0, "m").eval()
        wanted = torch.full((len(vocabulary),), -40.0)
        for token in pairs or letters:
            wanted[vocabulary[token]] = math.log(math.prod(chances[letters.index(c)] for c in token))
        with torch.no_grad():  # a constant hidden state of ones, read by the head as the wanted logits
            model.transformer.ln_f.weight.zero_()
            model.transformer.ln_f.bias.fill_(1.0)
            model.lm_head.weight.copy_(wanted[:, None].expand(-1, 32) / 32)
        found[name] = bits_per_byte(model, tokenizer, [Document.of(text)])
        assert found[name]["bits_per_byte"] == pytest.approx(entropy, rel=1e-5)
    assert found["bytes"]["tokens"] == 2 * found["pairs"]["tokens"]


def test_the_first_token_without_a_start_is_charged_the_uniform_price(made):
    model, tokenizer = made("llama", "bytes")
    bare = _scratch.fast(_scratch.train("bytes", 0, []))
    bare.backend_tokenizer.post_processor = processors.ByteLevel()
    bare.bos_token = bare.eos_token = None
    ids = bare(TEXT[0])["input_ids"]
    expected = (brute(model, ids, 1) + math.log(model.config.vocab_size)) / math.log(2) / len(TEXT[0].encode())
    assert bits_per_byte(model, bare, DOCUMENTS[:1])["bits_per_byte"] == pytest.approx(expected, rel=1e-5)


def test_conversations_score_contents_only(made):
    model, tokenizer = made()
    tokenizer = _scratch.fast(tokenizer.backend_tokenizer)
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    chat = Document.of([{"role": "user", "content": "The lazy dog?"}, {"role": "assistant", "content": "Über 201."}])
    encoded = encode(tokenizer, chat)
    ids = encoded.ids.tolist()
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    nats = -sum(logits[t - 1, ids[t]].item() for t in range(1, len(ids)) if encoded.is_content[t])
    found = bits_per_byte(model, tokenizer, [chat])
    assert found["bytes"] == len("The lazy dog?Über 201.".encode())
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / found["bytes"], rel=1e-5)
    assert 0 < found["tokens"] < len(ids) - 4


def test_standard_error_is_that_of_a_ratio():
    rng = np.random.default_rng(1)
    size = rng.integers(50, 200, 400).astype(float)
    bits = size * (2.0 + 0.5 * rng.standard_normal(400))
    ratio = bits.sum() / size.sum()
    expected = math.sqrt(((bits - ratio * size) ** 2).sum()) / size.sum()  # the delta method's
    assert standard_error(bits, size) == pytest.approx(expected, rel=0.1)
    assert standard_error(bits, size) == standard_error(bits, size)


def test_bits_per_byte_sentences(made):
    model, tokenizer = made()
    with pytest.raises(ValueError, match="stride must be between 1 and window - 1"):
        bits_per_byte(model, tokenizer, DOCUMENTS, window=8, stride=8)
    with pytest.raises(ValueError, match="no text"):
        bits_per_byte(model, tokenizer, [])
    broken = _scratch.initialise("broken", {"model_type": "llama", **CONFIGS["llama"]}, tokenizer, 0, "m").eval()
    with torch.no_grad():
        broken.lm_head.weight[5] = math.nan
    with pytest.raises(ValueError, match="no finite probability in document 0"):
        bits_per_byte(broken, tokenizer, DOCUMENTS)


# ---------------------------------------------------------------------------------------------- BLiMP

PAIRS = {
    "agreement": [("The dogs bark.", "The dogs barks."), ("They are there.", "They is there."), ("Same.", "Same.")],
    "order": [("The quick fox jumps over it.", "Quick the fox over jumps it."), ("A word.", "Word a.")],
}


@pytest.fixture
def pairs(tmp_path) -> Path:
    folder = tmp_path / "pairs"
    folder.mkdir()
    for name, entries in PAIRS.items():
        lines = [json.dumps({"sentence_good": good, "sentence_bad": bad}) for good, bad in entries]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("architecture, kind", KINDS)
def test_blimp_equals_brute_force(made, pairs, architecture, kind):
    model, tokenizer = made(architecture, kind)
    expected = {}
    for name, entries in PAIRS.items():
        hits = []
        for good, bad in entries:
            a, b = (brute(model, tokenizer(text)["input_ids"], 1) for text in (good, bad))
            hits.append(0.5 if good == bad or abs(a - b) < 1e-9 else float(a < b))
        expected[name] = sum(hits) / len(hits)
    for tokens in (1, 4096):
        found = blimp(model, tokenizer, path="pairs", base=pairs.parent, batch_tokens=tokens)
        assert found["paradigms"] == pytest.approx(expected)
        assert found["accuracy"] == pytest.approx(np.mean(list(expected.values()))) and found["pairs"] == 5


def test_blimp_takes_the_first_pairs(made, pairs):
    found = blimp(*made(), path=str(pairs), limit=1)
    assert found["pairs"] == 2 and set(found["paradigms"]) == set(PAIRS)


def test_blimp_sentences(made, pairs, tmp_path):
    with pytest.raises(ValueError, match="no \\*.jsonl in"):
        blimp(*made(), path="nowhere", base=tmp_path)
    with pytest.raises(ValueError, match="limit must be at least 1"):
        blimp(*made(), path=str(pairs), limit=0)
    (pairs / "wrong.jsonl").write_text('{"sentence_good": "x"}\n')
    with pytest.raises(ValueError, match="wrong.jsonl, line 1: no sentence_bad"):
        blimp(*made(), path=str(pairs))


# ---------------------------------------------------------------------------------------------- evaluate


@pytest.fixture
def job(tmp_path, pairs) -> Job:
    """A step directory in a recipe with two models from scratch and two texts."""
    for name, text in (("english", TEXT[0]), ("code", TEXT[2])):
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    data = {
        name: DataRef(name, path=f"{name}.txt", format="text", place=f"data.{name}") for name in ("english", "code")
    }
    small = {"model_type": "llama", **CONFIGS["llama"]}
    models = {
        name: ModelRef(name, config=small, tokenizer={"train": kind, "vocab_size": 400, "data": "english"})
        for name, kind in (("a", "bpe"), ("b", "bytes"))
    }
    (tmp_path / "r.yaml").write_text("")
    recipe = Recipe(tmp_path / "r.yaml", "r", 0, models, data, (), None)
    (tmp_path / "out").mkdir()
    return Job("scores", tmp_path / "out", recipe, place="steps[0].evaluate", cache=tmp_path / "cache")


ASKED = {
    "models": ["a", "b"],
    "metrics": [{"bits_per_byte": {"window": 64, "stride": 32}}, {"blimp": {"path": "pairs", "limit": 2}}],
    "data": {"English": "english", "Python": "code"},
}


def read(job: Job) -> dict:
    return json.loads((job.directory / "metrics.json").read_text())["models"]


def test_evaluate_writes_models_metrics_domains(job, capsys):
    step.evaluate(job, **ASKED)
    found = read(job)
    assert set(found) == {"a", "b"} and set(found["a"]) == {"bits_per_byte", "blimp"}
    assert set(found["a"]["bits_per_byte"]) == {"English", "Python"}
    directory = job.model("a")
    model, tokenizer = sources.load_model(directory), sources.load_tokenizer(directory)
    expected = bits_per_byte(model, tokenizer, job.documents("code"), window=64, stride=32)
    assert found["a"]["bits_per_byte"]["Python"] == pytest.approx(expected)
    assert found["b"]["blimp"]["pairs"] == 4
    assert "Python" in capsys.readouterr().out


def test_evaluate_continues_where_it_was_killed(job, monkeypatch):
    step.evaluate(job, **ASKED)
    expected = read(job)
    items = step.plan_items(**ASKED, place="")
    assert len({item.file for item in items}) == len(items) == 6
    (job.directory / "metrics.json").unlink()
    (job.directory / "items" / items[1].file).unlink()
    measured = []
    whole = step.measure
    monkeypatch.setattr(step, "measure", lambda job, item, *rest: measured.append(item) or whole(job, item, *rest))
    step.evaluate(job, **ASKED)
    assert measured == [items[1]] and read(job) == expected


def test_ranks_share_the_work(job, tmp_path):
    step.evaluate(job, **ASKED)
    expected = read(job)
    (tmp_path / "two").mkdir()
    ranks = [replace(job, directory=tmp_path / "two", rank=rank, world=2) for rank in range(2)]
    # processes, as ranks are: transformers' loading is not safe in threads
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=step.evaluate, args=(one,), kwargs=ASKED) for one in ranks]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert read(ranks[0]) == expected


def test_evaluate_sentences(job):
    with pytest.raises(ValueError, match="bits_per_byte reads text and needs data"):
        step.evaluate(job, models="a", metrics="bits_per_byte")
    with pytest.raises(ValueError, match="model 'a' is given twice"):
        step.evaluate(job, models=["a", "a"], metrics="bits_per_byte", data="code")
    with pytest.raises(ValueError, match="metric 'bits_per_byte' is given twice"):
        step.evaluate(job, models="a", metrics=["bits_per_byte", {"bits_per_byte": {"window": 9}}], data="code")
    with pytest.raises(ValueError, match="did you mean 'bits_per_byte'"):
        step.evaluate(job, models="a", metrics="bits_per_bite", data="code")
    with pytest.raises(ValueError, match="no parameter 'windw'.*'window'"):
        step.evaluate(job, models="a", metrics={"bits_per_byte": {"windw": 3}}, data="code")


# ---------------------------------------------------------------------------------------------- real models


@pytest.mark.real
def test_gemma_knows_german_better_and_needs_its_start_token(smollm2, gemma3, shared_data):
    """On 2 kB of German; without <bos> a Gemma is another, much worse model, which is why each window opens with it."""
    text = (shared_data / "text" / "debian-reference.de.txt").read_text(encoding="utf-8")[20000:22000]
    found = {}
    for name, directory in (("smollm2", smollm2), ("gemma3", gemma3)):
        model, tokenizer = sources.load_model(directory), sources.load_tokenizer(directory)
        found[name] = bits_per_byte(model, tokenizer, [Document.of(text)])["bits_per_byte"]
    assert found["gemma3"] < found["smollm2"] - 0.1
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    bare = brute(model, ids, 1) / math.log(2) / len(text.encode())
    assert found["gemma3"] < bare - 0.1
