"""Tiny vision-language models in the names of public checkpoints, and each one's tensors in its partner's, by hand.

LLaVA-OneVision and Qwen2-VL are transformers' own classes, which save the public names. CogVLM and mPLUG-Owl2 are not
in transformers: these are random tensors of the names that their checkpoints have.
"""

import json
import zlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

WIDTH, INNER, LAYERS = 32, 48, 2
TEXT = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": LAYERS, "vocab_size": 264}
TEXT |= {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
EYE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
ROPE = {"rope_type": "default", "type": "mrope", "mrope_section": [2, 3, 3], "rope_theta": 1e6}
SIDES = ("language", "vision")

Tensors = dict[str, Tensor]


def make(directory: Path, name: str) -> None:
    """One of llava_onevision, qwen2_vl, cogvlm, mplug_owl2."""
    import transformers

    torch.manual_seed(zlib.crc32(name.encode()))
    directory.mkdir(parents=True)
    if name == "llava_onevision":
        eye = {"model_type": "siglip_vision_model", **EYE, "image_size": 28, "patch_size": 14}
        config = transformers.LlavaOnevisionConfig(
            text_config={"model_type": "qwen2", **TEXT}, vision_config=eye, tie_word_embeddings=False
        )
        transformers.LlavaOnevisionForConditionalGeneration(config).save_pretrained(directory)
    elif name == "qwen2_vl":
        special = {"bos_token_id": 0, "eos_token_id": 1}
        eye = {"depth": 1, "embed_dim": 16, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
        text = {**TEXT, "vocab_size": 270, "rope_parameters": ROPE, **special}
        settings = transformers.Qwen2VLConfig(text_config=text, vision_config=eye, tie_word_embeddings=False)
        transformers.Qwen2VLForConditionalGeneration(settings).save_pretrained(directory)
    else:
        shapes = cogvlm() if name == "cogvlm" else mplug_owl2()
        save_file({one: torch.randn(shape) for one, shape in shapes.items()}, directory / "model.safetensors")
        (directory / "config.json").write_text(json.dumps({"model_type": name, **TEXT}))


def cogvlm() -> dict[str, tuple[int, ...]]:
    """Names and shapes of a CogVLM checkpoint."""
    found: dict[str, tuple[int, ...]] = {
        "model.vision.boi": (1, 1, WIDTH),
        "model.vision.patch_embedding.proj.bias": (8,),
    }
    for at in (f"model.layers.{n}" for n in range(LAYERS)):
        for side in SIDES:
            found[f"{at}.self_attn.{side}_expert_query_key_value.weight"] = (3 * WIDTH, WIDTH)
            found[f"{at}.self_attn.{side}_expert_dense.weight"] = (WIDTH, WIDTH)
            found |= {f"{at}.mlp.{side}_mlp.{name}": shape for name, shape in _mlp().items()}
        found |= {f"{at}.{name}_layernorm.weight": (WIDTH,) for name in ("input", "post_attention")}
        found[f"{at}.self_attn.rotary_emb.inv_freq"] = (8,)
    return found | _ends()


def mplug_owl2() -> dict[str, tuple[int, ...]]:
    """Names and shapes of an mPLUG-Owl2 checkpoint."""
    found: dict[str, tuple[int, ...]] = {
        "model.vision_model.embeddings.cls_token": (1, 1, 16),
        "model.visual_abstractor.visual_fc.weight": (WIDTH, 16),
    }
    for at in (f"model.layers.{n}" for n in range(LAYERS)):
        found |= {f"{at}.self_attn.{name}_proj.weight": (WIDTH, WIDTH) for name in "qo"}
        for way in (0, 1):
            found |= {f"{at}.self_attn.{name}_proj.multiway.{way}.weight": (WIDTH, WIDTH) for name in "kv"}
            found |= {f"{at}.{name}_layernorm.multiway.{way}.weight": (WIDTH,) for name in ("input", "post_attention")}
        found |= {f"{at}.mlp.{name}": shape for name, shape in _mlp().items()}
        found[f"{at}.self_attn.rotary_emb.inv_freq"] = (8,)
    return found | _ends()


def _mlp() -> dict[str, tuple[int, ...]]:
    inward = {f"{name}_proj.weight": (INNER, WIDTH) for name in ("gate", "up")}
    return inward | {"down_proj.weight": (WIDTH, INNER)}


def _ends() -> dict[str, tuple[int, ...]]:
    ends = ("model.embed_tokens.weight", "lm_head.weight")
    return {**dict.fromkeys(ends, (264, WIDTH)), "model.norm.weight": (WIDTH,)}


def as_qwen2_vl(llava: Tensors) -> Tensors:
    """The language model's layers and last norm under the names that Qwen2-VL has for them."""
    names = {name: name.removeprefix("language_model.") for name in llava if name.startswith("language_model.")}
    return {own: llava[name] for name, own in names.items() if "layers" in own or own == "model.norm.weight"}


def as_cogvlm(owl: Tensors) -> Tensors:
    """mPLUG-Owl2's language model as CogVLM's: its way 0 for text, its way 1 for images, what they share in both."""
    found = {name: owl[name] for name in _ends()}
    for at in (f"model.layers.{n}" for n in range(LAYERS)):
        for name in ("input", "post_attention"):
            found[f"{at}.{name}_layernorm.weight"] = owl[f"{at}.{name}_layernorm.multiway.0.weight"]
        for way, side in enumerate(SIDES):
            own = f"{at}.self_attn"
            rows = [f"{own}.q_proj.weight", *(f"{own}.{name}_proj.multiway.{way}.weight" for name in "kv")]
            found[f"{own}.{side}_expert_query_key_value.weight"] = torch.cat([owl[name] for name in rows])
            found[f"{own}.{side}_expert_dense.weight"] = owl[f"{own}.o_proj.weight"]
            found |= {f"{at}.mlp.{side}_mlp.{name}": owl[f"{at}.mlp.{name}"] for name in _mlp()}
    return found
