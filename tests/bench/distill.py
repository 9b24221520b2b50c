"""A distill step against a plain Trainer language-model step of the same shape: time and peak memory, in one run.

    python tests/bench/distill.py            exits 1 when a step costs more than 1.2 times a plain one

Both trainers see the same rows (SmolLM2-135M's shape, random weights, 49,152 tokens of vocabulary); targets are 16
draws a token, recorded beforehand by a model of another tokenizer. The two are timed in turns, so that a slow spell
hits both.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

LIMIT = 1.2
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
MEASURED = """
import resource, sys
from fusion.run import main
status = main(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
sys.exit(status)
"""
SHAPE = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "max_position_embeddings": 1024,
}
SMALL = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}


def recipe(steps: int, layers: int, vocabulary: int) -> dict:
    train = {"max_steps": steps, "per_device_train_batch_size": 1, "logging_steps": 1, "save_strategy": "no"}
    common = {"data": "text", "max_length": 512, "train": train}
    wide = {"config": SHAPE | {"num_hidden_layers": layers, "vocab_size": vocabulary}}
    return {
        "models": {
            "student": wide | {"tokenizer": {"train": "bpe", "vocab_size": 4096, "data": "text"}},
            "teacher": {"config": SMALL, "tokenizer": {"train": "unigram", "vocab_size": 2048, "data": "text"}},
        },
        "data": {"text": {"path": "stdlib:", "max_bytes": 1500, "shuffle": 0, "split": "train[:200]"}},
        "steps": [
            {"record": {"out": "hints", "teacher": "teacher", "data": "text", "draws": 16}},
            {"distill": {"out": "taught", "model": "student", "targets": ["hints"], **common}},
            {"tune": {"out": "plain", "model": "student", **common}},
        ],
    }


def run(path: Path, only: str) -> tuple[float, float]:
    """Median seconds a step after the first two, and the process's peak memory in bytes."""
    call = [sys.executable, "-c", MEASURED, str(path), "--only", only, "--out", str(path.parent / "runs")]
    out = subprocess.run(call, env=ENVIRONMENT, capture_output=True, text=True)
    if out.returncode:
        sys.exit(out.stdout + out.stderr)
    log = path.parent / "runs" / path.stem / only / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    seconds = [line["seconds_per_step"] for line in lines if "seconds_per_step" in line][2:]
    if not seconds:  # no training step: it is only run to be there
        return 0.0, 0.0
    return statistics.median(seconds), float(out.stdout.rsplit("peak", 1)[1]) * 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--vocabulary", type=int, default=49152)
    given = parser.parse_args()
    rows = []
    for turn in range(given.turns):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "bench.yaml"
            path.write_text(json.dumps(recipe(given.steps, given.layers, given.vocabulary)))
            order = ("plain", "taught") if turn % 2 else ("taught", "plain")
            run(path, "hints")
            found = {name: run(path, name) for name in order}
        rows.append(found)
        taught, plain = found["taught"], found["plain"]
        print(
            f"turn {turn}: distill {taught[0]:.2f} s a step, {taught[1] / 2**20:.0f} MiB; "
            f"plain {plain[0]:.2f} s, {plain[1] / 2**20:.0f} MiB; ratio {taught[0] / plain[0]:.3f}",
            flush=True,
        )
    ratio = statistics.median(r["taught"][0] / r["plain"][0] for r in rows)
    memory = max(r["taught"][1] - r["plain"][1] for r in rows)
    print(f"| distill step / plain step | {ratio:.3f} | at most {LIMIT} |")
    print(f"| peak memory over plain training | {memory / 2**20:+.0f} MiB | at most one chunk |")
    return int(ratio > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
