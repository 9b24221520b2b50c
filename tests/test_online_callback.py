"""The callback in transformers' own Trainer: what it reads, logs, saves, leaves in the last step, and refuses."""

import json
import types
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from fusion.online import OnlineMerge, OnlineMergeCallback
from fusion.online.layouts import layout
from fusion.online.vectors import TaskVectors, open_model
from fusion.post.lines import lines

SMALL = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}


def save(folder: Path, seed: int, **changed: object) -> Path:
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**(SMALL | changed))).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "start", "other")):
        save(folder / name, seed)
    save(folder / "tied", 1, tie_word_embeddings=True)
    save(folder / "wide", 0, vocab_size=44)
    save(folder / "deep", 0, num_hidden_layers=1)
    return folder


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(40, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": ids, "labels": ids}


def trainer(start: Path, folder: Path, *callbacks: TrainerCallback, **changed: object) -> Trainer:
    settings = {"max_steps": 4, "learning_rate": 1e-2, "per_device_train_batch_size": 2, "logging_steps": 2}
    settings |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    settings |= {"lr_scheduler_type": "constant"}
    args = TrainingArguments(str(folder), **(settings | changed))
    model = LlamaForCausalLM.from_pretrained(start)
    return Trainer(model=model, args=args, train_dataset=Rows(), callbacks=list(callbacks))


def tuned(start: Path, folder: Path, *callbacks: TrainerCallback, **changed: object) -> dict[str, torch.Tensor]:
    run = trainer(start, folder, *callbacks, **changed)
    run.train()
    return {name: p.detach().clone() for name, p in run.model.named_parameters()}


def loaded(folder: Path) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in LlamaForCausalLM.from_pretrained(folder).named_parameters()}


def test_one_step_is_the_merge_of_update_and_task_vector(models, tmp_path):
    start, base = loaded(models / "start"), loaded(models / "base")
    plain = tuned(models / "start", tmp_path, max_steps=1)
    merged = tuned(
        models / "start", tmp_path, OnlineMergeCallback(models / "base", method="linear", alpha=0.25), max_steps=1
    )
    for name, old in start.items():
        vector = (old - base[name]).bfloat16().float()
        torch.testing.assert_close(merged[name], old + 0.75 * (plain[name] - old) + 0.25 * vector, atol=1e-7, rtol=1e-6)


def test_the_reference_may_be_another_model(models, tmp_path):
    one = tuned(models / "start", tmp_path, OnlineMergeCallback(models / "base", alpha=0.1, density=0.5))
    same = tuned(
        models / "start", tmp_path, OnlineMergeCallback(models / "base", models / "start", alpha=0.1, density=0.5)
    )
    other = tuned(
        models / "start", tmp_path, OnlineMergeCallback(models / "base", models / "other", alpha=0.1, density=0.5)
    )
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert any(not torch.equal(one[n], other[n]) for n in one)


class Kept(TrainerCallback):
    """What was logged, with what callbacks listed before have added."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs=None, **_):
        self.logs.append(dict(logs or {}))


@pytest.mark.parametrize("every", [1, 4])
def test_what_it_did_is_logged_with_the_loss(models, tmp_path, every):
    kept = Kept()
    how = OnlineMergeCallback(models / "base", method="ties", alpha=0.1, density=0.5, every=every)
    after = tuned(models / "start", tmp_path, how, kept, logging_steps=3, max_steps=6)
    start = loaded(models / "start")
    logs = [one for one in kept.logs if "loss" in one]
    assert len(logs) == 2
    assert 0 < logs[1]["online_update_kept"] < 1 and 0 < logs[1]["online_sign_conflicts"] < 1
    drift = sum(float((after[n].double() - start[n].double()).square().sum()) for n in after) ** 0.5
    assert logs[1]["online_drift"] == pytest.approx(drift, rel=1e-5)
    assert logs[1]["online_task_vector_norm"] > 0


@pytest.mark.parametrize("every", [1, 4])
def test_a_saved_run_goes_on_bit_by_bit(models, tmp_path, every):
    def how():
        return OnlineMergeCallback(models / "base", method="dare", alpha=0.1, density=0.5, every=every, ema=0.9)

    changed = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    straight = tuned(models / "start", tmp_path / "a", how(), **changed)
    trainer(models / "start", tmp_path / "b", how(), **changed).train()
    second = trainer(models / "start", tmp_path / "b", how(), **changed)
    second.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3"))
    found = {name: p.detach() for name, p in second.model.named_parameters()}
    assert all(torch.equal(straight[n], found[n]) for n in straight)
    stored = list((tmp_path / "b" / "checkpoint-3").glob("online_merge-0-of-1.safetensors"))
    assert len(stored) == 1


def test_outside_a_window_any_number_of_ranks_may_go_on(models, tmp_path):
    how = {"method": "dare", "alpha": 0.1, "density": 0.5}
    changed = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    straight = tuned(models / "start", tmp_path, OnlineMergeCallback(models / "base", **how), **changed)
    file = tmp_path / "checkpoint-3" / "online_merge-0-of-1.safetensors"
    file.rename(file.with_name("online_merge-1-of-2.safetensors"))  # as if two ranks had saved it
    second = trainer(models / "start", tmp_path, OnlineMergeCallback(models / "base", **how), **changed)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert all(torch.equal(straight[n], p) for n, p in second.model.named_parameters())


@pytest.mark.parametrize("ranks", ["0-of-1", "1-of-2"])
def test_ema_can_not_begin_where_a_checkpoint_has_none(models, tmp_path, ranks):
    changed = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    tuned(models / "start", tmp_path, OnlineMergeCallback(models / "base"), **changed)
    file = tmp_path / "checkpoint-1" / "online_merge-0-of-1.safetensors"
    file.rename(file.with_name(f"online_merge-{ranks}.safetensors"))
    again = trainer(models / "start", tmp_path, OnlineMergeCallback(models / "base", ema=0.9), **changed)
    with pytest.raises(ValueError, match="has no moving average of .*: it was saved without ema.*; leave ema out"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_it_holds_two_bytes_of_task_vector_and_a_window_of_weights(models, tmp_path):
    how = OnlineMergeCallback(models / "base", method="ties", alpha=0.1, density=0.5, every=4)
    after = tuned(models / "start", tmp_path, how, max_steps=6)
    size = sum(weight.numel() for weight in after.values())
    assert sum(v.numel() * v.element_size() for v in how.handle.vectors.values()) == 2 * size
    assert sum(t.numel() * t.element_size() for one in how.handle.snapshots.values() for t in one) == 4 * size
    how = OnlineMergeCallback(models / "base", method="ties", alpha=0.1, density=0.5)
    tuned(models / "start", tmp_path, how, max_steps=1)
    assert how.handle.snapshots == {}


class Weights(TrainerCallback):
    """The weights after every step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args, state, control, model=None, **_):
        self.seen.append({n: p.detach().clone() for n, p in model.named_parameters()})


