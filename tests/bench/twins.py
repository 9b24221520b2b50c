"""Two language models trained apart, and every way to make one of them: pairs of tiny GPT-2, and of tiny Llama.

    OMP_NUM_THREADS=1 python -m tests.bench.twins [--seeds 0 1 2] [--families gpt2 llama] [--out DIR]

Bits per byte of held-out text, mean and standard deviation over seeds: a table of docs/neuron_correspondence.md. A seed
is a run of twins.yaml, with its own weights and order of rows; a stopped run goes on.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128}
GPT2 |= dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0) | {"initializer_range": 0.08}
MODELS = {
    "the two models": ("a", "b"),
    "the second, carried by weights": ("b_weights",),
    "the second, carried by activations": ("b_activations",),
    "naive mean": ("mean_naive",),
    "mean aligned by weights": ("mean_weights",),
    "mean aligned by activations": ("mean_activations",),
    "aligned by activations, repaired": ("repaired",),
    "aligned by activations, least squares": ("squares",),
    "aligned by activations, RegMean": ("regmean",),
}
BARRIERS = {
    "barrier, naive": ("apart", "b"),
    "barrier, aligned by weights": ("aligned", "b_weights"),
    "barrier, aligned by activations": ("aligned", "b_activations"),
}


def recipe(family: str, seed: int) -> dict[str, Any]:
    """twins.yaml for this pair."""
    found: dict[str, Any] = copy.deepcopy(yaml.safe_load((HERE / "twins.yaml").read_text())) | {"seed": seed}
    for entry in found["data"].values():
        entry["path"] = str((HERE / entry["path"]).resolve())
    for step in found["steps"]:
        if "tune" in step:
            step["tune"]["train"]["seed"] += 2 * seed
            step["tune"]["train"]["data_seed"] += 2 * seed
            step["tune"]["train"]["max_steps"] *= 2 if family == "gpt2" else 1  # it is slower to use its positions
        elif "align" in step and family == "gpt2":
            step["align"]["untie"] = True
    if family == "gpt2":
        found["models"] = {name: {**model, "config": GPT2} for name, model in found["models"].items()}
    return found


def run(family: str, seed: int, out: Path) -> dict[str, float]:
    """Bits per byte by row of the table."""
    folder = out / f"{family}{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "twins.yaml").write_text(yaml.safe_dump(recipe(family, seed), sort_keys=False))
    call = [sys.executable, "-m", "fusion.run", str(folder / "twins.yaml"), "--out", str(folder / "runs")]
    subprocess.run(call, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)

    def read(step: str) -> dict[str, Any]:
        models: dict[str, Any] = json.loads((folder / "runs" / "twins" / step / "metrics.json").read_text())["models"]
        return models

    scores = read("scores")
    found = {
        name: statistics.mean(scores[model]["bits_per_byte"]["held_out"]["bits_per_byte"] for model in models)
        for name, models in MODELS.items()
    }
    for name, (step, model) in BARRIERS.items():
        found[name] = read(step)[model]["barrier"]["held_out"]["barrier"]
    return found


def cell(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--families", nargs="+", default=["gpt2", "llama"])
    parser.add_argument("--out", type=Path, default=Path("runs/bench-twins"))
    given = parser.parse_args()
    results = {family: [run(family, seed, given.out) for seed in given.seeds] for family in given.families}
    print(f"| seeds {', '.join(map(str, given.seeds))} | {' | '.join(given.families)} |\n|---|{'---|' * len(results)}")
    for name in (*MODELS, *BARRIERS):
        row = (cell([one[name] for one in found]) for found in results.values())
        print(f"| {name} | {' | '.join(row)} |")
