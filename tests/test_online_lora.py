"""Online merging below a LoRA adapter: windows against a loop by hand in float64, ranks, resume, recipes, bad input."""

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, Trainer

from fusion import recipe, run
from fusion.online import OnlineMergeCallback
from fusion.online._below import refuse_moving_reference
from fusion.plan import plan
from tests.processes import together
from tests.test_online_callback import Rows, adapter, loaded, models, save, trainer
from tests.test_tune import MERGE, tune, weights, write

__all__ = ["models"]  # a fixture
ALPHA, EVERY, STEPS, RATE = 0.25, 2, 5, 0.5
PEFT = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"]}


def adapted(models: Path, folder: Path, *callbacks, peft=PEFT, **changed) -> Trainer:
    """A trainer of a fresh adapter over `start`."""
    run = trainer(models / "start", folder, *callbacks, **({"max_steps": STEPS, "optim": "sgd"} | changed))
    torch.manual_seed(5)
    run.model = run.model_wrapped = get_peft_model(run.model, LoraConfig(**peft))
    return run


def how(models: Path, method="linear", **more) -> OnlineMergeCallback:
    return OnlineMergeCallback(models / "base", method=method, **({"alpha": ALPHA, "every": EVERY} | more))


class Inputs(Trainer):
    """Keeps what it is given, step by step."""

    def training_step(self, model, inputs, *rest):
        self.seen = [*vars(self).get("seen", []), inputs["input_ids"].clone()]
        return super().training_step(model, inputs, *rest)


def trained(run: Trainer) -> dict[str, torch.Tensor]:
    """The whole model's weights by name, once trained."""
    return {name: p.detach() for name, p in run.model.merge_and_unload().named_parameters()}


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_windows_are_merged_into_the_weights_below_as_by_hand(models, tmp_path, method):
    callback = how(models, method, **({} if method == "linear" else {"density": 0.5}))
    one = adapted(models, tmp_path, callback, learning_rate=RATE, max_grad_norm=0.0)
    one = Inputs(model=one.model, args=one.args, train_dataset=Rows(), callbacks=[callback])
    net = LlamaForCausalLM.from_pretrained(models / "start").double()
    factors = {n: p.detach().double() for n, p in one.model.named_parameters() if p.requires_grad}
    one.train()
    got = trained(one)
    base, start = loaded(models / "base"), loaded(models / "start")
    scale, by_weight = 3 / 2, {}
    for name in factors:
        stem = name.removeprefix("base_model.model.").partition(".lora_")[0]
        by_weight.setdefault(f"{stem}.weight", {})[name.partition(".lora_")[2][0]] = factors[name]
    assert len(by_weight) == 4
    below = {name: start[name].double() for name in by_weight}
    for step, ids in enumerate(one.seen):
        if step % EVERY == 0:
            products = {name: scale * f["B"] @ f["A"] for name, f in by_weight.items()}
            adapted_then = {name: below[name] + products[name] for name in by_weight}
        own = dict(net.named_parameters())
        for name, f in by_weight.items():
            own[name].data = below[name] + scale * f["B"] @ f["A"]
        net.zero_grad()
        net(input_ids=ids, labels=ids).loss.backward()
        for name, f in by_weight.items():
            g = own[name].grad
            a, b = f["A"], f["B"]
            f["A"], f["B"] = a - RATE * scale * b.T @ g, b - RATE * scale * g @ a.T
        if (step + 1) % EVERY == 0:
            for name, f in by_weight.items():
                product = scale * f["B"] @ f["A"]
                change, vector = product - products[name], (start[name] - base[name]).bfloat16().double()
                if method == "linear":
                    merged = (1 - ALPHA) * change + ALPHA * vector
                else:
                    merged = ties(change, vector)
                below[name] = adapted_then[name] + merged - product
    for name, weight in start.items():
        f = by_weight.get(name)
        hand = weight.double() if f is None else below[name] + scale * f["B"] @ f["A"]
        torch.testing.assert_close(got[name].double(), hand, atol=2e-6, rtol=0, msg=name)
        assert f is None or (hand - weight).abs().max() > 1e-3


