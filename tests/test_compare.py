"""Checkpoints compared: numbers by hand, the same for any chunk, and warnings where a base is not one."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fusion import _compare
from fusion._compare import Moments, compare
from fusion.checkpoint import Checkpoint
from fusion.cli import main


def save(folder: Path, **tensors: torch.Tensor) -> Path:
    folder.mkdir(parents=True)
    save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return folder


def family(folder: Path, scale: float = 0.01, seed: int = 0, k: int = 2) -> dict[str, Path]:
    """base, a, b, ...: two layers and an embedding, fine-tunes a small step away."""
    draw = torch.Generator().manual_seed(seed)
    shapes = {"embed__weight": (50, 8), "layers__0__up": (8, 24), "layers__1__up": (8, 24), "norm": (8,)}
    base = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    made = {"base": save(folder / "base", **base)}
    for n in range(k):
        moved = {name: t + scale * torch.randn(t.shape, generator=draw) for name, t in base.items()}
        made["abcdef"[n]] = save(folder / "abcdef"[n], **moved)
    return made


def compared(paths: dict[str, Path]):
    opened = {name: Checkpoint.open(path) for name, path in paths.items()}
    return compare(opened.pop("base"), opened, "base")


def test_numbers_by_hand(tmp_path):
    base = torch.tensor([3.0, 4.0, 0.0, 0.0])
    paths = {
        "base": save(tmp_path / "base", w=base, layers__0__x=torch.ones(2)),
        "a": save(tmp_path / "a", w=base + torch.tensor([1.0, 1.0, 0.0, 0.0]), layers__0__x=torch.ones(2)),
        "b": save(tmp_path / "b", w=base + torch.tensor([2.0, -1.0, 2.0, 0.0]), layers__0__x=torch.tensor([1.0, 2.0])),
    }
    found = compared(paths).tensors["w"]
    assert found.base == 5.0 and found.conflict == 1 and found.numel == 4
    assert found.distances == pytest.approx([math.sqrt(2), 3.0])
    assert float(found.cosines[0, 1]) == pytest.approx(1 / (math.sqrt(2) * 3))
    assert float(found.apart[0, 1]) == pytest.approx(3.0)
    deltas = torch.tensor([[1.0, 1.0, 0.0, 0.0], [2.0, -1.0, 2.0, 0.0]])
    assert float(found.correlations[0, 1]) == pytest.approx(float(torch.corrcoef(deltas)[0, 1]), abs=1e-6)
    models = torch.stack([base, base]) + deltas
    expected = deltas.norm(dim=1) / (25 + models.square().sum(1)).sqrt()
    assert found.strangeness == pytest.approx(expected.tolist())
    layers = compared(paths).layers
    assert list(layers) == ["w", "0"] and layers["0"].distances == [0.0, 1.0] and layers["0"].cosines[0, 1] == 0.0


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([4096, 8192, 1 << 20]))
def test_chunks_change_nothing(seed, chunk):
    draw = torch.Generator().manual_seed(seed)
    size = int(torch.randint(1, 30000, (), generator=draw))
    values = torch.randn(3, size, generator=draw).bfloat16()

    class Memory:
        path, config, files = Path("x"), {}, ()

        def __init__(self, row):
            from fusion.checkpoint import Entry

            self.row, self.entries = row, {"w": Entry("w", (size,), torch.bfloat16, torch.bfloat16)}

        def read(self, name, start, stop, into):
            into.copy_(self.row[start:stop])

    before, _compare.CHUNK = _compare.CHUNK, chunk
    found = compare(Memory(values[0]), {"a": Memory(values[1]), "b": Memory(values[2])}, "base").tensors["w"]
    _compare.CHUNK = before
    wide = values.double()
    vectors = torch.stack([wide[0], wide[1] - wide[0], wide[2] - wide[0]])
    torch.testing.assert_close(found.gram, vectors @ vectors.T, rtol=1e-5, atol=1e-5)
    assert found.numel == size and found.conflict == int((vectors[1] * vectors[2] < 0).sum())


def test_a_fine_tune_is_no_stranger_and_another_model_is(tmp_path):
    paths = family(tmp_path / "one", k=3)
    assert compared(paths).warnings == []
    other = family(tmp_path / "two", seed=1)
    assert compared({"base": other["base"], "a": paths["a"]}).warnings == [
        "a is as far from base as a model that has nothing to do with it (101 % of that distance): is base its base?"
    ]
    far = family(tmp_path / "three", scale=0.2, k=1)
    (sentence,) = compared({**paths, "c": far["a"]}).warnings
    assert sentence == "c is 20 times as far from base as the others are"


def test_the_command_compares_with_the_first_or_with_the_base(tmp_path):
    paths = family(tmp_path, k=3)
    run = CliRunner()
    first = run.invoke(main, ["show", *map(str, paths.values())])
    given_base = run.invoke(main, ["show", "--base", str(paths["base"]), *(str(paths[n]) for n in "abc")])
    assert first.exit_code == 0 and first.output == given_base.output
    for text in ("Kinship", "embed.weight", "mean", "conflict", "all"):
        assert text in first.output
    two = run.invoke(main, ["show", str(paths["base"]), str(paths["a"])])
    assert two.exit_code == 0 and "Kinship" not in two.output and "1 %" in two.output
    alone = run.invoke(main, ["show", str(paths["a"])])
    assert "layers.0.up" in alone.output and "8 x 24" in alone.output


def test_what_cannot_be_compared_is_said(tmp_path):
    paths = family(tmp_path, k=1)
    odd = {"embed__weight": torch.ones(51, 8), "layers__0__up": torch.ones(8, 24), "more": torch.ones(2)}
    shutil.rmtree(paths["a"])
    save(paths["a"], **odd, norm=torch.arange(8))
    found = compared(paths)
    assert list(found.tensors) == ["layers.0.up"]
    assert found.left_out == {
        "embed.weight": "[51, 8] in a, [50, 8] in the base",
        "layers.1.up": "a has no such tensor",
        "norm": "it holds no floating-point numbers",
        "more": "only a has it",
    }
    said = CliRunner().invoke(main, ["show", str(paths["base"]), str(paths["a"])]).output
    assert "Not compared: embed.weight: [51, 8] in a" in said.replace("\n", " ") and "(and 3 more)" in said
    twice = CliRunner().invoke(main, ["show", str(paths["base"]), str(paths["a"]), str(paths["a"])])
    assert twice.exit_code == 1 and "a is given twice" in twice.output
    shutil.rmtree(paths["a"])
    save(paths["a"], more=torch.ones(3))
    with pytest.raises(ValueError, match="no tensor of .*base can be compared; .*: a has no such tensor"):
        compared(paths)


def test_not_a_number_is_named(tmp_path):
    paths = family(tmp_path, k=1)
    shutil.rmtree(paths["a"])
    save(paths["a"], norm=torch.full((8,), math.nan))
    with pytest.raises(ValueError, match="norm holds NaN"):
        compared(paths)


def test_nothing_is_neutral():
    one = Moments(torch.ones(2, 2, dtype=torch.float64), torch.ones(1, dtype=torch.float64), 3, 4)
    added = one + Moments.nothing(1)
    assert added.numel == 4 and added.conflict == 3 and torch.equal(added.gram, one.gram)
