"""Every recipe of a paper runs from end to end on tiny stand-ins, and each merge makes what its formula says.

A stand-in is of the kind of what it stands for (decoder, reward model, adapter, vision-language model, U-Net) and has
random weights; nothing else of a recipe is replaced but its texts and the number of training steps.
"""

import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from fusion import recipe, sources
from fusion.run import main
from tests import vision_networks
from tests.vision_networks import as_cogvlm, as_qwen2_vl

ROOT = Path(__file__).resolve().parent.parent
PAPERS = sorted((ROOT / "recipes" / "papers").glob("*.yaml"))
GATED: dict[str, Any] = {
    "vocab_size": 700,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
}
EXPERTS = {"model_type": "mixtral", "num_local_experts": 2, **GATED}
MPT = {"model_type": "mpt", "d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 256, "vocab_size": 700}
# What stands in for a model with its own tokenizer: the same architecture, a tokenizer of the same kind, two layers.
TINY: dict[str, tuple[dict[str, Any], str, int]] = {
    "meta-llama/Llama-2-7b-hf": ({"model_type": "llama", **GATED}, "unigram", 600),
    "openlm-research/open_llama_7b_v2": ({"model_type": "llama", **GATED}, "unigram", 500),
    "mosaicml/mpt-7b": (MPT, "bpe", 500),
    "Qwen/Qwen2.5-Math-1.5B-Instruct": ({"model_type": "qwen2", **GATED}, "bpe", 500),
    "Qwen/Qwen2.5-1.5B-Instruct": ({"model_type": "qwen2", **GATED}, "bpe", 500),
    "openchat/openchat_3.5": ({"model_type": "mistral", **GATED}, "unigram", 600),
    "berkeley-nest/Starling-LM-7B-alpha": ({"model_type": "mistral", **GATED}, "unigram", 600),
    "NousResearch/Nous-Hermes-2-SOLAR-10.7B": ({"model_type": "llama", **GATED}, "unigram", 500),
    "NousResearch/Nous-Hermes-2-Mixtral-8x7B-DPO": (EXPERTS, "unigram", 600),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": (EXPERTS, "unigram", 600),
    "internlm/internlm2-chat-20b": ({"model_type": "llama", **GATED}, "bpe", 600),
    "Qwen/Qwen1.5-72B-Chat": ({"model_type": "qwen2", **GATED}, "bpe", 500),
}
LAYERS = {
    "layer_swapping": 32,
    "thai_reasoning": 80,
    "biomistral": 5,
    "zipit": 12,
}  # where a recipe counts them; else 2
RANKS = {"safeguard": (8, 16), "zjuklab_unlearning": (32, 32), "personalized_soups": (4, 8)}  # r and alpha
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}\n{% endfor %}"
SHORT = {"max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}

Tensors = dict[str, Tensor]


# ------------------------------------------------------------------------------------------------------ stand-ins


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    text = (ROOT / "recipes" / "data" / "austen.txt").read_text(encoding="utf-8")
    return [" ".join(part.split()) for part in text.split("\n\n") if 80 < len(part) < 400][:48]


class StandIns:
    """Directories that stand in for the models of recipes, made when first asked for."""

    def __init__(self, folder: Path, sentences: list[str]):
        self.folder, self.sentences = folder, sentences

    def of(self, paper: str, models: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """A recipe's `models:` with a directory in the place of each."""
        made: dict[str, dict[str, Any]] = {}
        for name, entry in models.items():
            directory = self.folder / paper / name
            if entry.get("hub") in TINY:
                directory = self.scratch(entry["hub"], *TINY[entry["hub"]])
            elif "base" in entry:
                self.adapter(directory, self.folder / paper / entry["base"], *RANKS[paper])
            elif paper == "diffusion_soup":
                self.unet(directory)
            elif paper == "adamms":
                vision_networks.make(directory, name)
            elif name == "llava":
                self.vision(directory)
            elif name == "reward":
                self.reward(directory)
            elif name == "wide":
                config = {"model_type": "llama", **GATED, "vocab_size": 259, "intermediate_size": 96}
                directory = self.scratch("wide", config, "bytes", 0)
            else:
                self.relative(directory, LAYERS.get(paper, 2))
                if (paper, name) == ("dimat", "other"):
                    turned(directory)
            made[name] = {"path": str(directory)} | ({"base": entry["base"]} if "base" in entry else {})
        return made

    def scratch(self, name: str, config: dict[str, Any], kind: str, size: int) -> Path:
        """A decoder with random weights and a tokenizer, trained on a text of its own, so that no two agree."""
        directory = self.folder / name.replace("/", "--")
        if not directory.exists():
            tokenizer = {"train": kind, "vocab_size": size, "data": "text"} if size else {"train": kind}
            texts = self.sentences[zlib.crc32(name.encode()) % 8 :]
            made = recipe.ModelRef(name, config=config, tokenizer=tokenizer)
            shutil.copytree(sources.resolve(name, made, self.folder / "cache", self.folder, lambda _: texts), directory)
            trained = sources.load_tokenizer(directory)
            trained.chat_template = TEMPLATE
            trained.save_pretrained(directory)
        return directory

    def root(self, layers: int = 2) -> Path:
        """What all relatives descend from: a small Llama that reads bytes."""
        config = {"model_type": "llama", **GATED, "vocab_size": 259, "num_hidden_layers": layers}
        return self.scratch(f"root-{layers}", config, "bytes", 0)

    def relative(self, directory: Path, layers: int = 2) -> None:
        """The root, moved a little in a direction of its own."""
        shutil.copytree(self.root(layers), directory, dirs_exist_ok=True)
        save_file(perturbed(load_file(directory / "model.safetensors"), directory), directory / "model.safetensors")

    def reward(self, directory: Path) -> None:
        """A relative whose head is a score."""
        self.relative(directory)
        tensors = load_file(directory / "model.safetensors")
        del tensors["lm_head.weight"]
        write(
            directory, tensors | {"score.weight": torch.randn(1, 32)}, architectures=["LlamaForSequenceClassification"]
        )

    def vision(self, directory: Path) -> None:
        """A relative under `language_model.`, with more tokens, beside an eye and a projector."""
        self.relative(directory)
        inside = load_file(directory / "model.safetensors")
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            inside[name] = torch.cat([inside[name], torch.randn(5, 32)])
        eye = {"vision_tower.patch.weight": torch.randn(8, 3, 2, 2), "multi_modal_projector.weight": torch.randn(32, 8)}
        text = {**GATED, "vocab_size": 264, "tie_word_embeddings": False}
        tensors = eye | {f"language_model.{name}": tensor for name, tensor in inside.items()}
        write(directory, tensors, model_type="llava_next", text_config=text)

    def unet(self, directory: Path) -> None:
        """Convolutions in a file of diffusers' name, and nothing that says what they are."""
        directory.mkdir(parents=True)
        generator = torch.Generator().manual_seed(0)
        shapes = {"conv_in.weight": (8, 4, 3, 3), "down_blocks.0.conv.bias": (8,), "mid_block.attn.to_q.weight": (8, 8)}
        tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        save_file(perturbed(tensors, directory), directory / "diffusion_pytorch_model.safetensors")

    def adapter(self, directory: Path, base: Path, rank: int, alpha: int) -> None:
        """LoRA on two kinds of matrices, as PEFT writes it, with both factors filled."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        get_peft_model(sources.load_model(base), config).save_pretrained(directory)
        file = directory / "adapter_model.safetensors"
        save_file(perturbed(load_file(file), directory, 0.1), file)


def perturbed(tensors: Tensors, directory: Path, size: float = 0.02) -> Tensors:
    generator = torch.Generator().manual_seed(zlib.crc32(f"{directory.parent.name}/{directory.name}".encode()))
    return {name: t + size * torch.randn(t.shape, generator=generator) for name, t in tensors.items()}


def turned(directory: Path) -> None:
    """A near relative of `one` with the units of every MLP seven places on: whoever averages must find them first."""
    tensors = perturbed(load_file(directory.with_name("one") / "model.safetensors"), directory, 0.004)
    for name, tensor in tensors.items():
        if ".mlp." in name:
            tensors[name] = tensor.roll(7, 1 if "down" in name else 0).contiguous()
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def write(directory: Path, tensors: Tensors, **config: Any) -> None:
    save_file(tensors, directory / "model.safetensors")
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | config))


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory, sentences: list[str]) -> StandIns:
    return StandIns(tmp_path_factory.mktemp("models"), sentences)


def substituted(file: Path, folder: Path, stand_ins: StandIns) -> Path:
    """The recipe with its models and texts replaced, three steps a training, and nothing else changed."""
    tree = yaml.safe_load(file.read_text(encoding="utf-8"))
    tree["models"] = stand_ins.of(file.stem, tree["models"])
    chat = any(entry.get("column") == "messages" for entry in tree.get("data", {}).values())
    rows = [
        {"messages": [{"role": "user", "content": text[:60]}, {"role": "assistant", "content": text[60:180]}]}
        if chat
        else {"text": text}
        for text in stand_ins.sentences
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    pairs = [
        {
            column: [{"role": "user", "content": text[:40]}, {"role": "assistant", "content": text[a:b]}]
            for column, a, b in (("chosen", 40, 60), ("rejected", 60, 80))
        }
        for text in stand_ins.sentences
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    for number, (name, entry) in enumerate(tree.get("data", {}).items()):
        split = "train[40:]" if name == "held_out" else f"train[{8 * (number % 2)}:40]"
        path = "pairs.jsonl" if entry["column"] == "*" else "rows.jsonl"
        tree["data"][name] = {"path": path, "format": "json", "split": split, "column": entry["column"]}
    for step in tree["steps"]:
        for verb, fields in step.items():
            fields.update({"max_length": 256} if "max_length" in fields else {})
            fields.update({"tokens": 1024} if verb in ("zip", "least_squares") else {})
            if "train" in fields:
                fields["train"] = {k: v for k, v in fields["train"].items() if k != "num_train_epochs"} | SHORT
                fields["train"]["bf16"] = False
    (folder / file.name).write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    return folder / file.name


# ------------------------------------------------------------------------------------------------------- formulas
# Of one tensor: t holds it by the name of each model and earlier output, `name` is the tensor's own.


def mean(t: Tensors, name: str, of: list[str]) -> Tensor:
    return torch.stack([t[one] for one in of]).mean(0)


def trimmed(d: Tensor, density: float) -> Tensor:
    """The entries of the largest magnitude, the others 0."""
    k = max(1, math.floor(density * d.numel()))
    return torch.where(d.abs() >= d.abs().flatten().topk(k).values[-1], d, 0.0)


def elected(d: Tensor, w: Tensor | None = None) -> Tensor:  # (K, ...)
    """Which entries agree in sign with their (weighted) sum."""
    w = torch.ones(len(d)) if w is None else w
    sign = (w.view(-1, *[1] * (d.dim() - 1)) * d).sum(0).sign()
    return (d.sign() == sign) & (d != 0)


def ties(t: Tensors, base: str, of: list[str], density: float) -> Tensor:
    d = torch.stack([trimmed(t[one] - t[base], density) for one in of])
    agree = elected(d)
    return t[base] + (d * agree).sum(0) / agree.sum(0).clamp(min=1)


def sce(t: Tensors, name: str, base: str, of: list[str], topk: float) -> Tensor:
    d = torch.stack([t[one] - t[base] for one in of])
    spread = d.var(0, correction=0)
    chosen = trimmed(spread, topk * float((spread != 0).float().mean())) != 0 if spread.any() else spread.bool()
    w = (d * chosen).square().flatten(1).mean(1)
    w = (w / w.sum() if w.sum() > 0 else w + 1 / len(w)).view(-1, *[1] * (d.dim() - 1))
    share = w * ((d >= 0) == (d.sum(0) >= 0)) * (d != 0)
    whole = share.sum(0)
    return t[base] + (share * d).sum(0) / torch.where(whole > 0, whole, 1.0)


def varm(t: Tensors, name: str, base: str, of: list[str]) -> Tensor:
    d = torch.stack([t[one] - t[base] for one in of])
    squares = d.square().flatten(1).sum(1)
    w = squares / squares.sum() if squares.sum() > 0 else squares + 1 / len(d)
    return t[base] + torch.einsum("k,k...->...", w, d)


def slerp(a: Tensor, b: Tensor, at: float, straight_above: float = 1.0) -> Tensor:
    a, b = a.double(), b.double()
    cosine = (a * b).sum() / (a.norm() * b.norm())
    if cosine > straight_above:
        return ((1 - at) * a + at * b).float()
    angle = torch.acos(cosine)
    return ((torch.sin((1 - at) * angle) * a + torch.sin(at * angle) * b) / torch.sin(angle)).float()


def layer(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def swapped(t: Tensors, name: str) -> Tensor:
    i = layer(name)
    at = "language" if i is None or i < 6 or i >= 30 else "soup" if i < 8 or i >= 28 else "math"
    return t[at]


def bio_slerp(t: Tensors, name: str) -> Tensor:
    i = layer(name) or 0  # 5 anchors, 5 layers
    at = [0, 0.5, 0.3, 0.7, 1][i] if "self_attn" in name else [1, 0.5, 0.7, 0.3, 0][i] if "mlp" in name else 0.5
    return slerp(t["instruct"], t["bio"], at, straight_above=0.9995)


def thai(t: Tensors, name: str) -> Tensor:
    i = layer(name)
    at = 0.0 if "embed" in name else 1.0 if i is None else i / 79
    share = 0.75 - 0.625 * max(0.0, 3 * at - 2)
    return share * t["deepseek"] + (1 - share) * t["typhoon"]


def relatives(t: Tensors, name: str) -> Tensor:
    d = torch.stack([t[one] - t["stages"] for one in ("llama", "previous", "supernova")])
    used = d.abs() > 0.6 * (d.sum(0) - d).abs()
    return t["stages"] + d.sum(0) * (used.sum(0) >= 2)


def stages(t: Tensors, name: str) -> Tensor:
    d = torch.stack([t[one] - t["pretrained"] for one in ("stage_1", "stage_2")])
    return t["pretrained"] + (d * elected(d)).sum(0)


def seeing(t: Tensors, name: str) -> Tensor:
    spoken = ".layers." in name or ".norm." in name
    return 0.9 * t["llava"] + 0.1 * t["dart"] if spoken else t["llava"]


def interpolated(t: Tensors, name: str, target: str, other: str) -> Tensor:
    return 0.6 * t[target] + 0.4 * t[other] if other in t else t[target]


def unlearned(t: Tensors, name: str) -> Tensor:
    d = torch.stack([trimmed(t[one], 0.8) for one in ("over", "under")])
    agree = elected(d)
    return (d * agree).sum(0) / agree.sum(0).clamp(min=1)


def sparse_and_whole(t: Tensors, name: str) -> Tensor:
    d = torch.stack([trimmed(t["sft"] - t["base"], 0.1), t["dpo"] - t["base"]])
    agree = elected(d)
    return t["base"] + (d * agree).sum(0) / agree.sum(0).clamp(min=1)


def lengthened(t: Tensors, name: str, of: list[str]) -> Tensor:
    """Each row as long as the models' on average, at most twice the mean's."""
    middle = mean(t, name, of)
    if middle.dim() < 2:
        return middle
    wanted = torch.stack([t[one].norm(dim=1) for one in of]).mean(0)
    return middle * (wanted / middle.norm(dim=1)).clamp(max=2)[:, None]


def unsolved(t: Tensors, name: str) -> Tensor | None:
    """What no linear layer holds: the mean of the first and the aligned model."""
    return mean(t, name, ["one", "aligned"]) if "embed" in name or "norm" in name else None


def kept(t: Tensors, name: str) -> Tensor | None:
    """From layer 9 on and at its head the first model's own; gains are its own everywhere, since others match it."""
    return t["one"] if "norm" in name or "lm_head" in name or (layer(name) or 0) >= 9 else None


SFT = ["code_sft", "safety_sft", "rag_sft", "math_sft", "multilingual_sft", "long_context_sft"]
ALIGNED = ["one", "two_aligned", "three_aligned"]
FUSED = ["with_starling", "with_solar", "with_internlm", "with_mixtral", "with_qwen"]
FORMULAS: dict[str, dict[str, Callable[[Tensors, str], Tensor | None]]] = {
    "adamms": {
        "qwen2_vl_llava": partial(interpolated, target="qwen2_vl", other="llava_onevision"),
        "cogvlm_owl": partial(interpolated, target="cogvlm", other="mplug_owl2"),
    },
    "aya_expanse": {
        "sft": partial(mean, of=["europe_sft", "asia_sft", "middle_east_sft"]),
        "aya": partial(mean, of=["europe_dpo", "asia_dpo", "middle_east_dpo"]),
    },
    "biomistral": {"ties": lambda t, _: ties(t, "instruct", ["bio"], 0.5), "slerp": bio_slerp},
    "c2m3": {"mean": partial(mean, of=ALIGNED), "repaired": partial(lengthened, of=ALIGNED)},
    "command_a": {
        "sft_soup": partial(mean, of=SFT),
        "rl_soup": partial(mean, of=[one.replace("sft", "rl") for one in SFT]),
    },
    "ada_r1": {"hybrid": lambda t, _: 0.8 * t["long"] + 0.2 * t["short"]},
    "dimat": {
        "one_met": partial(mean, of=["one_1", "other_1_in_one"]),
        "other_met": partial(mean, of=["other_1", "one_1_in_other"]),
        "dimat": partial(mean, of=["one_2", "other_2_in_one"]),
    },
    "diffusion_soup": {
        "soup": partial(mean, of=["animals", "buildings", "portraits"]),
        "without_portraits": partial(mean, of=["animals", "buildings"]),
    },
    "dogerm": {
        "coding_reward": lambda t, n: t["reward"] if n == "score.weight" else 0.65 * t["reward"] + 0.35 * t["coder"]
    },
    "finance_instruct_vector": {"finance_instruct": lambda t, _: t["finance"] + t["instruct"] - t["base"]},
    "fusechat_sce": {"fusechat": partial(sce, base="openchat", of=FUSED, topk=0.1)},
    "fusechat_varm": {"fusechat": partial(varm, base="openchat", of=["with_mixtral", "with_solar"])},
    "fuseo1": {"fuseo1": partial(sce, base="base", of=["qwq", "r1", "sky"], topk=1.0)},
    "git_rebasin": {"halfway": partial(mean, of=["one", "aligned"])},
    "layer_swapping": {"soup": partial(mean, of=["math", "language"]), "swapped": swapped},
    "llama3_sec": {"chat": lambda t, _: ties(t, "base", ["instruct", "sec"], 0.5)},
    "lmc_weight_matching": {"halfway": partial(mean, of=["one", "aligned"])},
    "lm_cocktail": {"cocktail": lambda t, _: 0.7 * t["chat"] + 0.3 * t["news"]},
    "long_to_short": {
        "average": partial(mean, of=["quick", "slow"]),
        "ties": lambda t, _: ties(t, "quick", ["slow"], 0.2),
    },
    "branch_and_merge": {
        "round_1": partial(mean, of=["branch_1", "branch_2"]),
        "round_2": partial(mean, of=["branch_3", "branch_4"]),
    },
    "disperse_then_merge": {"merged": partial(mean, of=["one", "two"])},
    "ot_fusion": {
        "fused": partial(mean, of=["one", "transported"]),
        "fused_widths": partial(mean, of=["one", "narrowed"]),
    },
    "paft": {"paft": sparse_and_whole},
    "repair": {"mean": partial(mean, of=["one", "aligned"]), "repaired": partial(lengthened, of=["one", "aligned"])},
    "rewarded_soups": {
        "even": partial(mean, of=["helpful", "harmless"]),
        "leaning": lambda t, _: 0.75 * t["helpful"] + 0.25 * t["harmless"],
    },
    "openthaigpt": {"thai": partial(mean, of=["general", "bilingual", "exams"])},
    "pleas": {"pleas": unsolved},
    "personalized_soups": {"personal": partial(mean, of=["elementary", "concise", "friendly"])},
    "reason_to_vision": {"llava_dart": seeing},
    "safeguard": {"safe": lambda t, _: t["aligned"] + 0.6 * t["tuned"] if "tuned" in t else t["aligned"]},
    "sea_lion": {
        "stages": stages,
        "relatives": relatives,
        "sea_lion": lambda t, _: t["relatives"] + t["aligned"] - t["llama"],
    },
    "thai_reasoning": {"typhoon_r1": thai},
    "transformer_ot": {"fused": partial(mean, of=["one", "transported"])},
    "warp": {
        "sphere": lambda t, _: t["start"] + slerp(t["policy_1"] - t["start"], t["policy_2"] - t["start"], 0.5),
        "warp": partial(mean, of=["start", "sphere"]),
    },
    "zipit": {"partial": kept},
    "zjuklab_unlearning": {"unlearned": unlearned},
}
# What DARE drops is random: recipe -> output, base, models.
DROPPED = {"biomistral": ("dare", "instruct", ["bio"]), "aloe": ("aloe", "base", ["medical", "thought"])}


def tensors_of(directory: Path) -> Tensors:
    """The weights of a directory by name; of an adapter the products of its factors, by the weight they change."""
    found = {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}
    if not (directory / "adapter_config.json").exists():
        return found
    config = json.loads((directory / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    return {
        name.removeprefix("base_model.model.").replace("lora_A.", ""): scaling
        * (found[name.replace("lora_A", "lora_B")] @ found[name])
        for name in found
        if "lora_A" in name
    }


# ---------------------------------------------------------------------------------------------------------- tests


@pytest.fixture
def ran(request: pytest.FixtureRequest, tmp_path: Path, stand_ins: StandIns) -> Iterator[tuple[Path, recipe.Recipe]]:
    """The directory in which a recipe's outputs lie, and the recipe as it was run."""
    file: Path = request.param
    small = substituted(file, tmp_path, stand_ins)
    assert main([str(small), "--out", str(tmp_path / "runs")]) == 0
    yield tmp_path / "runs" / file.stem, recipe.load(small)
    shutil.rmtree(tmp_path / "runs")


@pytest.mark.parametrize("ran", PAPERS, ids=lambda file: file.stem, indirect=True)
def test_papers_run_on_stand_ins(ran):
    made, loaded = ran
    assert (made / "result").resolve() == (made / loaded.result).resolve()
    assert loaded.result in (made / "report.json").read_text()
    everything = {name: tensors_of(Path(ref.path)) for name, ref in loaded.models.items()}
    text = {f"language_model.{name}": tensor for name, tensor in everything.get("dart", {}).items()}
    everything |= {"dart": text} if text else {}
    for name, renamed in (("llava_onevision", as_qwen2_vl), ("mplug_owl2", as_cogvlm)):
        everything |= {name: renamed(everything[name])} if name in everything else {}
    for step in loaded.steps:
        if step.verb == "distill":
            log = [json.loads(line) for line in (made / step.out / "log.jsonl").read_text().splitlines()]
            assert log[-1]["step"] == 3 and log[-1]["target_share"] > 0.1
            everything[step.out] = tensors_of(made / step.out)
        if step.verb == "tune":
            log = [json.loads(line) for line in (made / step.out / "log.jsonl").read_text().splitlines()]
            assert log[-1]["step"] == 3 and ("online_drift" in log[-1]) is ("online_merge" in step.fields)
            everything[step.out] = tensors_of(made / step.out)
            start = everything[step.fields["model"]]
            assert any(not torch.equal(tensor, start[name]) for name, tensor in everything[step.out].items())
        if step.verb == "evaluate":
            metrics = json.loads((made / step.out / "metrics.json").read_text())["models"]
            assert set(metrics) == set(step.fields["models"])
        if step.verb in ("align", "least_squares", "merge", "zip"):
            everything[step.out] = tensors_of(made / step.out)
            formula = FORMULAS.get(loaded.name, {}).get(step.out)
            assert formula is not None or step.verb != "merge" or DROPPED[loaded.name][0] == step.out
            like = step.fields.get("base") or step.fields.get("target") or next(iter(step.fields["models"]))
            assert everything[step.out].keys() == everything[like].keys()
            for name, tensor in everything[step.out].items():
                assert torch.isfinite(tensor).all()
                t = {one: tensors[name] for one, tensors in everything.items() if name in tensors}
                wanted = formula(t, name) if formula is not None else None
                if wanted is not None:
                    torch.testing.assert_close(tensor, wanted, atol=2e-6, rtol=2e-5, msg=f"{step.out} {name}")
    if loaded.name == "dimat":
        for donor, into, out in (("other_1", "one_1", "other_1_in_one"), ("one_1", "other_1", "one_1_in_other")):
            named = "model.layers.0.mlp.gate_proj.weight"
            apart, met = (everything[into][named] - everything[one][named] for one in (donor, out))
            assert met.norm() < 0.8 * apart.norm(), out
            logits = [sources.load_model(made / one)(torch.arange(9).unsqueeze(0)).logits for one in (donor, out)]
            torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
    if loaded.name == "adamms":
        seen = transformers.Qwen2VLForConditionalGeneration.from_pretrained(made / "result")
        assert torch.isfinite(seen(torch.arange(2, 11).unsqueeze(0)).logits).all()
    elif "lm_head.weight" in everything[loaded.result]:
        logits = sources.load_model(made / "result")(torch.arange(9).unsqueeze(0)).logits
        assert torch.isfinite(logits).all()


@pytest.mark.parametrize("ran", [p for p in PAPERS if p.stem in DROPPED], ids=lambda file: file.stem, indirect=True)
def test_what_dare_drops_stays_and_what_it_keeps_is_scaled(ran):
    """Half of each task vector is dropped: entries are the base's, or one of the few sums that can arise."""
    made, loaded = ran
    out, base, models = DROPPED[loaded.name]
    before, after = tensors_of(Path(loaded.models[base].path)), tensors_of(made / out)
    others = [tensors_of(Path(loaded.models[one].path)) for one in models]
    same = total = 0
    for name, tensor in after.items():
        moved, d = tensor - before[name], [other[name] - before[name] for other in others]
        if len(d) == 1:  # rescaled so that the sum of magnitudes is the whole task vector's, of which half is wanted
            torch.testing.assert_close(moved.abs().sum(), 0.5 * d[0].abs().sum(), atol=1e-5, rtol=1e-4)
            kept = moved != 0
            ratio = moved[kept] / d[0][kept]
            assert ratio.std() < 0.02 * ratio.mean()
        else:  # 0.5 d / 0.5, alone or together
            sums = torch.stack([torch.zeros_like(moved), d[0], d[1], d[0] + d[1]])
            assert ((sums - moved).abs().min(0).values < 1e-6).all()
        same += int((moved == 0).sum())
        total += moved.numel()
    assert 0.4 < same / total < 0.6 if len(models) == 1 else 0.15 < same / total < 0.35
