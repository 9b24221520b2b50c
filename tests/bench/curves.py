"""Loss curves of two processes against one: DDP, ZeRO-2 and ZeRO-3 on CPU, 20 steps in float32.

    python tests/bench/curves.py             exits 1 when a curve differs by more than 1e-4 relative

One recipe records, distills and tunes (with another batch size) in one process tree; only the launcher changes.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BOUND = 1e-4
LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
LLAMA |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LAUNCHES = {"ddp_cpu": 2, "zero2_cpu": 2, "zero3_cpu": 2}


def recipe(processes: int) -> dict:
    """The same 8 and 4 rows a step on however many processes."""
    train = {"max_steps": 20, "learning_rate": 2e-3, "logging_steps": 1, "save_strategy": "no"}
    common = {"data": "text", "max_length": 96}
    return {
        "models": {
            "teacher": {"config": LLAMA, "tokenizer": {"train": "bpe", "vocab_size": 400, "data": "text"}},
            "student": {"config": GPT2, "tokenizer": {"train": "unigram", "vocab_size": 500, "data": "text"}},
        },
        "data": {"text": {"path": str(ROOT / "recipes/data/austen.txt"), "max_bytes": 150, "split": "train[100:400]"}},
        "steps": [
            {"record": {"out": "hints", "teacher": "teacher", "data": "text", "draws": 8}},
            {
                "distill": {"out": "taught", "model": "student", "targets": ["hints"], **common}
                | {"train": train | {"per_device_train_batch_size": 8 // processes}}
            },
            {
                "tune": {"out": "tuned", "model": "taught", **common}
                | {"train": train | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2 // processes}}
            },
        ],
    }


def curves(folder: Path, config: str, processes: int) -> dict[str, list[float]]:
    """The losses of both training steps, step by step."""
    path = folder / config / "r.yaml"
    path.parent.mkdir()
    path.write_text(json.dumps(recipe(processes)))
    out = str(path.parent / "runs")
    one = [sys.executable, "-m", "fusion.run", str(path), "--out", out]
    many = [sys.executable, "-m", "fusion.cli", "launch", str(path), "--config", config, "--out", out]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(one if processes == 1 else many, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{config}: {done.stdout[-2000:]}{done.stderr[-4000:]}")
    return {
        name: [json.loads(line)["loss"] for line in (path.parent / f"runs/r/{name}/log.jsonl").read_text().splitlines()]
        for name in ("taught", "tuned")
    }


def main() -> int:
    worst = 0.0
    with tempfile.TemporaryDirectory() as name:
        single = curves(Path(name), "single", 1)
        print("| launch | distill, 20 steps | tune, 20 steps |\n|---|---|---|")
        for config, processes in LAUNCHES.items():
            found = curves(Path(name), config, processes)
            apart = {}
            for step, losses in single.items():
                assert len(losses) == len(found[step]) == 20
                apart[step] = max(abs(a - b) / a for a, b in zip(losses, found[step], strict=True))
            print(f"| {config} | {apart['taught']:.1e} | {apart['tuned']:.1e} |", flush=True)
            worst = max(worst, *apart.values())
    print(f"largest relative difference {worst:.1e}, at most {BOUND:.0e} is asked for")
    return int(worst > BOUND)


if __name__ == "__main__":
    sys.exit(main())
