"""A disk that is full, and files that are gone or cut off: named in a sentence; with them put right the run goes on."""

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fusion import run
from fusion._merge import merge_checkpoints
from fusion._room import room
from tests.processes import ROOT
from tests.test_failure import GPT2, TRAIN, killed_before_the_model_is_written

SCRATCH = {"config": GPT2, "tokenizer": {"train": "bytes"}}
LESSON = {"model": "student", "data": "text", "max_length": 64, "train": TRAIN | {"max_steps": 4, "save_steps": 2}}
STEPS = {
    "hints": {"record": {"out": "hints", "teacher": "teacher", "data": "text", "draws": 4}},
    "taught": {"distill": {"out": "taught", "targets": ["hints"]} | LESSON},
    "soup": {"merge": {"out": "soup", "method": "linear", "models": {"taught": 0.5, "student": 0.5}}},
}
DOCUMENTS = {"path": str(ROOT / "recipes/data/austen.txt"), "max_bytes": 50, "split": "train[100:160]"}
RECIPE = {"models": {"student": SCRATCH, "teacher": SCRATCH}, "data": {"text": DOCUMENTS}, "steps": [*STEPS.values()]}
BIG = torch.zeros(50_000)


@contextmanager
def limit(size: int) -> Iterator[None]:
    """A file system whose files grow to so many bytes; a disk that is full says the same with another number."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, and with runs/ where nothing went wrong."""
    folder = tmp_path_factory.mktemp("straight")
    (folder / "r.yaml").write_text(json.dumps(RECIPE))
    assert run.main([str(folder / "r.yaml"), "--out", str(folder / "runs")]) == 0
    return folder


def weights(runs: Path) -> dict[str, torch.Tensor]:
    return load_file(runs / "r" / "result" / "model.safetensors")


def test_a_full_disk_is_named_and_with_room_the_run_goes_on(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = [str(straight / "r.yaml"), "--out", str(tmp_path / "runs")]
    full = {
        "hints": (10_000, "00000.safetensors.part"),
        "taught": (200_000, "checkpoints/checkpoint-2/optimizer.pt"),
        "soup": (100_000, "model.safetensors"),
    }
    for name, (size, file) in full.items():
        with limit(size):
            assert run.main([*call, "--only", name]) == 1
        (partial,) = tmp_path.glob(f"runs/r/{name}-*.partial")
        said = capsys.readouterr().err
        assert "fusion: the disk took no more (" in said and f") at {partial / file}, " in said
        assert "make room, the same command continues" in said and "Traceback" not in said
        assert not (tmp_path / "runs" / "r" / name).exists()
        assert run.main([*call, "--only", name]) == 0
        assert f"{name}: {next(iter(STEPS[name]))} continues in" in capsys.readouterr().out
    assert run.main(call) == 0
    one, other = weights(straight / "runs"), weights(tmp_path / "runs")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_merge_without_a_recipe_says_it_too(straight: Path, tmp_path: Path) -> None:
    models = {name: straight / "runs" / "r" / name for name in ("taught", "soup")}
    file = tmp_path / "out.partial" / "model.safetensors"
    with pytest.raises(ValueError, match=f"the disk took no more .* at {file}, "), limit(100_000):
        merge_checkpoints("ties", models, tmp_path / "out", base=models["soup"])
    assert not (tmp_path / "out").exists()
    merge_checkpoints("ties", models, tmp_path / "out", base=models["soup"])
    merge_checkpoints("ties", models, tmp_path / "straight", base=models["soup"])
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "straight"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def preallocate(file: Path) -> None:
    with open(file, "wb") as stream:
        os.posix_fallocate(stream.fileno(), 0, 200_000)


WRITERS: dict[str, Callable[[Path], object]] = {
    "text": lambda file: file.write_text("x" * 200_000),
    "numpy": lambda file: np.save(file.with_suffix(".npy"), BIG.numpy()),
    "torch": lambda file: torch.save({"big": BIG}, file),
    "preallocated": preallocate,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_librarys_way_to_say_so_is_understood(tmp_path: Path, writer: str) -> None:
    (tmp_path / "earlier").touch()
    os.utime(tmp_path / "earlier", (0, 0))
    with pytest.raises(ValueError, match=rf"the disk took no more \(.*\) at {tmp_path}/file(.npy)?, "), limit(100_000):
        with room(tmp_path):
            WRITERS[writer](tmp_path / "file")


def test_what_takes_its_file_away_and_what_is_another_error(tmp_path: Path) -> None:
    (tmp_path / "earlier").touch()
    with pytest.raises(ValueError, match=f"File too large. at {tmp_path}/earlier, "), limit(100_000), room(tmp_path):
        save_file({"big": BIG}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="No space left on device"), room(tmp_path), open("/dev/full", "w") as file:
        file.write("x" * 20_000)
    with pytest.raises(KeyError, match="mine"), room(tmp_path):
        raise KeyError("mine")


def test_a_training_checkpoint_that_was_damaged_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tune = {"tune": {"out": "tuned"} | LESSON}
    (tmp_path / "r.yaml").write_text(json.dumps(RECIPE | {"steps": [tune]}))
    call = [str(tmp_path / "r.yaml"), "--out", str(tmp_path / "runs")]
    killed_before_the_model_is_written(call, monkeypatch)
    (folder,) = tmp_path.glob("runs/r/tuned-*.partial/checkpoints/checkpoint-2")
    weights, optimizer = folder / "model.safetensors", folder / "optimizer.pt"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert run.main(call) == 1
    said = capsys.readouterr().err
    assert f"fusion: {weights} has {len(whole) // 2} bytes, {len(whole)} were written; delete {folder} to go on" in said
    weights.write_bytes(whole)
    optimizer.unlink()  # without it the trainer would begin with another one, and not say so
    assert run.main(call) == 1
    assert f"fusion: {optimizer} is gone, " in capsys.readouterr().err
    shutil.rmtree(folder)
    assert run.main(call) == 0


def test_a_missing_shard_is_named(straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(straight / "runs", tmp_path / "runs", symlinks=True)
    call = [str(straight / "r.yaml"), "--out", str(tmp_path / "runs")]
    (shard,) = (tmp_path / "runs").glob("r/hints-*/00000.safetensors")
    shutil.rmtree(next((tmp_path / "runs").glob("r/taught-*/")))
    shard.unlink()
    assert run.main(call) == 1
    said = capsys.readouterr().err
    assert f"fusion: {shard} is gone, " in said and f"delete {shard.parent} to make it again" in said
    model, two = tmp_path / "model", load_file(straight / "runs/r/taught/model.safetensors")
    shutil.copytree(straight / "runs/r/taught", model)
    (model / "model.safetensors").unlink()
    names = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(two)}
    for file in set(names.values()):
        save_file({name: tensor for name, tensor in two.items() if names[name] == file}, model / file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    merge = {"merge": {"out": "soup", "method": "linear", "models": ["whole", "cut"]}}
    models = {"whole": {"path": str(straight / "runs/r/taught")}, "cut": {"path": str(model)}}
    (tmp_path / "s.yaml").write_text(json.dumps({"models": models, "steps": [merge]}))
    call = [str(tmp_path / "s.yaml"), "--out", str(tmp_path / "runs")]
    last = model / "model-00002-of-00002.safetensors"
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])
    assert run.main(call) == 1 and f"{last} is truncated" in capsys.readouterr().err
    last.unlink()
    assert run.main(call) == 1
    assert "model.safetensors.index.json names 2 files, missing: model-00002-of-00002.s" in capsys.readouterr().err
    last.write_bytes(whole)
    assert run.main(call) == 0
