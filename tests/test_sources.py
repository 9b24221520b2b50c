"""Model references become directories: in place, downloaded, converted, made; bad ones get a sentence."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from fusion import _scratch, recipe, sources
from fusion.plan import plan
from fusion.recipe import ModelRef

TEXT = [
    "The quick brown fox jumps over the lazy dog; they are there, and thereafter the others followed them home.",
    "Die Straße führt über die Brücke. Größe, Übermut und Käse täuschen nicht.",
    "def add(a, b):\n    return a + b  # 201 items\n\nfor i in range(10):\n\tprint(i)\n",
    "In the beginning was the word, and the word was with the reader, and the reader was without a word.",
] * 6
LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_embd": 32, "n_head": 2, "n_positions": 64}
BPE = {"train": "bpe", "vocab_size": 400, "data": "text"}


def texts(name: str) -> list[str]:
    assert name == "text"
    return TEXT


def scratch(cache: Path, name: str = "tiny", config: dict = LLAMA, tokenizer: dict = BPE, seed: int = 0) -> Path:
    return sources.resolve(name, ModelRef(name, config=config, tokenizer=tokenizer), cache, Path("."), texts, seed)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return scratch(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def copy(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def local(path: Path | str, base: Path = Path(".")) -> Path:
    return sources.resolve("m", ModelRef("m", path=str(path)), Path("/nonexistent"), base, texts)


# ---------------------------------------------------------------------------------------------- from scratch


def test_a_model_from_scratch_is_the_same_twice(tiny, tmp_path):
    again = scratch(tmp_path)
    assert again != tiny and again.name == tiny.name
    assert sources.digest(again) == sources.digest(tiny)
    assert sources.tokenizer_digest(again) == sources.tokenizer_digest(tiny)
    assert scratch(tmp_path) == again  # found, not made again


def test_name_and_seed_decide_the_weights(tiny, tmp_path):
    digests = {
        sources.digest(tiny),
        sources.digest(scratch(tmp_path, "other")),
        sources.digest(scratch(tmp_path, seed=1)),
    }
    assert len(digests) == 3


def test_making_a_model_leaves_the_random_state_alone(tmp_path):
    import torch

    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    scratch(tmp_path, "unseen")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "wordpiece", "bytes"])
def test_trained_tokenizers_agree_between_processes(kind):
    # Rust's hash maps are seeded for each process: only another process can show an order that leaks.
    program = (
        "import sys, json; from fusion import _scratch; "
        "print(_scratch.train(sys.argv[1], 500, json.load(sys.stdin)).to_str())"
    )
    root = str(Path(__file__).parents[1])
    found = {
        subprocess.run(
            [sys.executable, "-c", program, kind],
            input=json.dumps(TEXT),
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": root},
        ).stdout.strip()
        for _ in range(3)
    }
    assert found == {_scratch.train(kind, 500, TEXT).to_str()}


@pytest.mark.parametrize("kind", ["bpe", "unigram", "bytes"])
@pytest.mark.parametrize("text", ["The Straße, 日本語 😀\n\n\tand  two   spaces ", "", " x", "a\r\nb"])
def test_trained_tokenizers_spell_any_text(kind, text):
    tokenizer = _scratch.fast(_scratch.train(kind, 500, TEXT))
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in ids[1:]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) <= 500 and max(tokenizer.get_vocab().values()) + 1 == len(tokenizer)


def test_wordpiece_knows_its_own_text():
    tokenizer = _scratch.fast(_scratch.train("wordpiece", 500, TEXT))
    for text in TEXT[:4]:
        assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
    assert len(tokenizer.all_special_ids) == 4  # the letters that fix the order are no specials


def test_scratch_model_has_the_tokenizer_s_size_and_specials(tiny, tmp_path):
    config, tokenizer = sources.header(tiny).config, sources.load_tokenizer(tiny)
    assert config["vocab_size"] == len(tokenizer) == 400
    assert (config["bos_token_id"], config["eos_token_id"]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    padded = scratch(tmp_path, config={**GPT2, "vocab_size": 512})
    assert sources.header(padded).vocabulary == 512 and sources.header(padded).tied
    assert sources.load_model(padded).config.n_layer == 1


def test_a_killed_making_leaves_nothing_that_counts(tmp_path, tiny):
    partial = tmp_path / f".{tiny.name}.partial"
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"half")
    assert sources.digest(scratch(tmp_path)) == sources.digest(tiny)
    assert not partial.exists()


@pytest.mark.parametrize(
    "config, tokenizer, sentence",
    [
        ({**LLAMA, "hidden_sise": 3}, BPE, "unknown field 'hidden_sise'; did you mean 'hidden_size'"),
        ({**LLAMA, "model_type": "lama"}, BPE, "unknown model_type 'lama'; did you mean 'llama'"),
        ({"n_layer": 2}, BPE, "model_type is required"),
        ({**LLAMA, "vocab_size": 100}, BPE, "vocab_size 100 is less than the tokenizer's 400"),
        (LLAMA, {**BPE, "train": "bep"}, "unknown train 'bep'; did you mean 'bpe'"),
        (LLAMA, {**BPE, "vocabsize": 3}, "unknown field 'vocabsize'; did you mean 'vocab_size'"),
        (LLAMA, {**BPE, "vocab_size": 99}, "at least 259; given: 99"),
        (LLAMA, {"train": "bpe", "vocab_size": 400}, "data is required"),
        (LLAMA, None, "needs tokenizer"),
    ],
)
def test_a_wrong_model_from_scratch_gets_a_sentence(tmp_path, config, tokenizer, sentence):
    with pytest.raises(ValueError, match="models.tiny") as error:
        scratch(tmp_path, config=config, tokenizer=tokenizer)
    assert sentence in str(error.value)
    assert not list(tmp_path.glob("scratch-*"))


def test_no_text_to_train_on(tmp_path):
    ref = ModelRef("m", config=LLAMA, tokenizer=BPE)
    with pytest.raises(ValueError, match="no text to train"):
        sources.resolve("m", ref, tmp_path, Path("."), lambda name: ["", ""])


# ---------------------------------------------------------------------------------------------- directories


def test_a_directory_is_used_in_place(tiny):
    assert local(tiny) == tiny
    assert local(tiny.name, base=tiny.parent) == tiny


def test_header_reads_what_is_there(tiny):
    head = sources.header(tiny)
    model = sources.load_model(tiny)
    state = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert head.shapes == state and not head.tied and head.vocabulary == 400
    assert head.parameters == sum(p.numel() for p in model.parameters()) and head.bytes == 4 * head.parameters
    assert set(head.dtypes.values()) == {"F32"}


def test_reading_headers_and_digests_loads_neither_torch_nor_transformers(tiny):
    program = (
        "import sys; from pathlib import Path; from fusion import sources; from fusion.recipe import ModelRef; "
        "d = Path(sys.argv[1]); sources.check('m', ModelRef('m', path=str(d)), d); "
        "sources.header(d), sources.digest(d), sources.tokenizer_digest(d); "
        "print([m for m in ('torch', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program, str(tiny)], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "[]", done.stderr


def test_digests_follow_content_not_place(tiny, copy):
    assert sources.digest(copy) == sources.digest(tiny)
    file = copy / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert sources.digest(copy) != sources.digest(tiny)


def test_tokenizer_digest_ignores_padding_and_saving_again(tiny, copy):
    tokenizer = sources.load_tokenizer(copy)
    tokenizer(["a", "b b b"], padding=True, truncation=True, max_length=5)
    tokenizer.save_pretrained(copy)
    assert sources.tokenizer_digest(copy) == sources.tokenizer_digest(tiny)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(copy)
    assert sources.tokenizer_digest(copy) != sources.tokenizer_digest(tiny)


def test_truncated_weights_are_named(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated"):
        local(copy)
    file.write_bytes(b"\x07")
    with pytest.raises(ValueError, match=r"model\.safetensors is truncated"):
        local(copy)


def test_a_shard_that_the_index_names_must_be_there(copy):
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="missing: model-00001-of-00002.safetensors"):
        local(copy)


def test_missing_weights_are_refused_not_drawn(copy):
    from safetensors.torch import load_file, save_file

    state = load_file(copy / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="missing keys.*model.layers.1.mlp.up_proj.weight"):
        sources.load_model(copy)


def test_pickled_weights_get_the_converting_command(copy):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"only pickled weights \(pytorch_model.bin\).*save_pretrained"):
        local(copy)


@pytest.fixture
def own_code(copy) -> Path:
    """The folder of recipes with two models, m and n, of an architecture that transformers has no code for."""
    config = json.loads((copy / "config.json").read_text())
    remote = {"auto_map": {"AutoConfig": "x.X", "AutoModelForCausalLM": "x.Y"}, "model_type": "my_own"}
    (copy / "config.json").write_text(json.dumps({**config, **remote}))
    (copy / "x.py").write_text("raise SystemExit('the checkpoint ran its code')")
    shutil.copytree(copy, copy.parent / "n")
    (copy.parent / "text.txt").write_text("words\n")
    return copy.parent


def recipe_of(folder: Path, *steps: str) -> recipe.Recipe:
    lines = ["models: {m: {path: copy}, n: {path: n}}", "data: {t: {path: text.txt}}", "steps:"]
    (folder / "r.yaml").write_text("\n".join([*lines, *(f"  - {step}" for step in steps)]))
    return recipe.load(folder / "r.yaml")


SOUP = "merge: {out: soup, method: task_arithmetic, base: m, models: [n]}"
UNRUN = [
    "retokenize: {out: small, model: soup, vocabulary: model}",
    "compress: {out: vector, model: n, base: m}",
]
RUN = [
    "record: {out: hints, teacher: NAME, data: t}",
    "tune: {out: tuned, model: NAME, data: t}",
    "evaluate: {models: [NAME], metrics: [bits_per_byte], data: t}",
    "align: {out: aligned, target: NAME, donor: NAME}",
]


def test_code_of_the_checkpoint_is_no_matter_where_weights_alone_are_read(own_code):
    from fusion.run import main

    found = recipe_of(own_code, SOUP, *UNRUN)
    assert main([str(found.path), "--out", str(own_code / "runs")]) == 0
    made = json.loads((own_code / "runs/r/soup/config.json").read_text())
    assert made["model_type"] == "my_own" and (own_code / "runs/r/small/model.safetensors").is_file()


@pytest.mark.parametrize("name", ["m", "soup"])
@pytest.mark.parametrize("step", RUN, ids=lambda step: step.partition(":")[0])
def test_code_of_the_checkpoint_is_refused_where_the_model_is_run(own_code, step, name):
    found = recipe_of(own_code, SOUP, step.replace("NAME", name))
    sentence = rf"steps\[1\].*'{name}' asks for code.*auto_map.*never run.*none for 'my_own'"
    with pytest.raises(ValueError, match=sentence):
        plan(found, own_code / "runs")


def test_code_of_the_checkpoint_is_not_run_where_transformers_has_its_own(copy):
    config = json.loads((copy / "config.json").read_text())
    remote = {"auto_map": {"AutoConfig": "x.X", "AutoModelForCausalLM": "x.Y"}}
    (copy / "config.json").write_text(json.dumps({**config, **remote}))
    (copy / "x.py").write_text("raise SystemExit('the checkpoint ran its code')")
    assert type(sources.load_model(local(copy))).__module__.startswith("transformers.models.")


def test_a_tokenizer_larger_than_the_head(copy):
    tokenizer = Tokenizer.from_file(str(copy / "tokenizer.json"))
    tokenizer.add_tokens(["one more", "and another"])
    tokenizer.save(str(copy / "tokenizer.json"))
    with pytest.raises(ValueError, match="tokenizer has 402 tokens, the head has only 400 rows"):
        local(copy)


def test_directories_that_are_no_model(copy, tmp_path):
    with pytest.raises(ValueError, match="no directory"):
        local(tmp_path / "nowhere")
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="PEFT adapter; name the model it sits on"):
        local(copy)
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "latest").write_text("global_step1")
    with pytest.raises(ValueError, match="training checkpoint without config.json"):
        local(tmp_path / "zero")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no \\*.safetensors"):
        local(tmp_path / "empty")
    with pytest.raises(ValueError, match="base goes with an adapter, a compressed task vector or a training"):
        sources.check("m", ModelRef("m", path="empty", base="other"), tmp_path)


def test_slow_tokenizers_get_a_sentence(copy):
    (copy / "tokenizer.json").unlink()
    for ask in (sources.load_tokenizer, sources.tokenizer_digest):
        with pytest.raises(ValueError, match="has no tokenizer.json.*save_pretrained"):
            ask(copy)


def test_unknown_dtype(tiny):
    with pytest.raises(ValueError, match="float32, bfloat16, float16"):
        sources.load_model(tiny, "float64")


# ---------------------------------------------------------------------------------------------- hub

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(tiny, tmp_path, monkeypatch) -> Path:
    """A hub cache that holds someone/tiny at COMMIT, as its client lays it out."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "models--someone--tiny"
    shutil.copytree(tiny, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return repository


def from_hub(**fields) -> Path:
    return sources.resolve("m", ModelRef("m", **fields), Path("/nonexistent"), Path("."), texts)


def test_a_cached_repository_needs_no_network(hub, tiny):
    found = from_hub(hub="someone/tiny", revision=COMMIT)
    assert found == hub / "snapshots" / COMMIT and sources.digest(found) == sources.digest(tiny)
    with pytest.warns(UserWarning, match=f"no revision.*{COMMIT}"):
        assert from_hub(hub="someone/tiny") == found


def test_code_of_a_repository_is_refused_when_it_is_there(hub, tmp_path, monkeypatch, capsys):
    """Planning does not look into the hub's cache; a merge takes it, what runs its result does not."""
    from fusion.run import main

    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    at = hub / "snapshots" / COMMIT
    config = json.loads((at / "config.json").read_text())
    remote = {"auto_map": {"AutoModelForCausalLM": "x.Y"}, "model_type": "my_own"}
    (at / "config.json").write_text(json.dumps({**config, **remote}))
    (tmp_path / "text.txt").write_text("words\n")
    lines = [f"models: {{m: {{hub: someone/tiny, revision: {COMMIT}}}}}", "data: {t: {path: text.txt}}", "steps:"]
    lines += ["  - merge: {out: soup, method: linear, models: [m]}"]
    lines += ["  - evaluate: {models: [soup], metrics: [bits_per_byte], data: t}"]
    (tmp_path / "r.yaml").write_text("\n".join(lines))
    assert main([str(tmp_path / "r.yaml"), "--out", str(tmp_path / "runs")]) == 1
    assert (tmp_path / "runs/r/soup/model.safetensors").is_file()
    assert "config.json of 'soup' asks for code of its own (auto_map)" in capsys.readouterr().err


def test_hub_sentences(hub):
    with pytest.raises(ValueError, match="not in the local hub cache"):
        from_hub(hub="someone/else", revision=COMMIT)
    with pytest.raises(ValueError, match="revision 'main' can move"):
        from_hub(hub="someone/tiny", revision="main")
    with pytest.raises(ValueError, match="a directory goes in path"):
        from_hub(hub="./tiny")
    with pytest.raises(ValueError, match="exactly one of hub, path, config"):
        from_hub(hub="someone/tiny", path="x")


def test_hub_blobs_give_the_digest_their_name_says(tmp_path):
    from fusion._files import file_digest

    name = "ab" * 32
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / name).write_bytes(b"content")
    (tmp_path / "link").symlink_to(tmp_path / "blobs" / name)
    assert file_digest(tmp_path / "link") == name