def test_ema_and_the_way_back_take_the_weights_place_in_the_last_step(models, tmp_path):
    start, every = loaded(models / "start"), Weights()
    idle = {"method": "dare", "alpha": 0.0, "density": 1.0}
    tuned(models / "start", tmp_path, OnlineMergeCallback(models / "base", **idle), every)
    final = tuned(models / "start", tmp_path, OnlineMergeCallback(models / "base", **idle, ema=0.5, towards_init=0.25))
    for name, average in start.items():
        for seen in every.seen:
            average = 0.5 * average + 0.5 * seen[name]
        expected = 0.75 * average + 0.25 * start[name]
        torch.testing.assert_close(final[name], expected, atol=1e-6, rtol=1e-5)


def test_lines_scale_the_task_vector_by_layer(models):
    how = OnlineMergeCallback(models / "base", lines={"alpha": 0.2, "beta": 0.6})
    start, base = loaded(models / "start"), loaded(models / "base")
    vectors = TaskVectors(open_model(models / "base", "base"), scale=how._scales(list(start)))
    for name, weight in start.items():
        index = next((int(part) for part in name.split(".") if part.isdigit()), None)
        layer = None if index is None else (index, 2)
        vector = lines((weight - base[name]).flatten(), torch.zeros(1), name=name, layer=layer, alpha=0.2, beta=0.6)
        found = vectors[name].read(0, weight.numel(), weight.flatten())
        torch.testing.assert_close(found, vector.bfloat16(), atol=0, rtol=1e-2)
    assert how._scales(["model.layers.0.x", "model.layers.1.x"]) == pytest.approx(
        {"model.layers.0.x": 0.2, "model.layers.1.x": 0.8}
    )


def test_a_density_without_rescaling_is_said_to_be_a_learning_rate(models, capsys):
    assert "0.01 times the learning rate" in OnlineMergeCallback(models / "base", method="dare", density=0.01).rate()
    assert OnlineMergeCallback(models / "base", method="dare", density=0.01, semantics="code").rate() == ""
    assert OnlineMergeCallback(models / "base", method="ties", density=0.01).rate() == ""


REFUSED = {
    "equal": ("start", "start", None, "same model"),
    "vocabulary": ("start", "wide", None, "resized vocabulary"),
    "shapes": ("start", "base", "wide", r"in the reference and"),
    "names": ("start", "deep", None, "no task vector for 'model.layers.1"),
    "reference's names": ("start", "base", "deep", "the reference has no tensor 'model.layers.1"),
    "ties": ("tied", "base", None, "the model ties lm_head.weight"),
    "untied": ("start", "tied", None, "ties lm_head.weight to its embeddings"),
}


@pytest.mark.parametrize(("start", "base", "reference", "sentence"), REFUSED.values(), ids=REFUSED)
def test_models_that_do_not_go_together_are_refused(models, tmp_path, start, base, reference, sentence):
    how = OnlineMergeCallback(models / base, None if reference is None else models / reference, alpha=0.1, density=0.5)
    with pytest.raises(ValueError, match=sentence):
        tuned(models / start, tmp_path, how)


