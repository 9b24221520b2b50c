"""Ranks that train apart and meet: two processes are two networks trained one after the other and averaged by hand."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from fusion.merge import merge_tensors
from fusion.online import MergeGroupsCallback
from tests.processes import together
from tests.test_online_callback import save, trainer

STEPS, EVERY = 7, 3  # the last step is no multiple


@pytest.fixture(scope="module")
def apart(tmp_path_factory):
    """The folder, and by method what two ranks saw and had after each step."""
    folder, done = tmp_path_factory.mktemp("groups"), {}
    save(folder / "start", 0)

    def ranks(method, resume=0):
        if (method, resume) not in done:
            together(2, "tests.groups_rank", str(folder), str(STEPS), str(EVERY), method, str(resume))
            done[method, resume] = [load_file(folder / f"{method}-{resume}-{rank}.safetensors") for rank in range(2)]
        return done[method, resume]

    return folder, ranks


def by_hand(start, seen, method):
    """Two networks, each with an optimizer and rows of its own, that meet every third step and at the end."""
    nets = [LlamaForCausalLM.from_pretrained(start) for _ in seen]
    begun = {name: p.detach().clone() for name, p in nets[0].named_parameters()}
    optimizers = []
    for net in nets:
        plain = [p for n, p in net.named_parameters() if "norm" in n]
        decayed = [p for n, p in net.named_parameters() if "norm" not in n]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
        optimizers.append(torch.optim.AdamW(groups, lr=1e-2, eps=1e-3))
    for step in range(1, STEPS + 1):
        for net, optimizer, rows in zip(nets, optimizers, seen, strict=True):
            optimizer.zero_grad()
            net(input_ids=rows[step - 1], labels=rows[step - 1]).loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            optimizer.step()
        if step % EVERY == 0 or step == STEPS:
            for (name, one), other in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
                both = [one.detach(), other.detach()]
                if method == "linear":
                    met = (both[0] + both[1]) / 2
                else:
                    met = merge_tensors(method, both, base=begun[name], density=0.5, name=name)
                for weight in (one, other):
                    weight.data.copy_(met)
        yield [{name: p.detach().clone() for name, p in net.named_parameters()} for net in nets]


@pytest.mark.parametrize("method", ["linear", pytest.param("ties", marks=pytest.mark.slow)])
def test_two_ranks_are_two_processes_averaged_by_hand(apart, method):
    folder, ranks = apart
    got = ranks(method)
    seen = [one.pop("seen") for one in got]
    assert seen[0].shape == seen[1].shape and not torch.equal(*seen), "different data for each"
    for step, hand in enumerate(by_hand(folder / "start", seen, method)):
        for mine, theirs in zip(got, hand, strict=True):
            for name, weight in theirs.items():
                torch.testing.assert_close(mine[f"{step}/{name}"], weight, rtol=0, atol=1e-6, msg=f"{step} {name}")
        same = all(torch.equal(got[0][f"{step}/{name}"], got[1][f"{step}/{name}"]) for name in hand[0])
        assert same is ((step + 1) % EVERY == 0 or step + 1 == STEPS)


@pytest.mark.slow
def test_a_saved_run_goes_on_with_each_ranks_own_bit_by_bit(apart):
    """From a step after a meeting, when networks and moments differ."""
    folder, ranks = apart
    straight = ranks("linear")
    again = ranks("linear", 4)
    for one, other in zip(straight, again, strict=True):
        for name in other:
            if name != "seen":
                step, _, rest = name.partition("/")
                assert torch.equal(one[f"{int(step) + 4}/{rest}"], other[name]), name


def test_what_cannot_be_groups_gets_a_sentence(apart, tmp_path):
    start = apart[0] / "start"
    with pytest.raises(ValueError, match="groups is 1; two or more networks"):
        MergeGroupsCallback(1, 2)
    with pytest.raises(ValueError, match="shards of a model in training"):
        MergeGroupsCallback(2, 2, "tsv_m", base=start)
    callback = MergeGroupsCallback(2, 2)
    with pytest.raises(ValueError, match="set the callback's trainer before training"):
        trainer(start, tmp_path, callback).train()
    callback.trainer = trainer(start, tmp_path, callback)
    with pytest.raises(ValueError, match="groups is 2, and 1 processes were launched"):
        callback.trainer.train()
    callback.trainer = trainer(start, tmp_path, callback)
    callback.trainer.args = SimpleNamespace(world_size=2, average_tokens_across_devices=False)
    with pytest.raises(ValueError, match="under plain DDP .* this model is in LlamaForCausalLM"):
        state = SimpleNamespace(max_steps=4, global_step=0)
        callback.on_train_begin(callback.trainer.args, state, None, model=callback.trainer.model)
