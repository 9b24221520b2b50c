"""Merging against mergekit 0.1.5: whole processes on the same files, with what time and memory may be at most.

    python tests/bench/merge.py --mergekit /path/to/its/environment/bin/python [--only speed] [--only ties] [--repeat 3]

Makes a base and perturbed bf16 copies of SmolLM2-135M's shapes in a temporary directory (2 GB) and keeps them in page
cache. Parts: speed (all methods, or one by its name), inside, floor, growth, small, memory. Exits 1 when a bound is
missed. Without --mergekit the peer's times are left out. Run it on a quiet machine.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HIDDEN, INNER, LAYERS, VOCABULARY, KEYS = 576, 1536, 30, 49152, 192
MEMORY = 600e6  # bytes of peak resident memory


@dataclass(frozen=True)
class Row:
    """One method in both programs, and how many times faster it has to be: whole processes, and net of start-ups."""

    name: str
    ours: str
    params: Mapping[str, object]
    theirs: str
    their_params: Mapping[str, object]
    whole: float
    net: float
    models: int = 4


HALF = {"density": 0.5}
WEIGHTED = {"weight": 0.25}
ROWS = (
    Row("linear", "linear", {}, "linear", {"weight": 1.0}, 3.5, 1.5),
    Row("slerp", "slerp", {"t": 0.4}, "slerp", {"t": 0.4}, 3.5, 1.5, 2),
    Row("nuslerp", "nuslerp", {}, "nuslerp", {"weight": 0.5}, 3.5, 1.5, 2),
    Row("model_stock", "model_stock", {}, "model_stock", {}, 3.5, 1.5),
    Row("task_arithmetic", "task_arithmetic", {}, "task_arithmetic", WEIGHTED, 4, 2),
    Row("sce", "sce", {}, "sce", {}, 4, 2),
    Row("sce_tenth", "sce", {"select_topk": 0.1}, "sce", {"select_topk": 0.1}, 4, 2),
    Row("dare_linear", "dare", HALF, "dare_linear", {**WEIGHTED, **HALF}, 3, 1.5),
    Row("dare_ties", "dare", {**HALF, "consensus": "ties"}, "dare_ties", {**WEIGHTED, **HALF}, 6, 5),
    Row("ties", "ties", {"density": 0.2}, "ties", {**WEIGHTED, "density": 0.2}, 8, 8),
    Row(
        "breadcrumbs", "breadcrumbs", {**HALF, "gamma": 0.01}, "breadcrumbs", {**WEIGHTED, **HALF, "gamma": 0.01}, 8, 8
    ),
    Row("della", "della", {**HALF, "epsilon": 0.1}, "della", {**WEIGHTED, **HALF, "epsilon": 0.1}, 7, 7),
)
NEEDS_BASE = {row.name for row in ROWS} - {"linear", "slerp", "nuslerp"}


@dataclass(frozen=True)
class Spent:
    """Of one process: seconds on the clock, of all cores, and peak resident bytes."""

    wall: float
    cpu: float
    rss: float


def spent(command: Sequence[object], repeat: int, clear: Path | None = None) -> Spent:
    """The fastest of several runs of a process; ends the benchmark with its words when it fails."""
    runs = []
    for _ in range(repeat):
        if clear is not None:
            shutil.rmtree(clear, ignore_errors=True)
        with tempfile.TemporaryFile() as said:
            start = time.perf_counter()
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
            child = subprocess.Popen([str(one) for one in command], stdout=said, stderr=said, env=environment)
            _, status, usage = os.wait4(child.pid, 0)
            wall = time.perf_counter() - start
            child.returncode = os.waitstatus_to_exitcode(status)
            if child.returncode:
                said.seek(0)
                sys.exit(f"{' '.join(map(str, command))} failed:\n{said.read().decode()}")
        runs.append(Spent(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024))
    return min(runs, key=lambda run: run.wall)


def shapes(scale: int = 1) -> dict[str, tuple[int, ...]]:
    """SmolLM2-135M's tensors (tied head); `scale` times as many layers and tokens."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY * scale, HIDDEN)}
    for layer in range(LAYERS * scale):
        at = f"model.layers.{layer}"
        found |= {f"{at}.self_attn.{one}_proj.weight": (HIDDEN, HIDDEN) for one in "qo"}
        found |= {f"{at}.self_attn.{one}_proj.weight": (KEYS, HIDDEN) for one in "kv"}
        found |= {f"{at}.mlp.{one}_proj.weight": (INNER, HIDDEN) for one in ("gate", "up")}
        found |= {f"{at}.mlp.down_proj.weight": (HIDDEN, INNER)}
        found |= {f"{at}.{one}_layernorm.weight": (HIDDEN,) for one in ("input", "post_attention")}
    return {**found, "model.norm.weight": (HIDDEN,)}


