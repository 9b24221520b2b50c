"""A network that meets another one every so many steps: by hand, bit by bit after a resume, bad input."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusion.online import MergeWithCallback
from tests.launching import CPU, call
from tests.processes import ROOT
from tests.test_online_callback import loaded, save, trainer, tuned


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meet")
    for seed, name in enumerate(("start", "other")):
        save(folder / name, seed)
    save(folder / "wide", 0, vocab_size=44)
    return folder


def test_sgd_with_momentum_meets_every_second_step(tmp_path):
    """Loss w^2 / 2, rate 0.1, momentum 0.5, the other at 8: by hand, and the momentum goes on untouched."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "none"}))
    save_file({"w": torch.tensor([8.0])}, tmp_path / "model.safetensors")
    net = torch.nn.Module()
    net.w = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.5)
    callback, state = MergeWithCallback(tmp_path, every=2, weight=0.25), SimpleNamespace(global_step=0, max_steps=4)
    callback.on_train_begin(None, state, None, model=net, optimizer=optimizer)
    seen = []
    for _ in range(4):
        optimizer.zero_grad()
        (net.w.square() / 2).sum().backward()
        optimizer.step()
        state.global_step += 1
        callback.on_step_end(None, state, None, model=net, optimizer=optimizer)
        seen.append(net.w.item())
    # 1 - 0.1 * 1; 0.9 - 0.1 * (0.5 + 0.9) = 0.76, met 0.75 * 0.76 + 2 = 2.57;
    # 2.57 - 0.1 * (0.7 + 2.57) = 2.243; 2.243 - 0.1 * (1.635 + 2.243) = 1.8552, met 1.3914 + 2
    assert seen == pytest.approx([0.9, 2.57, 2.243, 3.3914], abs=1e-5)


def test_the_trainer_meets_at_the_end_of_every_second_step(models, tmp_path):
    other = loaded(models / "other")
    changed = {"max_steps": 3, "optim": "sgd"}
    plain = tuned(models / "start", tmp_path, **changed | {"max_steps": 2})
    met = MergeWithCallback(models / "other", every=2, weight=0.25)
    two = tuned(models / "start", tmp_path, met, **changed | {"max_steps": 2})
    three = tuned(models / "start", tmp_path, MergeWithCallback(models / "other", every=2, weight=0.25), **changed)
    for name, weight in two.items():
        torch.testing.assert_close(weight, 0.75 * plain[name] + 0.25 * other[name], atol=1e-7, rtol=1e-6)
    assert any(not torch.equal(two[name], three[name]) for name in two)


def test_a_saved_run_goes_on_bit_by_bit(models, tmp_path):
    """Saved after step 3 and, in the step of a merge, after step 6; masks differ from merge to merge."""

    def met():
        how = {"method": "dare", "base": models / "start", "weight": 0.5, "params": {"density": 0.5}}
        return MergeWithCallback(models / "other", every=2, **how)

    changed = {"max_steps": 8, "save_strategy": "steps", "save_steps": 3}
    straight = tuned(models / "start", tmp_path, met(), **changed)
    for step in (3, 6):
        again = trainer(models / "start", tmp_path, met(), **changed)
        again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert all(torch.equal(straight[name], p) for name, p in again.model.named_parameters()), step


def test_what_cannot_meet_gets_a_sentence(models, tmp_path):
    with pytest.raises(ValueError, match="every is 0; networks meet"):
        MergeWithCallback(models / "other", every=0)
    with pytest.raises(ValueError, match="weight is 1.5; it is the share"):
        MergeWithCallback(models / "other", every=1, weight=1.5)
    with pytest.raises(ValueError, match="shards of a model in training"):
        MergeWithCallback(models / "other", every=1, method="della", base=models / "start")
    with pytest.raises(ValueError, match="training has 4 steps: nothing would ever be merged"):
        tuned(models / "start", tmp_path, MergeWithCallback(models / "other", every=5))
    with pytest.raises(
        ValueError, match=r"the model \(.*wide\) has no tensor 'model.embed_tokens.weight' of \(40, 16\)"
    ):
        tuned(models / "start", tmp_path, MergeWithCallback(models / "wide", every=1))


@pytest.fixture(scope="module")
def recipe_of_two(tmp_path_factory):
    """A tune step that meets another model every second step, and its weights in one process."""
    folder = tmp_path_factory.mktemp("recipe")
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    config |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    train = {"max_steps": 4, "optim": "sgd", "learning_rate": 0.1, "per_device_train_batch_size": 2}
    step = {"out": "tuned", "model": "start", "data": "text", "max_length": 64, "train": train}
    other = {"config": config | {"initializer_range": 0.1}, "tokenizer": {"train": "bytes"}}
    tree = {
        "models": {"start": {"config": config, "tokenizer": {"train": "bytes"}}, "other": other},
        "data": {"text": {"path": str(ROOT / "recipes/data/austen.txt"), "max_bytes": 50, "split": "train[:60]"}},
        "steps": [{"tune": step | {"merge_with": {"model": "other", "every": 2, "weight": 0.25}}}],
    }
    (folder / "two.yaml").write_text(json.dumps(tree))
    train["per_device_train_batch_size"] = 4
    (folder / "one.yaml").write_text(json.dumps(tree))
    call([[sys.executable, "-m", "fusion.run", "one.yaml", "--out", "runs", *CPU]], folder)
    return folder, load_file(folder / "runs/one/tuned/model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp_cpu", "zero1_cpu", "zero2_cpu", "zero3_cpu"])
def test_two_launched_processes_meet_as_one_does(recipe_of_two, config):
    folder, alone = recipe_of_two
    call([[sys.executable, "-m", "fusion.cli", "launch", "--config", config, "two.yaml", "--out", config]], folder)
    two = load_file(folder / config / "two/tuned/model.safetensors")
    assert two.keys() == alone.keys()
    for name, weight in alone.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_groups_of_a_recipe_that_meet_after_every_step_are_ddp_and_no_deepspeed(recipe_of_two):
    """The mean of weights that SGD moved is what SGD makes of the mean of gradients."""
    folder, _ = recipe_of_two
    tree = json.loads((folder / "two.yaml").read_text())
    fields = tree["steps"][0]["tune"]
    fields["train"] |= {"average_tokens_across_devices": False, "max_grad_norm": 0.0}
    for name, met in (("ddp", None), ("groups", {"groups": 2, "every": 1})):
        fields["merge_with"] = met
        (folder / f"{name}.yaml").write_text(json.dumps(tree))
    launch = [sys.executable, "-m", "fusion.cli", "launch", "--config"]
    for name in ("ddp", "groups"):
        call([[*launch, "ddp_cpu", f"{name}.yaml", "--out", "apart"]], folder)
    one, two = (load_file(folder / f"apart/{name}/tuned/model.safetensors") for name in ("ddp", "groups"))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=0, atol=1e-6)
    with pytest.raises(AssertionError, match="groups train apart under plain DDP .* DeepSpeedEngine"):
        call([[*launch, "zero2_cpu", "groups.yaml", "--out", "sharded"]], folder)
