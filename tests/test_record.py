"""Recording: what a store says is what the model says, whatever the batches, ranks, kills and resumes were."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from fusion import _teacher, data
from fusion.job import Job
from fusion.recipe import load
from fusion.steps.record import record
from fusion.targets import SHARD, Rule, Store, text_digest
from tests.tokenizers import TEXT, train

WORDS = " ".join(TEXT).split()
CHILD = """
import json, sys
from pathlib import Path
from tests.test_record import job_of
from fusion.steps.record import record
folder, directory, rank, world, fields = json.loads(sys.argv[1])
record(job_of(Path(folder), Path(directory), rank, world), out="hints", teacher="t", data="text", **fields)
"""


def texts(count: int, seed: int = 0, longest: int = 60) -> list[str]:
    """Texts of 1 to `longest` words, none twice."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(1, longest, count)
    return [f"{n}: " + " ".join(generator.choice(WORDS, length)) for n, length in enumerate(lengths)]


def write_model(folder: Path, kind: str = "llama", width: int = 32) -> Path:
    """A small randomly initialised teacher with a real tokenizer, saved as any model is."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    tokenizer = train("byte_level" if kind == "gpt2" else "metaspace")
    size = tokenizer.get_vocab_size()
    if kind == "gpt2":
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
        config = GPT2Config(vocab_size=size, n_embd=width, n_layer=2, n_head=4, n_positions=64)
        model = GPT2LMHeadModel(config)
    else:
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
        fast.chat_template = "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>\n{% endfor %}"
        config = LlamaConfig(
            vocab_size=size + 7,  # a padded head
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            initializer_range=0.3,  # predictions that are not flat
        )
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def write_recipe(folder: Path, documents: list, kind: str = "llama", width: int = 32) -> Path:
    write_model(folder / "teacher", kind, width)
    column = "text" if isinstance(documents[0], str) else "messages"
    (folder / "text.jsonl").write_text("".join(json.dumps({column: document}) + "\n" for document in documents))
    entry = {"path": "./text.jsonl", "format": "json", "column": column}
    step = {"record": {"out": "hints", "teacher": "t", "data": "text"}}
    recipe = {"seed": 3, "models": {"t": {"path": "./teacher"}}, "data": {"text": entry}, "steps": [step]}
    (folder / "recipe.yaml").write_text(json.dumps(recipe | {"result": "hints"}))
    return folder


def job_of(folder: Path, directory: Path, rank: int = 0, world: int = 1) -> Job:
    directory.mkdir(parents=True, exist_ok=True)
    return Job(name="hints", directory=directory, recipe=load(folder / "recipe.yaml"), seed=3, rank=rank, world=world)


def run(folder: Path, name: str = "hints", **fields) -> Store:
    record(job_of(folder, folder / name), out="hints", teacher="t", data="text", **fields)
    return Store.open(folder / name)


def content(directory: Path) -> dict[str, bytes]:
    """Every file of a store; metrics.json and log.jsonl say how long it took and are left out."""
    files = [file for file in directory.rglob("*") if file.is_file() and file.name not in ("metrics.json", "log.jsonl")]
    return {str(file.relative_to(directory)): file.read_bytes() for file in files}


def child(folder: Path, directory: Path, rank: int = 0, world: int = 1, **fields) -> subprocess.Popen:
    arguments = json.dumps([str(folder), str(directory), rank, world, fields])
    root = Path(__file__).resolve().parent.parent
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, arguments], cwd=root, env=os.environ | {"PYTHONPATH": str(root)}
    )


def reference(folder: Path, document: data.Document) -> tuple[data.Encoded, np.ndarray]:
    """The document in the teacher's tokens and its rows' log-probabilities (T, V), from a plain forward pass."""
    from fusion.sources import load_model, load_tokenizer

    encoded = data.encode(load_tokenizer(folder / "teacher"), document)
    with torch.no_grad():
        logits = load_model(folder / "teacher")(torch.from_numpy(encoded.ids)[None]).logits[0]
    rows = torch.log_softmax(logits.double(), dim=1).numpy()
    return encoded, np.concatenate([np.full_like(rows[:1], np.nan), rows[:-1]])


@pytest.fixture(scope="module")
def prose(tmp_path_factory) -> Path:
    """A Llama-like teacher and 40 short texts."""
    return write_recipe(tmp_path_factory.mktemp("prose"), texts(40))


# ------------------------------------------------------------------------------------------------ what is said


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_whole_targets_are_the_models_own_predictions(tmp_path: Path, kind: str) -> None:
    folder = write_recipe(tmp_path, texts(6, longest=20), kind)
    store = run(folder, top_k=100_000, batch_tokens=64)
    assert store.kind == "whole"
    for document in job_of(folder, tmp_path / "hints").documents("text"):
        encoded, expected = reference(folder, document)
        said = store[document.digest]
        np.testing.assert_array_equal(said.ids, encoded.ids)
        np.testing.assert_array_equal(said.ends, encoded.ends)
        assert np.diff(said.offsets).tolist() == [0, *[expected.shape[1]] * (len(said.ids) - 1)]
        rows = np.repeat(np.arange(len(said.ids)), np.diff(said.offsets))
        assert np.abs(said.entry_log_probs - expected[rows, said.entry_ids]).max() < 0.02
        own = expected[np.arange(len(said.ids)), said.ids]
        np.testing.assert_allclose(said.nll, -own, rtol=2e-3, atol=1e-3)
        shifted = -expected[np.arange(len(said.ids) - 1), said.ids[1:]]  # the shift that must fail
        assert not np.allclose(said.nll[2:], shifted[1:], rtol=2e-3, atol=1e-3)


def test_draws_follow_the_prediction_of_their_row(prose: Path) -> None:
    store = run(prose, "draws", draws=400)
    document = max(job_of(prose, prose / "draws").documents("text"), key=lambda d: d.size)
    _, expected = reference(prose, document)
    said = store[document.digest]
    for row in range(1, len(said.ids)):
        owned = slice(said.offsets[row], said.offsets[row + 1])
        share = np.zeros(expected.shape[1])
        share[said.entry_ids[owned]] = np.exp(said.entry_log_probs[owned])
        assert np.abs(share - np.exp(expected[row])).max() < 1 / 400 + 1e-4


def test_the_measures_say_what_is_stored(prose: Path) -> None:
    store = run(prose, "measured")
    metrics = json.loads((prose / "measured" / "metrics.json").read_text())
    documents = job_of(prose, prose / "measured").documents("text")
    nats = size = tokens = 0
    for document in documents:
        encoded, expected = reference(prose, document)
        own = -expected[np.arange(len(encoded.ids)), encoded.ids]
        nats += own[encoded.is_content].sum()
        size, tokens = size + document.size, tokens + len(encoded.ids)
    assert store.header.text_bytes == size and metrics["tokens"] == tokens and metrics["documents"] == 40
    assert abs(metrics["bits_per_byte"] - nats / np.log(2) / size) < 1e-4
    assert metrics["rows_with_entries"] == (tokens - 40) / tokens
    assert metrics["bytes_per_token"] == store.header.bytes_per_token and metrics["tokens_per_second"] > 0
    assert store.header.text == text_digest(document.digest for document in documents)
    assert store.header.rule.draws == 16


def test_the_tokenizer_travels_with_the_store(prose: Path) -> None:
    from fusion.sources import load_tokenizer, tokenizer_digest

    store = run(prose, "travels")
    assert tokenizer_digest(store.tokenizer) == tokenizer_digest(prose / "teacher") == store.header.tokenizer
    assert (
        load_tokenizer(store.tokenizer)("the fox").input_ids == load_tokenizer(prose / "teacher")("the fox").input_ids
    )


def test_long_documents_are_recorded_in_windows_and_nothing_is_cropped(tmp_path: Path, capsys) -> None:
    folder = write_recipe(tmp_path, ["A " + " ".join(WORDS[:200]), "short"], "gpt2")
    store = run(folder, top_k=3, max_length=100)  # the teacher reads 64 tokens
    assert "t reads at most 64 tokens: longer documents are recorded in windows of 64" in capsys.readouterr().out
    said = store[job_of(folder, tmp_path / "hints").documents("text")[0].digest]
    encoded = data.encode(_tokenizer(folder), data.Document.of("A " + " ".join(WORDS[:200])))
    np.testing.assert_array_equal(said.ids, encoded.ids)
    first_of_window = np.arange(len(said.ids)) % 64 == 0
    np.testing.assert_array_equal(np.isnan(said.nll), first_of_window)
    np.testing.assert_array_equal(np.diff(said.offsets) == 0, first_of_window)
    assert len(said.ids) > 128


def _tokenizer(folder: Path):
    from fusion.sources import load_tokenizer

    return load_tokenizer(folder / "teacher")


def test_of_a_conversation_contents_and_what_ends_them_are_recorded(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Why the fox?"}, {"role": "assistant", "content": "It is quick."}]
    folder = write_recipe(tmp_path, [turns, turns[:1]])
    store = run(folder, draws=4)
    document = job_of(folder, tmp_path / "hints").documents("text")[0]
    encoded = data.encode(_tokenizer(folder), document)
    inside = encoded.is_content
    expected = inside | np.concatenate([[False], inside[:-1]])
    said = store[document.digest]
    assert 0 < expected.sum() < len(expected)
    np.testing.assert_array_equal(np.diff(said.offsets) > 0, expected)
    assert store.header.text_bytes == sum(d.size for d in job_of(folder, tmp_path / "hints").documents("text"))


def test_packing_does_not_show_documents_to_each_other(prose: Path) -> None:
    packed = run(prose, "wide", top_k=5, batch_tokens=4096)
    alone = run(prose, "narrow", top_k=5, batch_tokens=1)
    for digest in alone:
        np.testing.assert_allclose(packed[digest].nll, alone[digest].nll, rtol=2e-3, atol=1e-3)


def test_an_architecture_that_leaks_gets_one_document_a_row(tmp_path: Path, capsys) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    folder = write_recipe(tmp_path, texts(5, longest=20))
    size = len(_tokenizer(folder))
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=size, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3)
    BloomForCausalLM(config).save_pretrained(folder / "teacher")
    store = run(folder, top_k=4)
    assert "BloomForCausalLM does not keep packed documents apart" in capsys.readouterr().out
    for document in job_of(folder, tmp_path / "hints").documents("text"):
        encoded, expected = reference(folder, document)
        own = -expected[np.arange(len(encoded.ids)), encoded.ids]
        np.testing.assert_allclose(store[document.digest].nll, own, rtol=2e-3, atol=1e-3)


def test_no_tensor_holds_the_logits_of_a_batch(prose: Path, monkeypatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = logits = 0  # elements of any tensor, and of those whose last dimension could be the vocabulary

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            nonlocal largest, logits
            out = function(*arguments, **(keywords or {}))
            for tensor in out if isinstance(out, tuple | list) else [out]:
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
                    if tensor.dim() and tensor.shape[-1] >= vocabulary:
                        logits = max(logits, tensor.numel())
            return out

    from fusion.sources import header

    vocabulary = header(prose / "teacher").config["vocab_size"]
    monkeypatch.setattr(_teacher, "CHUNK", 64 * vocabulary)
    documents = job_of(prose, prose / "hooked").documents("text")
    tokens = sum(len(data.encode(_tokenizer(prose), document).ids) for document in documents)
    with Watch():
        run(prose, "hooked", batch_tokens=100_000)
    # masks of attention are the largest; a row of 64 is filled up to whole blocks of the draws
    assert tokens > 640 and largest < tokens * vocabulary and 0 < logits <= 64 * (vocabulary + 64)


# ------------------------------------------------------------------------------------------------ ranks, kills, order


@pytest.fixture(scope="module")
def three_shards(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """Three shards of texts, one of them twice, and the store that one undisturbed process makes of them."""
    many = texts(2 * SHARD + 20, longest=150)
    many[5] = many[2]
    folder = write_recipe(tmp_path_factory.mktemp("shards"), many, width=64)
    store = run(folder, "whole")
    assert store.header.documents == 2 * SHARD + 19 == len(store)
    return folder, content(folder / "whole")


def test_two_ranks_write_the_bytes_of_one(three_shards) -> None:
    folder, expected = three_shards
    other = child(folder, folder / "ranks", rank=1, world=2)
    record(job_of(folder, folder / "ranks", rank=0, world=2), out="hints", teacher="t", data="text")  # waits for it
    assert other.wait(60) == 0
    assert content(folder / "ranks") == expected


def test_a_killed_run_goes_on_to_the_same_bytes(three_shards) -> None:  # C2
    folder, expected = three_shards
    directory = folder / "killed"
    process = child(folder, directory)
    deadline = time.monotonic() + 120
    while not (directory / "00000.json").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (directory / "store.json").exists()
    assert not (directory / "00002.json").exists()  # it was killed in the second shard
    with pytest.raises(ValueError, match="is no finished store"):
        Store.open(directory)
    kept = (directory / "00000.safetensors").stat().st_mtime_ns
    # as if the kill had come while the second shard was written, and the disk had lost what was not flushed
    (directory / "00001.safetensors.part").write_bytes(b"half")
    (directory / "00001.safetensors").write_bytes(expected["00001.safetensors"][:-100])
    record(job_of(folder, directory), out="hints", teacher="t", data="text")
    assert content(directory) == expected
    assert (directory / "00000.safetensors").stat().st_mtime_ns == kept


def test_a_damaged_shard_is_recorded_again(three_shards) -> None:  # C5
    folder, expected = three_shards
    directory = folder / "damaged"
    directory.mkdir()
    for name, held in expected.items():
        if "/" not in name:
            (directory / name).write_bytes(held)
    damaged = bytearray(expected["00002.safetensors"])
    damaged[-1] ^= 1
    (directory / "00002.safetensors").write_bytes(damaged)
    record(job_of(folder, directory), out="hints", teacher="t", data="text")
    assert content(directory) == expected


def test_stores_recorded_in_another_order_join_by_digest(tmp_path: Path) -> None:  # C4
    many = texts(SHARD + 9, longest=12)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first = run(write_recipe(tmp_path / "a", many), draws=8)
    second = run(write_recipe(tmp_path / "b", many[::-1], "gpt2"), draws=8)
    assert first.header.text == second.header.text and list(first) != list(second) and set(first) == set(second)
    for document in job_of(tmp_path / "a", tmp_path / "a" / "hints").documents("text"):
        a, b = first[document.digest], second[document.digest]
        assert a.ends[-1] == b.ends[-1] == document.size  # both are about the same bytes


# ------------------------------------------------------------------------------------------------ bad input


def test_logits_that_are_not_finite_are_named_and_the_store_stays_whole(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_recipe(tmp_path, [*texts(SHARD + 9, longest=8), "Жук the fox", *texts(5, seed=1, longest=8)])
    expected = content(run(folder).path)
    directory = tmp_path / "broken"
    documents = job_of(folder, directory).documents("text")
    tokens = [set(data.encode(_tokenizer(folder), document).ids.tolist()) for document in documents]
    broken = next(n for n, document in enumerate(documents) if "Жук" in document.text)
    own = min(tokens[broken] - set().union(*tokens[:broken], *tokens[broken + 1 :]))
    row = data.encode(_tokenizer(folder), documents[broken]).ids.tolist().index(own) + 1
    weights = folder / "teacher" / "model.safetensors"
    whole = weights.read_bytes()
    tensors = load_file(weights)
    tensors["model.embed_tokens.weight"][own] = float("inf")
    save_file(tensors, weights, metadata={"format": "pt"})
    sentence = f"t gives NaN or infinite logits in float32 at row {row} of document {documents[broken].digest}"
    with pytest.raises(ValueError, match=sentence):
        record(job_of(folder, directory), out="hints", teacher="t", data="text")
    weights.write_bytes(whole)
    assert (directory / "00000.json").exists() and not (directory / "store.json").exists()
    assert not (directory / "00001.json").exists() and not list(directory.glob("*.part"))
    record(job_of(folder, directory), out="hints", teacher="t", data="text")
    assert content(directory) == expected


def test_two_rules_are_refused(prose: Path) -> None:
    with pytest.raises(ValueError, match="draws and top_k are both given"):
        run(prose, "never", draws=16, top_k=4)
    assert not any((prose / "never").iterdir())


def test_a_disk_too_small_is_said_before(prose: Path, monkeypatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"recording 40 documents of text takes about .* GB and .* has 1e-06 GB free"):
        run(prose, "full")
    assert not any((prose / "full").iterdir())
    (prose / "full" / "00000.safetensors").write_bytes(bytes(500_000))  # of a run that was stopped
    run(prose, "full")


def test_a_vocabulary_larger_than_the_head_is_refused(tmp_path: Path) -> None:
    folder = write_recipe(tmp_path, ["one text"], "gpt2")
    tokenizer = _tokenizer(folder)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder / "teacher")
    size = len(tokenizer)
    with pytest.raises(ValueError, match=f"t: its tokenizer has {size} tokens and its head only {size - 1}"):
        _teacher.load(
            folder / "teacher", "t", Rule(draws=1), max_length=8, batch_tokens=8, dtype="float32", seed=0, device="cpu"
        )


# ------------------------------------------------------------------------------------------------ a real model


@pytest.mark.real
def test_a_real_teacher_keeps_to_the_budget(tmp_path: Path, smollm2: Path) -> None:  # C6; all budgets: bench/store.py
    many = [(" ".join(WORDS) + "\n\n")[: 700 + 10 * n] + f"{n}" for n in range(2)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in many))
    entry = {"path": "./text.jsonl", "format": "json"}
    step = {"record": {"out": "hints", "teacher": "t", "data": "text"}}
    recipe = {"models": {"t": {"path": str(smollm2)}}, "data": {"text": entry}, "steps": [step], "result": "hints"}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    store = run(tmp_path)
    assert store.header.vocabulary == 49152
    assert store.header.bytes_per_token < 30  # two short documents carry the costs of a whole shard
