"""Runs in real processes: what is done is skipped, what was killed continues, and several ranks act as one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fusion import _ranks, run

REPOSITORY = Path(__file__).resolve().parent.parent
ONE = "  - tests.plugin_steps: {out: one, parts: 4%s}\n"
TWO = "  - tests.plugin_steps: {out: two, parts: 1, targets: [one], train: {learning_rate: 1e-5}}\n"


class Runner:
    """A directory with a recipe, and commands in it."""

    def __init__(self, folder: Path):
        self.folder = folder
        cleared = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        self.environ = {name: value for name, value in os.environ.items() if name not in cleared}
        self.environ |= {
            "PYTHONPATH": str(REPOSITORY),
            "FUSION_CACHE": str(folder / "cache"),
            "FUSION_TEST_DIED": str(folder / "died"),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }

    def recipe(self, *steps: str) -> None:
        (self.folder / "r.yaml").write_text("steps:\n" + "".join(steps))

    def start(self, *arguments: str, ranks: int = 1) -> subprocess.Popen[str]:
        launcher = [sys.executable]
        if ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
        return subprocess.Popen(
            [*launcher, "-m", "fusion.run", "r.yaml", *arguments],
            cwd=self.folder,
            env=self.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # a shell that starts the tests in the background has them ignore Ctrl-C, and children inherit that
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def __call__(self, *arguments: str, ranks: int = 1, status: int | None = 0) -> str:
        process = self.start(*arguments, ranks=ranks)
        said, _ = process.communicate(timeout=120)
        assert status is None or process.returncode == status, said
        return said

    def directories(self) -> list[str]:
        return sorted(p.name for p in (self.folder / "runs" / "r").glob("[a-z]*-*") if not p.is_symlink())

    def read(self, name: str) -> str:
        return (self.folder / "runs" / "r" / name).read_text()

    def written(self, out: str) -> dict[str, tuple[int, str]]:
        """When each part was written, and by whom."""
        files = (self.folder / "runs" / "r" / out).resolve().glob("part-*")
        return {file.name: (file.stat().st_mtime_ns, file.read_text()) for file in files}


@pytest.fixture
def runner(tmp_path) -> Runner:
    return Runner(tmp_path)


def test_done_steps_are_skipped_and_a_changed_one_gets_a_new_directory(runner):
    runner.recipe(ONE % "", TWO)
    said = runner()
    assert "no accelerator here: use_cpu: true, bf16: false in every train block" in said
    assert runner.read("two/total") == "4+1"
    assert "'use_cpu': True, 'bf16': False" in runner.read("two/fields")
    step, done = json.loads(runner.read("one/step.json")), json.loads(runner.read("one/done.json"))
    assert step["verb"] == "tests.plugin_steps" and step["fields"] == {"parts": 4} and len(step["key"]) == 64
    assert set(step) >= {"inputs", "place", "versions", "started"} and "torch" in step["versions"]
    assert done["seconds"] >= 0 and done["files"]["total"]["bytes"] == 1
    before, directories = runner.written("one"), runner.directories()
    assert len(directories) == 2 and not any("partial" in name for name in directories)
    assert json.loads(runner.read("report.json"))["recipe"]["name"] == "r" and "<html" in runner.read("report.html")

    assert "one: done before" in runner()
    assert runner.written("one") == before and runner.directories() == directories

    runner.recipe(ONE % "", TWO.replace("1e-5", "1e-4"))
    runner()
    assert runner.written("one") == before and len(runner.directories()) == 3
    assert set(directories) < set(runner.directories()), "what the old recipe made is kept"
    assert "0.0001" in runner.read("two/fields"), "the link follows"
    runner("--max_steps", "3", "--learning-rate=2e-3")
    assert "'learning_rate': 0.002, 'max_steps': 3" in runner.read("two/fields")
    assert runner.written("one").keys() == before.keys() and "'max_steps': 3" in runner.read("one/fields")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_run_continues(runner, ranks):
    runner.recipe(ONE % ", die_at: 2, on_rank: 0", TWO)
    said = runner(ranks=ranks, status=None)
    assert "one: done in" not in said
    (partial,) = runner.directories()
    assert partial.endswith(".partial") and (runner.folder / "died").exists()
    assert not (runner.folder / "runs" / "r" / "one").exists()
    before = {file.name: file.read_text() for file in (runner.folder / "runs" / "r" / partial).glob("part-*")}
    assert before
    assert "continues in" in runner(ranks=ranks)
    after = runner.written("one")
    assert len(after) == 4 and all(after[name][1] == text for name, text in before.items())


def test_ctrl_c_is_one_sentence_and_continues(runner):
    runner.recipe(ONE % ", seconds: 0.5")
    process = runner.start()
    while not list(runner.folder.glob("runs/r/one-*.partial/part-1")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in said
    assert said.rstrip().endswith("stopped; the same command continues")
    assert "continues in" in runner()
    assert len({text for _, text in runner.written("one").values()}) > 1, "parts of both processes"


def test_a_sentence_has_no_traceback_and_a_fault_has_one(runner):
    runner.recipe(ONE % ", die_at: 1, how: sentence")
    said = runner(status=1)
    assert "fusion: part 1 can't be made" in said and "Traceback" not in said
    assert "plugin_steps.py" in runner.read(f"{runner.directories()[0]}/traceback-0.txt")
    (runner.folder / "died").unlink()
    runner.recipe(ONE % ", die_at: 1, how: fault")
    said = runner(status=1)
    assert "Traceback" in said and "KeyError: 1" in said


def test_two_ranks_share_the_work(runner):
    runner.recipe(ONE % ", seconds: 0.2", TWO)
    said = runner(ranks=2)
    assert said.count("one: done in") == 1
    texts = {text.rpartition(" ")[2] for _, text in runner.written("one").values()}
    assert len(texts) == 2 and runner.read("two/total") == "4+1"
    assert said.count("report.html") == 1


@pytest.mark.parametrize("how", ["sentence", "fault"])
def test_a_rank_that_fails_speaks_for_all(runner, how):
    runner.recipe(ONE % f", die_at: 1, on_rank: 1, how: {how}")
    said = runner(ranks=2, status=1)
    assert said.count("part 1 can't be made" if how == "sentence" else "KeyError: 1") == 1
    assert "has not answered" not in said and "one: done in" not in said


def test_only_one_step(runner):
    runner.recipe(ONE % "", TWO)
    assert "steps[1].tests.plugin_steps: it reads 'one', which is not made yet" in runner("--only", "two", status=1)
    runner("--only", "one")
    assert len(runner.directories()) == 1
    assert "no step makes 'tow'; did you mean 'two'?" in runner("--only", "tow", status=1)
    runner("--only", "two")
    assert len(runner.directories()) == 2


def test_a_misspelt_train_field_stops_before_the_first_step(runner):
    runner.recipe(ONE % "", TWO.replace("learning_rate", "learning_rat"))
    said = runner(status=1)
    assert (
        "steps[1].tests.plugin_steps.train: there is no train field 'learning_rat'; did you mean 'learning_rate'?"
        in said
    )
    assert runner.directories() == []
    runner.recipe(ONE % "", TWO)
    assert "there is no train field 'max_step'; did you mean 'max_steps'?" in runner("--max_step", "2", status=1)


def test_dry_run_writes_nothing(runner):
    runner.recipe(ONE % "", TWO)
    assert "one: would run" in runner("--dry-run")
    assert not (runner.folder / "runs").exists()


def test_two_runs_do_not_write_the_same_directory(runner):
    runner.recipe(ONE % ", seconds: 8")
    first = runner.start()
    while not list(runner.folder.glob("runs/r/one-*.partial/step.json")):
        assert first.poll() is None
        time.sleep(0.05)
    assert f"another run (process {first.pid} on " in runner(status=1)
    first.kill()
    first.wait()
    for part in range(4):
        next(runner.folder.glob("runs/r/one-*.partial")).joinpath(f"part-{part}").write_text("there")
    assert "continues in" in runner(), "the lock of a dead process is nobody's"


def test_a_damaged_output_is_noticed(runner):
    runner.recipe(ONE % "")
    runner()
    (runner.folder / "runs" / "r" / "one" / "part-2").write_text("x")
    assert "has 1 bytes" in runner(status=1)
    (runner.folder / "runs" / "r" / "one" / "part-2").unlink()
    assert "is gone" in runner(status=1)


def test_command_lines():
    options = run.parse(
        ["--local_rank=1", "x.yaml", "--out", "o", "--use_cpu", "true", "--learning-rate=1e-5", "--tf32"]
    )
    assert (options.recipe, options.out) == ("x.yaml", "o")
    assert options.overrides == {"use_cpu": True, "learning_rate": 1e-5, "tf32": True}
    assert run.parse(["--local-rank", "0", "x.yaml"]).recipe == "x.yaml"
    assert run.parse(["x.yaml", "--seed", "-1"]).overrides == {"seed": -1}
    for arguments, sentence in [
        ([], "a recipe is needed"),
        (["--out"], "--out needs a value"),
        (["x.yaml", "y.yaml"], "one recipe is needed, and 'y.yaml' comes after 'x.yaml'"),
        (["--use_cpu", "true", "x.yaml"], "--use_cpu comes before the recipe"),
    ]:
        with pytest.raises(ValueError, match=sentence):
            run.parse(arguments)


def test_ranks_of_other_launchers():
    slurm = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "4", "MASTER_ADDR": "n0"}
    found = _ranks.of_environment(environ := dict(slurm))
    assert (found.rank, found.local, found.world) == (3, 1, 4) and environ["RANK"] == "3"
    batch = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4"}  # a batch script is no rank
    assert _ranks.of_environment(batch).world == 1
    assert _ranks.of_environment({**slurm, "RANK": "0", "WORLD_SIZE": "2"}).world == 2
    del slurm["MASTER_ADDR"]
    with pytest.raises(ValueError, match="MASTER_ADDR is not"):
        _ranks.of_environment(slurm)


def test_a_file_system_that_is_not_shared(tmp_path, monkeypatch):
    monkeypatch.setattr(_ranks, "MEET", 0.3)
    environ = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    with pytest.raises(ValueError, match="has not seen rank 0 in .* must be on a file system that all ranks share"):
        _ranks.join(tmp_path, environ)
    environ["RANK"] = "0"  # the hello of that dead rank lies there still and must not count
    with pytest.raises(ValueError, match=r"has not seen 1 of 2 ranks \(the first is 1\)"):
        _ranks.join(tmp_path, environ)


def test_a_rank_that_stops_answering(tmp_path, monkeypatch):
    monkeypatch.setattr(_ranks, "GONE", 0.2)
    ranks = _ranks.Ranks(0, 0, 2, tmp_path, "s")
    (tmp_path / "s.beat-1").touch()
    with pytest.raises(ValueError, match=r"rank 1 has not answered for .* \(waiting for: its parts\)"):
        ranks.wait(lambda: False, "its parts")
    (tmp_path / "s.left-1").touch()
    assert not ranks._silent(1), "a rank that left was not lost"
