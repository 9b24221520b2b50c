"""Models under another vocabulary: shared rows to the bit, missing ones by four ways, files that transformers reads."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from alignment import rows
from alignment._pieces import pieces
from alignment.union import counterparts
from fusion import _new_rows, checkpoint
from fusion._files import header
from fusion._retokenize import token_tables
from fusion.job import Job
from fusion.plan import plan
from fusion.recipe import load
from fusion.steps.retokenize import retokenize
from tests.processes import ended, forked
from tests.tokenizers import TEXT, build

OTHER = ["Entirely other words: zebra quartz walking; über Füße, naïve the thing.", "raise StopIteration(zzz)"] * 6
WIDTH = 16


def make(folder: Path, name: str, kind: str, text: list[str], size: int, pad: int = 0, **config) -> Path:
    """A tiny llama with a tokenizer of that kind, `pad` rows of padding, and a generation config."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    backend = build(kind, text, size)
    backend.add_special_tokens(["<s>", "</s>", f"<|{name}|>"])
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(backend.to_str()), bos_token="<s>", eos_token="</s>"
    )
    ids = {"bos_token_id": tokens.bos_token_id, "eos_token_id": tokens.eos_token_id, "pad_token_id": None}
    torch.manual_seed(sum(map(ord, name)))
    sizes = {"hidden_size": WIDTH, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokens) + pad, **sizes, **ids, **config))
    model.save_pretrained(folder / name)
    tokens.save_pretrained(folder / name)
    generation = {**ids, "eos_token_id": [tokens.eos_token_id, tokens.convert_tokens_to_ids(f"<|{name}|>")]}
    (folder / name / "generation_config.json").write_text(json.dumps({**generation, "temperature": 0.7}))
    return folder / name


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """a: byte-level; b: another byte-level, padded, untied. A folder."""
    folder = tmp_path_factory.mktemp("pair")
    make(folder, "a", "byte_level", TEXT, 500, pad=3, tie_word_embeddings=True)
    make(folder, "b", "byte_level", OTHER, 400, pad=11, tie_word_embeddings=False)
    (folder / "b" / "chat_template.jinja").write_text("{{ messages[0].content }}</s>")
    return folder


def step(folder: Path, fields: str) -> Path:
    """The directory that a retokenize step with these fields leaves."""
    paths = ", ".join(f"{one.name}: {{path: ./{one.name}}}" for one in sorted(folder.iterdir()) if one.is_dir())
    recipe = folder / "r.yaml"
    recipe.write_text(f"models: {{{paths}}}\nsteps:\n  - retokenize: {{out: new, {fields}}}\n")
    planned = plan(load(recipe), folder / "runs").steps[0]
    made = folder.parent / f"{folder.name}-made"
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    retokenize(Job("new", made, load(recipe), place="steps[0].retokenize"), **planned.arguments)
    return made


def killed(module, name: str, number: int, work) -> int:
    """The exit status of a process that does the work and is killed when it calls `module.name` once more than
    `number` times."""

    def dying():
        call, left = vars(module)[name], iter(range(number))

        def counted(*given, **named):
            if next(left, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*given, **named)

        setattr(module, name, counted)
        work()

    return ended(forked(dying))


