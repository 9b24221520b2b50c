"""Training checkpoints read slice by slice hold, bit for bit, what consolidating them gives."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import pickle
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from fusion import _sharded, sources
from fusion._pickled import Record, Stored, read_plain, read_torch
from fusion._sharded import Parts, Piece, Sharded, open_sharded
from fusion.recipe import ModelRef
from tests.processes import together


@pytest.fixture(scope="module")
def dcp(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dcp")
    together(2, "tests.sharded_rank", "dcp", str(folder))
    return folder


@pytest.fixture(scope="module")
def zero(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    together(2, "tests.sharded_rank", "zero", str(folder))
    return folder


def same(source, expected: dict[str, torch.Tensor]) -> None:
    """Every tensor, whole and in regions that begin and end anywhere, to the bit."""
    assert source.entries.keys() == expected.keys()
    draw = torch.Generator().manual_seed(0)
    for name, entry in source.entries.items():
        flat = expected[name].flatten()
        assert entry.shape == tuple(expected[name].shape) and entry.dtype == flat.dtype
        regions = torch.randint(0, entry.numel + 1, (20, 2), generator=draw).sort(1)[0].tolist()
        for start, stop in [(0, entry.numel), *regions]:
            part = torch.empty(stop - start, dtype=entry.dtype)
            source.read(name, start, stop, part)
            assert torch.equal(part, flat[start:stop]), (name, start, stop)


@st.composite
def cut_tensors(draw):
    """A shape, borders along each axis, and a region of the flattened tensor."""
    shape = draw(st.lists(st.integers(1, 5), max_size=4))
    borders = [sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))}) for size in shape]
    numel = math.prod(shape)
    start = draw(st.integers(0, numel))
    return tuple(shape), borders, start, draw(st.integers(start, numel))


@settings(max_examples=200, deadline=None)
@given(cut_tensors())
def test_any_boxes_give_any_region(case):
    """Pieces cut along all axes at once, each lying row-major somewhere in a file."""
    shape, borders, start, stop = case
    whole = torch.arange(math.prod(shape), dtype=torch.int16).reshape(shape)
    pieces, content = [], b"begin"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "numbers"
        for box in itertools.product(*(list(itertools.pairwise(border)) for border in borders)):
            part = whole[tuple(slice(a, b) for a, b in box)].contiguous()
            stored = Stored(file, len(content), "int16", tuple(part.shape))
            offsets = tuple(a for a, _ in box)
            pieces.append(Piece(offsets, tuple(part.shape), functools.partial(lambda one: one, stored)))
            content += part.numpy().tobytes() + b"gap"
        file.write_bytes(content)
        (Path(folder) / "config.json").write_text("{}")
        parts = {"t": Parts(shape, "int16", "int16", shape, tuple(pieces))}
        into = torch.empty(stop - start, dtype=torch.int16)
        Sharded(Path(folder), Path(folder), parts, (file,)).read("t", start, stop, into)
        assert torch.equal(into, whole.flatten()[start:stop])
        missing = {"t": Parts(shape, "int16", "int16", shape, tuple(pieces[1:]))}
        with pytest.raises(ValueError, match="files are missing"):
            Sharded(Path(folder), Path(folder), missing, (file,))


@pytest.mark.parametrize("name", ["fsdp", "odd"])
def test_dcp_slices(name, dcp):
    expected = torch.load(dcp / f"{name}.pt", weights_only=True)
    expected.pop("lm_head.weight", None)  # tied: one tensor, as a model is saved
    same(open_sharded(dcp / name), expected)


def consolidated(folder: Path) -> dict[str, torch.Tensor]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    state = get_fp32_state_dict_from_zero_checkpoint(str(folder))
    return {name: tensor for name, tensor in state.items() if name != "lm_head.weight"}


def test_zero_partitions(zero):
    """All stages, both dtypes; several groups (in stage 3 sub-groups), frozen parameters, a buffer, a tied head."""
    for folder in sorted(zero.iterdir()):
        source = open_sharded(folder)
        same(source, consolidated(folder))
        nominal = torch.bfloat16 if folder.name != "2" and folder.name != "3" else torch.float32
        assert {e.stored for n, e in source.entries.items() if n != "seen"} == {nominal}


def test_a_zero_checkpoint_becomes_the_model_that_was_trained(zero, tmp_path):
    ref = ModelRef("m", path=str(zero / "3"))
    directory = sources.resolve("m", ref, tmp_path, Path("."), lambda name: [])
    assert directory.parent == tmp_path
    expected = consolidated(zero / "3")
    state = sources.load_model(directory).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items() if name != "seen")
    assert sources.resolve("m", ref, tmp_path, Path("."), lambda name: []) == directory


def test_training_checkpoints_merge_where_they_lie(zero, tmp_path):
    """Master weights go in; what comes out is in the dtype that was trained."""
    from fusion.merge import merge_checkpoints

    first, second = consolidated(zero / "2h"), consolidated(zero / "3h")
    merge_checkpoints("linear", {"a": zero / "2h", "b": zero / "3h"}, tmp_path / "out", weights=[3.0, 1.0])
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == first.keys()
    for name, tensor in merged.items():
        expected = first[name] if name == "seen" else (0.75 * first[name] + 0.25 * second[name]).bfloat16()
        torch.testing.assert_close(tensor, expected, rtol=2**-8, atol=0)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"


def test_zero_checkpoints_that_are_not_whole(zero, tmp_path):
    for pattern, sentence in (
        ("zero_pp_rank_1*_optim_states.pt", "saved by 2 ranks, but has 1 files"),
        ("*_optim_states.pt", r"has no file \*_optim_states.pt"),
        ("*_model_states.pt", r"has no file \*_model_states.pt"),
    ):
        copy = tmp_path / "copy"
        shutil.copytree(zero / "3", copy)
        for file in copy.rglob(pattern):
            file.unlink()
        with pytest.raises(ValueError, match=sentence):
            open_sharded(copy)
        shutil.rmtree(copy)
    shutil.copytree(zero / "2", copy)
    file = next(copy.rglob("*_optim_states.pt"))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cut off"):
        open_sharded(copy)
    (copy / "latest").write_text("global_step9")
    with pytest.raises(ValueError, match="names global_step9, which is not there"):
        open_sharded(copy)
    for extra, what in (
        ("mp_rank_01_model_states.pt", "tensor"),
        ("layer_0_expert_0_mp_rank_00_model_states.pt", "expert"),
        ("layer_00-model_00-model_states.pt", "pipeline"),
    ):
        (zero / "2h" / "global_step2" / extra).write_bytes(b"")
        with pytest.raises(ValueError, match=f"under {what} parallelism"):
            open_sharded(zero / "2h")
        (zero / "2h" / "global_step2" / extra).unlink()


def test_dcp_checkpoints_that_are_not_whole(dcp, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(dcp / "fsdp", copy)
    file = copy / "__1_0.distcp"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is cut off: it has"):
        open_sharded(copy)
    file.write_bytes(bytes(len(whole)))
    source = open_sharded(copy)
    with pytest.raises(ValueError, match="not written by torch.save"):
        for name, entry in source.entries.items():
            source.read(name, 0, entry.numel, torch.empty(entry.numel, dtype=entry.dtype))
    file.unlink()
    with pytest.raises(ValueError, match="names __1_0.distcp, which is missing"):
        open_sharded(copy)
    whole = (copy / ".metadata").read_bytes()
    for damaged in (whole[:-9], b"junk", b""):
        (copy / ".metadata").write_bytes(damaged)
        with pytest.raises(ValueError, match="metadata is cut off or was not written by pickle"):
            open_sharded(copy)
    (copy / "config.json").unlink()
    with pytest.raises(ValueError, match="without config.json; name the model that was trained"):
        open_sharded(copy)
    shutil.copytree(dcp / "fsdp", tmp_path / "bare")
    (tmp_path / "bare" / "config.json").unlink()
    assert open_sharded(tmp_path / "bare", open_sharded(dcp / "fsdp")).config["model_type"] == "llama"
    with pytest.raises(ValueError, match="has tensors like model.embed_tokens.weight.*not the model that was trained"):
        open_sharded(tmp_path / "bare", open_sharded(dcp / "odd"))


def test_where_a_trainer_puts_things(dcp, tmp_path):
    """accelerate's FSDP: checkpoint-3/pytorch_model_fsdp_0 beside optimizer_0."""
    shutil.copytree(dcp / "fsdp", tmp_path / "checkpoint-3" / "pytorch_model_fsdp_0")
    shutil.copytree(dcp / "odd", tmp_path / "checkpoint-3" / "optimizer_0")
    assert _sharded.find(tmp_path / "checkpoint-3") == ("dcp", tmp_path / "checkpoint-3" / "pytorch_model_fsdp_0")
    assert "model.norm.weight" in open_sharded(tmp_path / "checkpoint-3").entries
    assert _sharded.find(tmp_path) is None