# what `fusion merge` loads, in its way, and its way to end
LOADED = "import os\nfrom fusion.cli import importing\nwith importing():\n    import fusion._merge_command\nos._exit(0)"
INSIDE = """
import json, sys
from fusion.merge import merge_checkpoints
word, params, models, base, folder = json.loads(sys.argv[1])
given = {f"m{n}": f"{folder}/m{n}" for n in range(1, models + 1)}
made = merge_checkpoints(word, given, f"{folder}/out", base=f"{folder}/base" if base else None, params=params)
print(made.metrics["seconds"])
"""


def make(folder: Path, which: Mapping[str, tuple[int, ...]], experts: int) -> None:
    """base and m1, m2, ... in `folder`: each a little beside the base.

    In a process of its own, since what a process is started from counts in its peak of memory.
    """
    work = multiprocessing.get_context("spawn").Process(target=_make, args=(folder, which, experts))
    work.start()
    work.join()
    if work.exitcode:
        sys.exit("the models could not be made")
    os.sync()  # so that they are not flushed to the disk while something is timed


def _make(folder: Path, which: Mapping[str, tuple[int, ...]], experts: int) -> None:
    import torch
    from safetensors.torch import save_file

    def seeded(number: int) -> torch.Generator:
        return torch.Generator().manual_seed(number)

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": sum(name.endswith("q_proj.weight") for name in which),
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": which.get("model.embed_tokens.weight", (VOCABULARY,))[0],
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
    base = {name: torch.randn(shape, generator=seeded(0)) * 0.02 for name, shape in which.items()}
    for number in range(experts + 1):
        at = folder / (f"m{number}" if number else "base")
        at.mkdir(parents=True, exist_ok=True)
        draw = seeded(number)
        change = 0.002 if number else 0.0
        tensors = {n: (t + change * torch.randn(t.shape, generator=draw)).bfloat16() for n, t in base.items()}
        save_file(tensors, at / "model.safetensors", metadata={"format": "pt"})
        (at / "config.json").write_text(json.dumps(config))


def ours(method: str, params: Mapping[str, object], folder: Path, models: int, base: bool) -> list[object]:
    command: list[object] = [sys.executable, "-m", "fusion.cli", "merge", method, "--out", folder / "out"]
    command += ["--base", folder / "base"] if base else []
    for number in range(1, models + 1):
        command += ["--model", folder / f"m{number}"]
    for name, value in params.items():
        command += ["--param", f"{name}={value}"]
    return command


def theirs(row: Row, python: Path, folder: Path) -> list[object]:
    models = [
        {"model": str(folder / f"m{number}"), "parameters": dict(row.their_params)}
        for number in range(1, row.models + 1)
    ]
    config: dict[str, object] = {"merge_method": row.theirs, "models": models, "dtype": "bfloat16"}
    if row.theirs == "slerp":
        config |= {"base_model": str(folder / "m1"), "parameters": dict(row.their_params)}
    elif row.theirs == "sce":
        config |= {"base_model": str(folder / "base"), "parameters": dict(row.their_params)}
    elif row.name in NEEDS_BASE:
        config["base_model"] = str(folder / "base")
    (folder / "config.yaml").write_text(json.dumps(config))
    return [python.parent / "mergekit-yaml", folder / "config.yaml", folder / "out"]