def tables(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.from_file(str(directory / "tokenizer.json"))


def missing_word(new: Tokenizer, old: Tokenizer) -> tuple[int, str]:
    """A longer word that is one token for the first and several for the second."""
    names = sorted(n for n in new.get_vocab() if n.startswith("Ġ") and n[1:].isalpha())
    name = next(n for n in names if len(n) > 4 and len(old.encode(" " + n[1:]).ids) > 2)
    return new.token_to_id(name), " " + name[1:]


@pytest.mark.parametrize("missing", ["first_piece", "omp", "mean", "zero"])
@pytest.mark.parametrize("vocabulary", ["base", "union"])
def test_shared_rows_are_kept_to_the_bit(pair, vocabulary, missing):
    made = step(pair, f"model: b, vocabulary: {vocabulary}, base: a, missing: {missing}, k: 4")
    before, after = tables(pair / "b"), tables(made)
    give, take = tokenizer(made), tokenizer(pair / "b")
    same = counterparts(give, take)
    assert (same >= 0).sum() > 250
    for name, tensor in before.items():
        if name not in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(tensor, after[name])
            continue
        assert after[name].shape == (give.get_vocab_size(), WIDTH)
        shared = torch.from_numpy(same >= 0)
        assert torch.equal(after[name][shared], tensor[torch.from_numpy(same[same >= 0])])
        rest = after[name][~shared]
        if missing == "zero":
            assert not rest.any()
        if missing == "mean":
            used = tensor[: take.get_vocab_size()]
            torch.testing.assert_close(rest, used.double().mean(0).float().expand_as(rest))
        assert torch.isfinite(rest).all()


def test_first_piece_is_the_mean_of_the_pieces(pair):
    made = step(pair, "model: b, base: a")
    new, old = tokenizer(made), tokenizer(pair / "b")
    assert new.to_str() == tokenizer(pair / "a").to_str()
    index, word = missing_word(new, old)
    parts = old.encode(word).ids
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        expected = tables(pair / "b")[name][parts].mean(0)
        torch.testing.assert_close(tables(made)[name][index], expected)


def test_omp_combines_shared_rows_as_the_base_does(pair, tmp_path):
    """b's tables made a linear image of a's: then the base's combination is the very row that is missing."""
    folder = tmp_path / "linear"
    shutil.copytree(pair / "a", folder / "a")
    shutil.copytree(pair / "b", folder / "b")
    image = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0))
    give, take = tokenizer(folder / "a"), tokenizer(folder / "b")
    same = torch.from_numpy(counterparts(give, take))
    source = tables(folder / "a")["model.embed_tokens.weight"]
    changed = tables(folder / "b")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        changed[name][same[same >= 0]] = (source[: len(same)] @ image)[same >= 0]
    save_file(changed, folder / "b" / "model.safetensors", metadata={"format": "pt"})
    made = tables(step(folder, "model: b, base: a, missing: omp, k: 64"))
    ordinary = [i for i, text in enumerate(pieces(give).text) if text is not None]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        torch.testing.assert_close(made[name][ordinary], (source @ image)[ordinary], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("vocabulary", ["base", "union"])
def test_text_of_shared_tokens_gets_the_same_logits(pair, vocabulary):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = step(pair, f"model: b, vocabulary: {vocabulary}, base: a, pad_to_multiple_of: 64")
    old, new = (AutoModelForCausalLM.from_pretrained(d, dtype=torch.float32) for d in (pair / "b", made))
    tokens = AutoTokenizer.from_pretrained(made)
    same = torch.from_numpy(counterparts(tokens, tokenizer(pair / "b")))
    assert new.config.vocab_size % 64 == 0 and new.get_input_embeddings().weight.shape[0] == new.config.vocab_size
    ids = torch.flatten((same >= 0).nonzero())[:40][None]
    with torch.no_grad():
        before, after = old(same[ids]).logits[0], new(ids).logits[0]
    kept = (same >= 0).nonzero()[:, 0]
    assert torch.equal(after[:, kept], before[:, same[kept]])
    if vocabulary == "union":
        for text in (*TEXT[:7], "zebra quartz"):
            assert tokens(text)["input_ids"] == AutoTokenizer.from_pretrained(pair / "a")(text)["input_ids"]
        assert tokens("x<|b|>")["input_ids"][-1] == tokens.convert_tokens_to_ids("<|b|>")


def test_ids_and_templates_are_carried_over(pair):
    made = step(pair, "model: b, vocabulary: union, base: a")
    take = tokenizer(made)
    config, generation = (json.loads((made / f"{n}.json").read_text()) for n in ("config", "generation_config"))
    assert config["vocab_size"] == take.get_vocab_size() == header(made).vocabulary
    assert config["bos_token_id"] == take.token_to_id("<s>") and config["eos_token_id"] == take.token_to_id("</s>")
    assert generation["eos_token_id"] == [take.token_to_id("</s>"), take.token_to_id("<|b|>")]
    assert generation["temperature"] == 0.7 and generation["pad_token_id"] is None
    assert (made / "chat_template.jinja").read_text().endswith("</s>")  # a has none
    based = step(pair, "model: b, vocabulary: base, base: a")
    assert json.loads((based / "generation_config.json").read_text())["eos_token_id"] == [take.token_to_id("</s>")]


def test_own_vocabulary_loses_its_padding_only(pair):
    made = step(pair, "model: b, vocabulary: model, pad_to_multiple_of: 8")
    before, after = tables(pair / "b"), tables(made)
    size = tokenizer(pair / "b").get_vocab_size()
    assert (made / "tokenizer.json").read_bytes() == (pair / "b" / "tokenizer.json").read_bytes()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert after[name].shape[0] == -(-size // 8) * 8 and torch.equal(after[name][:size], before[name][:size])
        mean = before[name][:size].double().mean(0).float()
        torch.testing.assert_close(after[name][size:], mean.expand_as(after[name][size:]))


def test_a_base_joins_its_own_union_unchanged(pair):
    made = step(pair, "model: a, vocabulary: union, base: a, models: [b]")
    size = tokenizer(pair / "a").get_vocab_size()
    name = "model.embed_tokens.weight"
    assert "lm_head.weight" not in tables(made), "tied stays tied"
    assert torch.equal(tables(made)[name][:size], tables(pair / "a")[name][:size])
    other = step(pair, "model: b, vocabulary: union, base: a")
    assert tokenizer(other).get_vocab() == Tokenizer.from_file(str(made / "tokenizer.json")).get_vocab()


def test_bfloat16_biases_and_stored_tied_heads(pair, tmp_path):
    folder = tmp_path / "odd"
    shutil.copytree(pair / "a", folder / "a")
    shutil.copytree(pair / "b", folder / "b")
    changed = {name: tensor.bfloat16() for name, tensor in tables(folder / "b").items()}
    size = changed["lm_head.weight"].shape[0]
    changed |= {
        "lm_head.bias": torch.arange(size).bfloat16(),
        "empty": torch.zeros(0, 4),
        "model.wpe.weight": torch.ones(size, 2),
    }
    save_file(changed, folder / "b" / "model.safetensors")
    made = step(folder, "model: b, base: a")
    after, old = tables(made), tokenizer(folder / "b")
    assert all(after[name].dtype == tensor.dtype for name, tensor in changed.items())
    assert after["empty"].shape == (0, 4) and torch.equal(after["model.wpe.weight"], changed["model.wpe.weight"])
    index, word = missing_word(tokenizer(made), old)
    mean = torch.tensor(old.encode(word).ids).bfloat16().float().mean().bfloat16()
    assert after["lm_head.bias"][index] == mean
    config = json.loads((folder / "b" / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "b" / "config.json").write_text(json.dumps(config))
    assert set(token_tables(header(folder / "b"), "b").values()) == {"in"}


def test_shards_hold_the_same(pair):
    whole = tables(step(pair, "model: b, base: a"))
    made = step(pair, "model: b, base: a, shard_size: 20kB")
    index = json.loads((made / "model.safetensors.index.json").read_text())
    files = {file.name: load_file(file) for file in made.glob("*.safetensors")}
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    assert index["weight_map"].keys() == whole.keys() == header(made).tensors.keys()
    assert all(torch.equal(files[file][name], whole[name]) for name, file in index["weight_map"].items())


def test_killed_it_goes_on_to_the_same_bits(pair, tmp_path, monkeypatch):
    """Killed while rows are found, and twice while tensors are written, one of them damaged meanwhile."""
    monkeypatch.setattr(_new_rows, "ROWS", 50)
    fields = "model: b, base: a, missing: omp, k: 4, shard_size: 20kB"
    whole = step(pair, fields).rename(tmp_path / "whole")
    recipe, made = load(pair / "r.yaml"), tmp_path / "made"
    made.mkdir()

    def again():
        retokenize(Job("new", made, recipe), **plan(recipe, tmp_path / "runs").steps[0].arguments)

    assert killed(rows, "omp", 2, again) == -signal.SIGKILL
    assert len(list(made.glob("omp/*.safetensors"))) == 2 and not list(made.glob("*.safetensors"))
    assert killed(checkpoint.Writer, "write", 4, again) == -signal.SIGKILL
    found = {file: file.stat().st_mtime_ns for file in made.glob("omp/*")}
    lines = (made / "manifest-0.jsonl").read_text().splitlines()
    assert len(found) > 4 and len(lines) == 4
    spoilt = header(made).tensors[json.loads(lines[0])["tensor"]]
    with open(made / spoilt.file, "r+b") as file:
        file.seek(spoilt.start)
        file.write(b"\xff" * 8)
    assert killed(checkpoint.Writer, "write", 3, again) == -signal.SIGKILL
    assert {file: file.stat().st_mtime_ns for file in made.glob("omp/*")} == found
    assert len((made / "manifest-0.jsonl").read_text().splitlines()) == 4 + 3, "the spoilt one, and two more"
    again()
    assert {file.name: file.read_bytes() for file in made.iterdir()} == {
        file.name: file.read_bytes() for file in whole.iterdir()
    }


def test_files_of_other_sizes_are_begun_anew(pair, tmp_path):
    whole = step(pair, "model: b, base: a")
    for file in (whole / "model.safetensors", whole / "manifest-0.jsonl"):
        file.write_bytes(b"what another run left\n" if file.suffix == ".safetensors" else b"")
    recipe = load(pair / "r.yaml")
    retokenize(Job("new", whole, recipe), **plan(recipe, tmp_path / "runs").steps[0].arguments)
    assert set(tables(whole)) == set(tables(pair / "b"))


@pytest.mark.parametrize("vocabulary", ["union", "base"])
def test_two_models_of_different_tokenizers_merge(pair, tmp_path, vocabulary):
    """b under a's vocabulary and a itself (in the union: both under it) go through the engine, shared rows averaged."""
    from fusion.merge import merge_checkpoints

    shutil.copytree(pair, tmp_path / "two", ignore=shutil.ignore_patterns("runs"))
    for name in ("a", "b"):  # heads both untied: a tied and an untied model are no pair
        config = json.loads((tmp_path / "two" / name / "config.json").read_text()) | {"tie_word_embeddings": False}
        (tmp_path / "two" / name / "config.json").write_text(json.dumps(config))
    held = tables(tmp_path / "two" / "a")
    save_file(
        held | {"lm_head.weight": held["model.embed_tokens.weight"].clone()}, tmp_path / "two/a/model.safetensors"
    )
    made = {}
    for name in ("a", "b"):
        others = ", models: [b]" if vocabulary == "union" else ""
        fields = f"model: {name}, vocabulary: {vocabulary}, base: a{others}"
        made[name] = step(tmp_path / "two", fields).rename(tmp_path / f"new_{name}")
    assert tokenizer(made["a"]).get_vocab() == tokenizer(made["b"]).get_vocab()
    merge_checkpoints("linear", made, tmp_path / "soup", weights=[0.5, 0.5], threads=1)
    read = [tokenizer(one) for one in (tmp_path / "soup", pair / "a", pair / "b")]
    word = max(read[1].get_vocab().keys() & read[2].get_vocab().keys() - {"<|endoftext|>"}, key=len)
    ids = [one.token_to_id(word) for one in read]
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        both = [tables(tmp_path / "two" / n)[name][i] for n, i in zip("ab", ids[1:], strict=True)]
        torch.testing.assert_close(tables(tmp_path / "soup")[name][ids[0]], (both[0] + both[1]) / 2)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ("model: b, vocabulary: union", "vocabulary: union needs base"),
        ("model: b, vocabulary: model, base: a", "keeps the model's own tokenizer"),
        ("model: b, base: a, models: [a]", "several go with vocabulary: union"),
        ("model: b, base: a, k: 0", "k: it is 0 and must be at least 1"),
        ("model: b, base: a, shard_size: huge", "shard_size is 'huge'; a size like"),
        ("model: b, base: c", "there is no model 'c'"),
        ("model: b, base: a, missing: ompp", "'first_piece' or 'omp'"),
    ],
)
def test_bad_fields_get_a_sentence(pair, fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        step(pair, fields)


def test_bad_checkpoints_get_a_sentence(pair, tmp_path):
    for number, (extra, sentence) in enumerate(
        [
            (
                {"classifier.weight": torch.ones(header(pair / "b").vocabulary, 2)},
                "classifier.weight .* neither an embed",
            ),
            ({"lm_head.weight": torch.ones(7, WIDTH)}, "lm_head.weight has 7; they must agree"),
        ]
    ):
        folder = tmp_path / str(number)
        shutil.copytree(pair / "a", folder / "a")
        shutil.copytree(pair / "b", folder / "b")
        save_file(tables(folder / "b") | extra, folder / "b" / "model.safetensors")
        with pytest.raises(ValueError, match=sentence):
            step(folder, "model: b, base: a")


def test_a_real_model_in_a_real_vocabulary(smollm2, gemma3, tmp_path):
    """SmolLM2 under Gemma's 262,144 tokens: what both have stays, text encodes as Gemma's does."""
    (tmp_path / "x.yaml").write_text(
        f"models: {{small: {{path: {smollm2}}}, gemma: {{path: {gemma3}}}}}\n"
        "steps:\n  - retokenize: {out: new, model: small, base: gemma}\n"
    )
    made = tmp_path / "made"
    made.mkdir()
    retokenize(Job("new", made, load(tmp_path / "x.yaml")), out="new", model="small", base="gemma")
    size = header(gemma3).vocabulary
    with safe_open(made / "model.safetensors", "pt") as after, safe_open(smollm2 / "model.safetensors", "pt") as before:
        found, old = after.get_slice("model.embed_tokens.weight"), before.get_tensor("model.embed_tokens.weight")
        assert found.get_shape()[0] == size
        hello, own = tokenizer(gemma3).token_to_id("▁hello"), tokenizer(smollm2).token_to_id("Ġhello")
        assert torch.equal(found[hello], old[own])
    assert json.loads((made / "config.json").read_text())["eos_token_id"] == 1