class Evil:
    """A pickle that runs what it likes, anywhere else."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_nothing_in_a_pickle_runs(tmp_path):
    mark = tmp_path / "ran"
    torch.save(
        {"x": torch.arange(6.0), "bad": Evil(mark), "deep": [functools.partial(os.mkdir, str(mark))]}, tmp_path / "f"
    )
    found = read_torch(tmp_path / "f")
    assert not mark.exists()
    assert isinstance(found["bad"], Record) and found["bad"].kind == "posix.mkdir"
    x = found["x"]
    assert isinstance(x, Stored) and (x.dtype, x.shape, x.contiguous) == ("float32", (6,), True)
    assert (tmp_path / "f").read_bytes()[x.offset : x.offset + 24] == torch.arange(6.0).numpy().tobytes()
    with open(tmp_path / "p", "wb") as stream:
        pickle.dump([Evil(mark), eval, {"a": 1}], stream)
    plain = read_plain(tmp_path / "p")
    assert plain[2] == {"a": 1} and not mark.exists()
    with open(tmp_path / "g", "wb") as stream:  # a call of what a call gave
        stream.write(b"cbuiltins\ngetattr\n(cos\nsystem\nVname\ntR(Vtouch " + str(mark).encode() + b"\ntR.")
    read_plain(tmp_path / "g")
    assert not mark.exists()


def test_views_and_dtypes_of_a_torch_file(tmp_path):
    grid = torch.arange(12, dtype=torch.bfloat16).reshape(3, 4)
    tensors = {
        "view": grid[1:],
        "turned": grid.T,
        "bool": torch.tensor([True, False]),
        "unsigned": torch.zeros(2).to(torch.uint16),
    }
    torch.save(tensors | {"parameter": torch.nn.Parameter(torch.ones(2))}, tmp_path / "f")
    found = read_torch(tmp_path / "f")
    data = (tmp_path / "f").read_bytes()
    view = found["view"]
    assert data[view.offset : view.offset + 16] == grid[1:].contiguous().view(torch.uint8).numpy().tobytes()
    assert not found["turned"].contiguous and found["parameter"].shape == (2,)
    assert (found["bool"].dtype, found["unsigned"].dtype) == ("bool", "uint16")


def test_references_in_a_recipe(dcp, tmp_path):
    def check(**fields):
        return sources.check("m", ModelRef("m", **fields), tmp_path, {"b": ModelRef("b", path=str(dcp / "fsdp"))})

    assert check(path=str(dcp / "fsdp")) == "sharded"
    bare = tmp_path / "bare"
    shutil.copytree(dcp / "fsdp", bare)
    (bare / "config.json").unlink()
    with pytest.raises(ValueError, match="without config.json; name the model"):
        check(path=str(bare))
    with pytest.raises(ValueError, match="no model is called 'bb'; did you mean 'b'"):
        check(path=str(bare), base="bb")
    assert check(path=str(bare), base="b") == "sharded"