class Bench:
    """Runs parts and remembers which bounds were missed."""

    def __init__(self, folder: Path, mergekit: Path | None, repeat: int) -> None:
        self.folder, self.mergekit, self.repeat = folder, mergekit, repeat
        self.missed: list[str] = []
        self.start = spent([sys.executable, "-c", LOADED], repeat).wall
        self.their_start = spent([mergekit.parent / "mergekit-yaml", "--help"], repeat).wall if mergekit else 0.0
        print(f"start-up: fusion {self.start:.2f} s, mergekit {self.their_start:.2f} s")

    def within(self, what: str, value: float, bound: float, least: bool = False) -> str:
        """The value, marked and remembered when it is out of bounds."""
        good = value >= bound if least else value <= bound
        if not good:
            self.missed.append(f"{what}: {value:.3g}, {'at least' if least else 'at most'} {bound:.3g} is needed")
        return f"{value:.2f}{'' if good else ' !'}"

    def net(self, run: Spent) -> float:
        return max(run.wall - self.start, 1e-3)

    def speed(self, rows: Sequence[Row]) -> None:
        print("| method | mergekit s | MB | fusion s | cpu s | MB | whole | of | net | of |\n|" + "---|" * 10)
        for row in rows:
            mine = self.merged(row)
            memory = self.within(f"{row.name}, peak MB", mine.rss / 1e6, MEMORY / 1e6)
            left = f"| {row.name} |"
            right = f" {mine.wall:.2f} | {mine.cpu:.2f} | {memory} |"
            if self.mergekit is None:
                print(f"{left} | |{right} | {row.whole} | | {row.net} |", flush=True)
                continue
            other = spent(theirs(row, self.mergekit, self.folder), self.repeat, self.folder / "out")
            whole = self.within(f"{row.name}, whole", other.wall / mine.wall, row.whole, least=True)
            net = self.within(f"{row.name}, net", (other.wall - self.their_start) / self.net(mine), row.net, least=True)
            left += f" {other.wall:.2f} | {other.rss / 1e6:.0f} |"
            print(f"{left}{right} {whole} | {row.whole} | {net} | {row.net} |", flush=True)

    def merged(self, row: Row, folder: Path | None = None, models: int | None = None) -> Spent:
        at = folder or self.folder
        command = ours(row.ours, row.params, at, models or row.models, row.name in NEEDS_BASE)
        return spent(command, self.repeat, at / "out")

    def floor(self) -> None:
        """Against reading all inputs and writing one output from and to page cache, plainly."""
        for name, base, bound in (("linear", False, 5), ("ties", True, 12)):
            files = [self.folder / f"m{number}" for number in range(1, 5)] + [self.folder / "base"] * base
            least = min(plainly([at / "model.safetensors" for at in files], self.folder / "plain") for _ in range(3))
            row = next(row for row in ROWS if row.name == name)
            ratio = self.within(f"{name}, over the floor", self.net(self.merged(row)) / least, bound)
            print(f"{name}: {ratio} times the floor of {least:.2f} s (at most {bound})", flush=True)

    def inside(self) -> None:
        """What the engine itself takes, without the start of a process: the seconds it writes down."""
        print("| method | seconds |\n|---|---|")
        for row in ROWS:
            shutil.rmtree(self.folder / "out", ignore_errors=True)
            given = (row.ours, dict(row.params), row.models, row.name in NEEDS_BASE, str(self.folder))
            call = [sys.executable, "-c", INSIDE, json.dumps(given)]
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            print(f"| {row.name} | {subprocess.check_output(call, env=environment, text=True).strip()} |", flush=True)

    def growth(self) -> None:
        """Twice the experts or the size take at most twice the time, within 15 %."""
        row = next(row for row in ROWS if row.name == "task_arithmetic")
        with tempfile.TemporaryDirectory(dir=self.folder) as wide:
            make(Path(wide), shapes(), 16)
            each = {k: self.net(self.merged(row, Path(wide), k)) / (k + 1) for k in (2, 4, 8, 16)}
        self.grown("experts", each)
        sizes = {}
        for scale in (1, 2, 4):
            with tempfile.TemporaryDirectory(dir=self.folder) as tall:
                make(Path(tall), shapes(scale), 2)
                sizes[scale] = self.net(self.merged(row, Path(tall), 2)) / scale
        self.grown("size", sizes)

    def grown(self, what: str, each: Mapping[int, float]) -> None:
        first = next(iter(each.values()))
        shown = ", ".join(f"{k}: {value:.3f} s" for k, value in each.items())
        worst = self.within(f"growth with {what}", max(each.values()) / first, 1.15)
        print(f"{what}: net seconds a unit {shown}; at most {worst} times the first (1.15)", flush=True)

    def small(self) -> None:
        """18,000 tensors of a few numbers: what each costs besides its numbers."""
        count = 18_000
        names = {f"model.layers.{n // 384}.experts.{n // 3 % 128}.{n % 3}.weight": (16, 16) for n in range(count)}
        with tempfile.TemporaryDirectory(dir=self.folder) as many:
            make(Path(many), names, 4)
            for row in (row for row in ROWS if row.name in ("linear", "ties")):
                each = self.net(self.merged(row, Path(many))) / count * 1e3
                print(f"{row.name}: {self.within(f'{row.name}, ms a tensor', each, 2)} ms a tensor (2)", flush=True)

    def memory(self) -> None:
        """One tensor of 128,256 x 8,192 in every model, sparse on disk."""
        with tempfile.TemporaryDirectory(dir=self.folder) as large:
            for number in range(3):
                sparse(Path(large) / (f"m{number}" if number else "base"), number)
            for row in (row for row in ROWS if row.name in ("linear", "model_stock", "ties", "della")):
                run = spent(ours(row.ours, row.params, Path(large), 2, row.name in NEEDS_BASE), 1, Path(large) / "out")
                peak = self.within(f"{row.name}, peak MB with a large tensor", run.rss / 1e6, MEMORY / 1e6)
                print(f"{row.name}: {peak} MB, {run.wall:.1f} s", flush=True)


