"""A network in training merged with checkpoints on disk: whatever the sharding, `merge_tensors` of whole tensors."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusion.checkpoint import open_source
from fusion.merge import merge_tensors
from fusion.online import merge_into
from tests.live_rank import CASES
from tests.online_rank import data, groups, start
from tests.processes import together

NAMES = ("base", "one", "two")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("live")
    net, _ = start()
    for i, name in enumerate(NAMES):
        g = torch.Generator().manual_seed(20 + i)
        (made / name).mkdir()
        (made / name / "config.json").write_text(json.dumps({"model_type": "none"}))
        state = {n: p.detach() + 0.1 * torch.randn(p.shape, generator=g) for n, p in net.named_parameters()}
        save_file(state, made / name / "model.safetensors")
    shutil.copytree(made / "one", made / "short")  # a rank cuts it off
    for name, value in (("endless", torch.inf), ("large", 3e38)):
        shutil.copytree(made / "one", made / name)
        state = load_file(made / name / "model.safetensors")
        state["second.weight"][-1, -1] = value
        save_file(state, made / name / "model.safetensors")
    return made


@pytest.fixture(scope="module")
def expected(folder):
    net, _ = start()
    base, one, two = (load_file(folder / name / "model.safetensors") for name in NAMES)
    out = {}
    for method, (weights, params) in CASES.items():
        for name, p in net.named_parameters():
            tensors = [p.detach(), one[name], two[name]]
            merged = merge_tensors(method, tensors, base=base[name], weights=weights, seed=3, name=name, **params)
            assert not torch.equal(merged, p)
            out[f"{method}/{name}"] = merged
    optimizer = torch.optim.SGD(groups(net), lr=0.05)
    for step in range(4):
        optimizer.zero_grad()
        net(data(step, 0, 1)).square().mean().backward()
        optimizer.step()
        for name, p in net.named_parameters():
            p.data.lerp_(one[name], 0.25 if step % 2 else 0.0)
    return out | {f"met/{name}": p.detach() for name, p in net.named_parameters()}


def ranks(kind, dtype, folder, world=2):
    together(world, "tests.live_rank", kind, dtype, str(folder))
    return load_file(folder / f"{kind}-{dtype}.safetensors")


SHARDINGS = [
    pytest.param("ddp", marks=pytest.mark.slow),
    "fsdp",
    pytest.param("zero2", marks=pytest.mark.slow),
    "zero3",
]


@pytest.mark.parametrize("kind", SHARDINGS)
def test_shards_merge_as_whole_tensors_do(kind, folder, expected):
    got = ranks(kind, "float32", folder)
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, atol=1e-6, rtol=0)


def test_what_one_rank_cannot_merge_is_refused_by_all_and_changes_nothing(folder):
    if not (folder / "refused-0.json").exists():
        ranks("fsdp", "float32", folder)
    first, last = (json.loads((folder / f"refused-{rank}.json").read_text()) for rank in range(2))
    assert first == last and all(unchanged for _, unchanged in first)
    sentences = [sentence for sentence, _ in first]
    assert len(sentences) == 4
    endless = r"rank 1: second.weight of '.*fsdp-endless-1' has infinity in it; a merge would spread it"
    assert all(re.fullmatch(endless, sentence) for sentence in sentences[:2])
    assert all("has become shorter while it was read" in sentence for sentence in sentences[2:])


def test_a_result_that_is_not_finite_is_refused_before_anything_changes(folder):
    """Its tensor is not the first: those before it are merged only after it was looked at."""
    net, _ = start()
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    optimizer = torch.optim.SGD(groups(net), lr=0.1)
    sources, params = [open_source(folder / "large")], {"normalize": False}
    with pytest.raises(ValueError, match="^linear: 'second.weight' is not finite after the merge$"):
        merge_into(optimizer, net.named_parameters(), "linear", sources, weights=[1.0, 2.0], params=params)
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters())


@pytest.mark.slow
def test_a_rank_that_holds_nothing_of_a_tensor_counts_with_the_others(folder, expected):
    """Of three, some have no part of a tensor that two share, and statistics of it are added up over all."""
    got = ranks("zero2", "float32", folder, world=3)
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_the_model_follows_its_masters(kind, folder):
    got = ranks(kind, "bfloat16", folder)
    masters = [name for name in got if "/model." not in name]
    assert masters
    for name in masters:
        assert torch.equal(got[name.replace("/", "/model.")], got[name].bfloat16().float()), name


def test_what_cannot_merge_live_gets_a_sentence(folder):
    net, _ = start()
    optimizer, sources = torch.optim.SGD(groups(net), lr=0.1), [open_source(folder / "one")]
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    with pytest.raises(ValueError, match="shards of a model in training"):
        merge_into(optimizer, net.named_parameters(), "della", sources, base=open_source(folder / "base"))
    with pytest.raises(ValueError, match="1 weights for 2 models"):
        merge_into(optimizer, net.named_parameters(), "linear", sources, weights=[1.0])
    net.extra = torch.nn.Parameter(torch.ones(2))
    optimizer.add_param_group({"params": [net.extra]})
    with pytest.raises(ValueError, match=r"a source .* has no tensor 'extra'"):
        merge_into(optimizer, net.named_parameters(), "linear", sources)
    assert all(torch.equal(p, before[n]) for n, p in net.named_parameters() if n in before)
