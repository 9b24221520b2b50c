"""The fused model against plain continued training, over seeds: bits per byte on what teacher and student know.

    python tests/bench/gain.py [--seeds 0 1 2] [--out DIR]    12 minutes a seed on one core; a stopped run goes on

Runs gain.yaml once per seed (initial weights, order of the rows, draws). Exits 1 unless the fused model's mean is at
least 0.08 bits per byte below the baseline's on code and not above it on prose.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import yaml

HERE = Path(__file__).resolve().parent
NEEDED = 0.08
MODELS = {"student": "before", "teacher": "teacher", "baseline": "continued training", "taught": "fused"}


def run(seed: int, out: Path) -> dict[str, dict[str, float]]:
    """Bits per byte by model and domain."""
    recipe = yaml.safe_load((HERE / "gain.yaml").read_text()) | {"seed": seed}
    for entry in recipe["data"].values():
        if entry.get("path", "stdlib:") != "stdlib:":
            entry["path"] = str((HERE / entry["path"]).resolve())
    folder = out / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gain.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    call = [sys.executable, "-m", "fusion.run", str(folder / "gain.yaml"), "--out", str(folder / "runs")]
    subprocess.run(call, env=os.environ | {"PYTHONPATH": str(HERE.parents[1])}, check=True)
    found = json.loads((folder / "runs/gain/evaluate_6/metrics.json").read_text())["models"]
    return {
        model: {domain: entry["bits_per_byte"] for domain, entry in found[model]["bits_per_byte"].items()}
        for model in MODELS
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/bench-gain"))
    given = parser.parse_args()
    found = [run(seed, given.out) for seed in given.seeds]

    def cell(values: list[float]) -> str:
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{statistics.mean(values):.3f} ± {spread:.3f}"

    print(f"| seeds {', '.join(map(str, given.seeds))} | code | prose |\n|---|---|---|")
    for model, name in MODELS.items():
        print(
            f"| {name} | "
            + " | ".join(cell([one[model][domain] for one in found]) for domain in ("code", "prose"))
            + " |"
        )
    gains = {d: [one["taught"][d] - one["baseline"][d] for one in found] for d in ("code", "prose")}
    print("| fused - continued | " + " | ".join(cell(gains[domain]) for domain in ("code", "prose")) + " |")
    return int(statistics.mean(gains["code"]) > -NEEDED or statistics.mean(gains["prose"]) > 0)


if __name__ == "__main__":
    sys.exit(main())