def plainly(files: Sequence[Path], out: Path) -> float:
    """Seconds that reading these files and writing one as large as the first takes, through one buffer of 4 MiB."""
    buffer = bytearray(1 << 22)
    start = time.perf_counter()
    for file in files:
        with open(file, "rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    left = files[0].stat().st_size
    with open(out, "wb", buffering=0) as stream:
        while left > 0:
            left -= stream.write(memoryview(buffer)[: min(left, len(buffer))])
    seconds = time.perf_counter() - start
    out.unlink()
    return seconds


def sparse(folder: Path, number: int) -> None:
    """A checkpoint of zeros but for one number, with as good as nothing on disk."""
    size = 128256 * 8192 * 2
    table = {"model.embed_tokens.weight": {"dtype": "BF16", "shape": [128256, 8192], "data_offsets": [0, size]}}
    header = json.dumps(table).encode()
    folder.mkdir(parents=True)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
        file.seek(8 + len(header) + 2 * number)
        file.write(b"\x80\x3f")  # 1.0


def parts(only: Sequence[str]) -> Iterator[str]:
    """Names of parts in their order; speed when one of its methods is asked for."""
    for part in ("speed", "inside", "floor", "growth", "small", "memory"):
        if not only or part in only or (part == "speed" and any(row.name in only for row in ROWS)):
            yield part


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mergekit", type=Path, help="the python of an environment with mergekit 0.1.5")
    parser.add_argument("--only", action="append", default=[], help="a part, or a method of the speed table")
    parser.add_argument("--repeat", type=int, default=3, help="runs of which the fastest counts")
    parser.add_argument("--folder", type=Path, help="where the models are made; a temporary directory if left out")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        bench = Bench(Path(folder), given.mergekit, given.repeat)
        make(Path(folder), shapes(), 4)
        rows = [row for row in ROWS if row.name in given.only] or list(ROWS)
        for part in parts(given.only):
            print(f"\n## {part}", flush=True)
            if part == "speed":
                bench.speed(rows)
            else:
                run = {"inside": bench.inside, "floor": bench.floor, "growth": bench.growth, "small": bench.small}
                (run | {"memory": bench.memory})[part]()
    print("\n" + ("\n".join(["missed:", *bench.missed]) if bench.missed else "all bounds hold"))
    return 1 if bench.missed else 0


if __name__ == "__main__":
    sys.exit(main())
