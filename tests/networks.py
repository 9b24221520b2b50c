"""Tiny random networks of every family, in float64, for tests of correspondence."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

SIZES = {"vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
PLAIN = {"num_attention_heads": 3}
# by family: class, class of its config, what differs between the variants that are tried
NETWORKS: dict[str, tuple[str, str, list[dict[str, Any]]]] = {
    "llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        [{**SIZES, **HEADS}, {**SIZES, **HEADS, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}],
    ),
    "mistral": ("MistralForCausalLM", "MistralConfig", [{**SIZES, **HEADS, "head_dim": 8, "sliding_window": 4}]),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", [{**SIZES, **HEADS}, {**SIZES, **HEADS, "tie_word_embeddings": True}]),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", [{**SIZES, **HEADS, "head_dim": 8}]),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", [{**SIZES, **HEADS, "head_dim": 8, "sliding_window": 4}]),
    "gemma3_text": ("Gemma3ForCausalLM", "Gemma3TextConfig", [{**SIZES, **HEADS, "head_dim": 8, "sliding_window": 4}]),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        [
            {"vocab_size": 61, "n_embd": 24, "n_layer": 2, "n_head": 3, "n_positions": 32, "tie_word_embeddings": tied}
            for tied in (True, False)
        ],
    ),
    "gpt_neox": (
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        [
            {
                **SIZES,
                **PLAIN,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            },
            {**SIZES, **PLAIN, "use_parallel_residual": False, "attention_bias": False},
        ],
    ),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        [
            {**SIZES, **PLAIN, "ffn_dim": 40, "max_position_embeddings": 32, "word_embed_proj_dim": 24},
            {**SIZES, **PLAIN, "ffn_dim": 40, "max_position_embeddings": 32, "word_embed_proj_dim": 16},
            {
                **{**SIZES, **PLAIN, "ffn_dim": 40, "max_position_embeddings": 32, "word_embed_proj_dim": 16},
                **{"do_layer_norm_before": False, "activation_function": "gelu", "tie_word_embeddings": False},
            },
        ],
    ),
    "phi3": (
        "Phi3ForCausalLM",
        "Phi3Config",
        [
            {**SIZES, **HEADS, "pad_token_id": 0, "hidden_size": 32},
            {**SIZES, **HEADS, "pad_token_id": 0, "hidden_size": 32, "partial_rotary_factor": 0.5},
        ],
    ),
    "bloom": ("BloomForCausalLM", "BloomConfig", [{"vocab_size": 61, "hidden_size": 24, "n_layer": 2, "n_head": 3}]),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", [{**SIZES, **HEADS, "num_local_experts": 4}]),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        [
            {
                **{**SIZES, **HEADS, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2},
                **{"moe_intermediate_size": 16, "mlp_only_layers": [0]},
            }
        ],
    ),
    "bert": (
        "BertForMaskedLM",
        "BertConfig",
        [{**SIZES, **PLAIN, "max_position_embeddings": 32, "tie_word_embeddings": tied} for tied in (True, False)],
    ),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        [{**SIZES, **PLAIN, "image_size": 16, "patch_size": 8, "num_labels": 5}],
    ),
}
CASES = [(family, number) for family, (_, _, variants) in NETWORKS.items() for number in range(len(variants))]
Outputs = Callable[[Mapping[str, Tensor]], Tensor]


def network(
    family: str, variant: int = 0, seed: int = 0, folded: bool = False
) -> tuple[Any, dict[str, Tensor], Outputs]:
    """A config as in config.json, random float64 tensors (gains and biases too), and their logits."""
    import transformers

    from alignment import fold

    name, config_name, variants = NETWORKS[family]
    config = getattr(transformers, config_name)(**variants[variant])
    model = build(name, config)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    ties = model.all_tied_weights_keys
    for key, value in model.state_dict().items():
        if key in ties:
            continue
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        gain = value.dim() == 1 and bool((value == value[0]).all()) and key.endswith("weight")
        tensors[key] = (
            value.double() + 0.3 * noise if gain else noise * (0.5 if value.dim() == 1 else value.shape[-1] ** -0.5)
        )
    described = config.to_dict()
    if folded:
        tensors, described = fold(tensors, described, untie=True)
        if ties and not described["tie_word_embeddings"]:
            config.tie_word_embeddings = False
            model = build(name, config)
    return described, tensors, lambda given: logits(model, given)


def build(name: str, config: Any) -> Any:
    """The model, in float64 and for evaluation."""
    import transformers

    torch.manual_seed(0)
    config._experts_implementation = "eager"  # the grouped kernel knows no float64
    return getattr(transformers, name)(config).double().eval()


def logits(model: Any, tensors: Mapping[str, Tensor]) -> Tensor:
    """(2, T, V) logits of two sequences, or (2, classes) of two images, with these tensors in the model."""
    dtype = next(iter(tensors.values())).dtype
    model = model.to(dtype)
    whole = {**tensors, **{alias: tensors[source] for alias, source in model.all_tied_weights_keys.items()}}
    generator = torch.Generator().manual_seed(1)
    if model.config.model_type == "vit":
        given = (torch.randn(2, 3, 16, 16, generator=generator, dtype=torch.float64).to(dtype),)
    else:
        given = (torch.randint(2, 61, (2, 12), generator=generator),)
    with torch.no_grad():
        model.load_state_dict(whole)
        return model(*given).logits