def ties(change: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """The larger half of each, of the sign of the weighted sum, added up."""
    parts = []
    for part, weight in ((change, 1 - ALPHA), (vector, ALPHA)):
        least = part.abs().flatten().sort(descending=True).values[part.numel() // 2 - 1]
        parts.append(weight * part * (part.abs() >= least))
    sign = (parts[0] + parts[1]).sign()
    return sum(part * (part.sign() == sign) for part in parts)


def test_nothing_to_merge_is_plain_lora_bit_by_bit(models, tmp_path):
    plain = adapted(models, tmp_path)
    plain.train()
    idle = adapted(models, tmp_path, how(models, alpha=0.0))
    idle.train()
    one, two = trained(plain), trained(idle)
    assert all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize("at", [3, 4])  # inside a window, and at its end
def test_a_saved_run_goes_on_bit_by_bit(models, tmp_path, at):
    changed = {"max_steps": 7, "save_strategy": "steps", "save_steps": at, "optim": "adamw_torch"}
    dare = {"method": "dare", "density": 0.5}
    straight = adapted(models, tmp_path, how(models, **dare), **changed)
    straight.train()
    again = adapted(models, tmp_path, how(models, **dare), **changed)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    one, two = trained(straight), trained(again)
    assert all(torch.equal(one[n], two[n]) for n in one)
    plain = adapted(models, tmp_path, **changed)
    plain.train()
    assert any(not torch.equal(one[n], t) for n, t in trained(plain).items())


def test_the_best_checkpoint_brings_back_the_weights_below(models, tmp_path):
    """Step 3 lies inside a window; the trainer itself reads the adapter alone."""
    runs = []
    for steps in (6, 3):
        made = adapted(models, tmp_path / str(steps), max_steps=steps, save_strategy="steps", save_steps=3)
        made.args.eval_strategy, made.args.eval_steps, made.args.load_best_model_at_end = "steps", 3, True
        made.args.metric_for_best_model, made.args.greater_is_better = "eval_loss", False
        runs.append(Trainer(made.model, made.args, train_dataset=Rows(), eval_dataset=Rows(), callbacks=[how(models)]))
        runs[-1].train()
    assert [run.state.best_global_step for run in runs] == [3, 3]
    best, short = (trained(run) for run in runs)
    assert all(torch.equal(best[name], weight) for name, weight in short.items())


def test_a_checkpoint_of_other_windows_is_refused(models, tmp_path):
    changed = {"max_steps": 4, "save_strategy": "steps", "save_steps": 3}
    adapted(models, tmp_path, how(models), **changed).train()
    with pytest.raises(ValueError, match="with windows of 2 steps and not 3"):
        adapted(models, tmp_path, how(models, every=3), **changed).train(str(tmp_path / "checkpoint-3"))
    next((tmp_path / "checkpoint-3").glob("online_merge-below*")).unlink()
    with pytest.raises(ValueError, match="saved without online merging below an adapter"):
        adapted(models, tmp_path, how(models), **changed).train(str(tmp_path / "checkpoint-3"))


def test_what_it_did_is_logged_and_the_whole_model_is_asked_for(models, tmp_path, capsys):
    callback = how(models, "ties", density=0.5)
    adapted(models, tmp_path, callback).train()
    found = callback.handle.readings
    start, base = loaded(models / "start"), loaded(models / "base")
    names = [name for name in start if "q_proj" in name or "down_proj" in name]
    vector = sum(float((start[name] - base[name]).square().sum()) for name in names)
    assert found["task_vector_norm"] == pytest.approx(vector**0.5, rel=1e-2)
    assert 0 < found["update_kept"] < 1 and 0 < found["sign_conflicts"] < 1
    assert "the result is the whole model" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["ddp", pytest.param("zero2", marks=pytest.mark.slow)])
def test_two_ranks_are_one_process(models, tmp_path, kind):
    """Every rank takes half of each batch."""
    changed = {"per_device_train_batch_size": 4, "learning_rate": RATE}
    alone = adapted(models, tmp_path, how(models, "ties", density=0.5), **changed)
    alone.train()
    together(2, "tests.lora_rank", kind, str(models), str(tmp_path))
    got = load_file(tmp_path / "whole.safetensors")
    for name, weight in trained(alone).items():
        torch.testing.assert_close(got[name], weight, atol=1e-6, rtol=0, msg=name)


def test_a_recipe_trains_an_adapter_and_leaves_the_whole_model(tmp_path):
    """With alpha 1 nothing is left of the update: one window ends at start + (start - base) where there are factors."""
    for seed, name in enumerate(("base", "start")):
        save(tmp_path / name, seed, vocab_size=300, max_position_embeddings=256)
        tokens(tmp_path / name)
    merge = {"base": "base", "method": "linear", "alpha": 1.0, "every": 2}
    models = {name: {"path": name} for name in ("base", "start")}
    step = tune("merged", online_merge=merge, peft={"r": 2, "target_modules": ["q_proj"]})
    file = write(tmp_path, step, models=models)
    assert run.main([str(file), "--out", str(tmp_path / "runs")]) == 0
    got, start, base = weights(tmp_path / "runs/r/merged"), weights(tmp_path / "start"), weights(tmp_path / "base")
    assert got.keys() == start.keys()
    for name, weight in start.items():
        moved = (weight - base[name]).bfloat16() if "q_proj" in name else 0
        torch.testing.assert_close(got[name], weight + moved, atol=1e-6, rtol=0, msg=name)


def tokens(folder: Path) -> None:
    """A tokenizer of single bytes for a model of 300 tokens."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bare = Tokenizer(BPE({piece: i for i, piece in enumerate([*alphabet, "<end>"])}, []))
    bare.pre_tokenizer, bare.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<end>", pad_token="<end>").save_pretrained(folder)


REFUSED = {
    "one step": (PEFT, {"every": 1}, "one step of a fresh adapter is no update"),
    "average": (PEFT, {"ema": 0.5}, "ema and towards_init are for a whole model's weights"),
    "dora": (PEFT | {"use_dora": True}, {}, "q_proj is adapted by default as Linear of a variant"),
    "bias": (PEFT | {"lora_bias": True}, {}, r"lora_B.default.bias is trained beside the factors"),
    "whole": (PEFT | {"modules_to_save": ["lm_head"]}, {}, r"lm_head.*is trained beside the factors of an adapter"),
}


@pytest.mark.parametrize(("peft", "more", "sentence"), REFUSED.values(), ids=REFUSED)
def test_what_can_not_be_merged_below_is_said(models, tmp_path, peft, more, sentence):
    with pytest.raises(ValueError, match=sentence):
        adapted(models, tmp_path, how(models, **more), peft=peft).train()


def test_an_adapter_trained_already_needs_the_whole_reference(models, tmp_path):
    """Its own change is part of the task vector."""
    adapter(models / "start", 1).save_pretrained(tmp_path / "sft")
    whole = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(models / "start"), tmp_path / "sft")
    whole.merge_and_unload().save_pretrained(tmp_path / "whole")

    def further(callback):
        run = trainer(models / "start", tmp_path, callback, max_steps=2, learning_rate=0.0)
        model = PeftModel.from_pretrained(run.model, tmp_path / "sft", is_trainable=True)
        one = Trainer(model=model, args=run.args, train_dataset=Rows(), callbacks=[callback])
        one.train()
        return trained(one)

    with pytest.raises(ValueError, match="trained already, so the weights below it are no reference"):
        further(how(models))
    got = further(OnlineMergeCallback(models / "base", tmp_path / "whole", method="linear", alpha=ALPHA, every=2))
    start, base = loaded(tmp_path / "whole"), loaded(models / "base")
    for name, weight in start.items():
        moved = ALPHA * (weight - base[name]).bfloat16() if "q_proj" in name else 0
        torch.testing.assert_close(got[name], weight + moved, atol=1e-6, rtol=0, msg=name)


def test_weights_below_that_are_coarse_sharded_or_tied_are_refused(models, tmp_path):
    run = adapted(models, tmp_path, how(models))
    run.model.get_base_model().bfloat16()
    with pytest.raises(ValueError, match="keep float32 master weights"):
        run.train()
    run = adapted(models, tmp_path, how(models))
    run.model.get_base_model().model.layers[0].self_attn.q_proj.base_layer.weight.ds_id = 0  # ZeRO-3 hangs it there
    with pytest.raises(ValueError, match="q_proj.weight is sharded; below an adapter merges one process, DDP, ZeRO-1"):
        run.train()
    model = LlamaForCausalLM.from_pretrained(models / "tied")
    callback = OnlineMergeCallback(models / "base", models / "tied", alpha=ALPHA, every=2)
    args = trainer(models / "start", tmp_path, max_steps=2).args
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="embed_tokens.weight is tied to another tensor"):
        Trainer(model=model, args=args, train_dataset=Rows(), callbacks=[callback]).train()


def test_a_reference_made_of_the_weights_below_is_refused(tmp_path):
    refuse_moving_reference({"precompute_ref_log_probs": True})
    refuse_moving_reference({"num_generations": 2, "beta": 0.0})
    with pytest.raises(ValueError, match="set precompute_ref_log_probs: true"):
        refuse_moving_reference({"precompute_ref_log_probs": False})
    with pytest.raises(ValueError, match="set beta: 0.0"):
        refuse_moving_reference({"num_generations": 2, "beta": 0.1})
    step = tune("t", "rloo", rewards=["tests.brevity"], online_merge=MERGE | {"every": 2}, peft={"r": 2})
    with pytest.raises(ValueError, match=r"online_merge: rloo's KL term asks the network without its adapter"):
        plan(recipe.load(write(tmp_path, step)), tmp_path / "runs")