def test_what_cannot_be_a_base_is_said(models):
    with pytest.raises(ValueError, match="needs a base"):
        OnlineMergeCallback()
    with pytest.raises(ValueError, match="nothing to merge"):
        OnlineMergeCallback(models / "base", models / "base")
    with pytest.raises(ValueError, match="neither a directory nor a hub id"):
        open_model("./nowhere", "base")


def test_adapters_bfloat16_and_missing_files_are_said(models, tmp_path):
    from peft import LoraConfig, get_peft_model

    how = {"alpha": 0.1, "density": 0.5}
    run = trainer(models / "start", tmp_path, OnlineMergeCallback(models / "base", **how))
    run.model = run.model_wrapped = get_peft_model(run.model, LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="every is 1, and one step of a fresh adapter is no update"):
        run.train()
    run = trainer(models / "start", tmp_path, OnlineMergeCallback(models / "base", **how))
    run.model.bfloat16()
    with pytest.raises(ValueError, match="keep float32 master weights"):
        run.train()
    changed = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainer(models / "start", tmp_path, **changed).train()
    run = trainer(models / "start", tmp_path, OnlineMergeCallback(models / "base", **how), **changed)
    with pytest.raises(ValueError, match="saved without online merging"):
        run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


class Replaces(TrainerCallback):
    """A plugin that swaps the optimizer after the first step."""

    def __init__(self) -> None:
        self.trainer: Trainer | None = None

    def on_step_end(self, args, state, control, **_):
        new = torch.optim.SGD(self.trainer.model.parameters(), lr=0.1)
        self.trainer.callback_handler.optimizer = new


def test_an_optimizer_replaced_after_attaching_is_said(models, tmp_path):
    plugin = Replaces()
    run = trainer(models / "start", tmp_path, OnlineMergeCallback(models / "base", alpha=0.1, density=0.5), plugin)
    plugin.trainer = run
    with pytest.raises(ValueError, match="the optimizer was replaced"):
        run.train()


def test_states_swapped_to_nvme_are_said():
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter._z3_optimizer = types.SimpleNamespace(swap_optimizer=True)  # what DeepSpeed hangs on its parameters
    with pytest.raises(ValueError, match="swapped to NVMe"):
        layout(torch.optim.SGD([parameter], lr=0.1), [("weight", parameter)])


def test_settings_are_those_of_the_class(models):
    how = OnlineMergeCallback(models / "base", method="linear", alpha=0.5, every=3, seed=7)
    assert how.merge == OnlineMerge("linear", alpha=0.5, every=3, seed=7)
    assert json.dumps(dict(how.merge.params)) == "{}"


def adapter(start: Path, seed: int) -> PeftModel:
    """A LoRA adapter whose factors are all random, as after training."""
    torch.manual_seed(seed)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    return get_peft_model(LlamaForCausalLM.from_pretrained(start), config)


def tuned_adapter(begin: Path, models: Path, folder: Path, *callbacks: TrainerCallback) -> dict[str, torch.Tensor]:
    run = trainer(models / "start", folder, *callbacks, max_steps=1, optim="sgd")
    run = Trainer(
        model=PeftModel.from_pretrained(run.model, begin, is_trainable=True),
        args=run.args,
        train_dataset=Rows(),
        callbacks=list(callbacks),
    )
    run.train()
    return {name: p.detach().clone() for name, p in run.model.named_parameters() if p.requires_grad}


def test_an_adapter_that_is_tuned_further_merges_factor_by_factor(models, tmp_path):
    for seed, name in enumerate(("before", "sft", "another")):
        adapter(models / "start", seed).save_pretrained(tmp_path / name)
    stored = {name: load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "sft")}
    plain = tuned_adapter(tmp_path / "sft", models, tmp_path)
    for reference in (None, tmp_path / "sft"):
        how = OnlineMergeCallback(tmp_path / "before", reference, method="linear", alpha=0.25)
        merged = tuned_adapter(tmp_path / "sft", models, tmp_path, how)
        assert len(merged) == 4
        for name, after in merged.items():
            before, old = (stored[one][name.replace(".default", "")] for one in ("before", "sft"))
            expected = old + 0.75 * (plain[name] - old) + 0.25 * (old - before)
            torch.testing.assert_close(after, expected, atol=1e-7, rtol=1e-6)
    how = OnlineMergeCallback(tmp_path / "before", tmp_path / "another", method="linear", alpha=0.25)
    with pytest.raises(ValueError, match="is not the reference adapter's"):
        tuned_adapter(tmp_path / "sft", models, tmp_path, how)
    how = OnlineMergeCallback(tmp_path / "before", models / "start", alpha=0.25)
    with pytest.raises(ValueError, match="base is an adapter, and .*start has no adapter_model.safetensors"):
        tuned_adapter(tmp_path / "sft", models, tmp_path, how)
