"""The alignment tax of DPO with AdamW, OnDARE and OnTIES at equal reward: a table of docs/online_merging.md.

    OMP_NUM_THREADS=1 python tests/bench/tax.py [--seeds 0 1 2] [--out DIR] [--tune]     a stopped run goes on

A network from scratch reads English prose and German (base, one for all seeds), is fine-tuned to go on with English
texts (reference), then preferred to go on in German by DPO, at several learning rates. The tax is what the reference
knew and the tuned network no longer does: bits per byte of English held out, BLiMP. Reward is DPO's own on pairs held
out, from bits per byte: the prompts cancel out. Between learning rates tax and reward are interpolated, so all arms
are read off at the same rewards.
SMALL arms have a tenth of alpha, or none, at one learning rate; they stand beside AdamW at their own reward. --tune:
OTHERS too.
"""

import argparse
import difflib
import json
import math
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from scipy.interpolate import PchipInterpolator

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
BETA = 0.1
STEPS = 30
PROSE = {"path": str(ROOT / "recipes/data/austen.txt"), "max_bytes": 600, "shuffle": 0}
TRAIN = {"lr_scheduler_type": "cosine", "warmup_steps": 10, "logging_steps": 5, "save_strategy": "no"}
TRAIN |= {"gradient_checkpointing": False, "per_device_train_batch_size": 16}
Arm = tuple[dict[str, Any] | None, tuple[float, ...]]
# What merges, and learning rates, larger where a density leaves out a part of each update that nothing makes up for.
ARMS: dict[str, Arm] = {
    "adamw": (None, (5e-5, 2e-4)),
    "ondare": ({"method": "dare", "alpha": 1e-3, "density": 0.5}, (1e-4, 4e-4)),
    "onties": ({"method": "ties", "alpha": 1e-3, "density": 0.2}, (1e-4, 4e-4)),
}
SMALL: dict[str, Arm] = {
    "ondare_alpha-4": ({"method": "dare", "alpha": 1e-4, "density": 0.5}, (3.8e-4,)),
    "onties_alpha-4": ({"method": "ties", "alpha": 1e-4, "density": 0.2}, (3.5e-4,)),
    "trimmed": ({"method": "ties", "alpha": 0.0, "density": 0.2}, (3.5e-4,)),
}
OTHERS: dict[str, Arm] = {
    "ondare_tenth": ({"method": "dare", "alpha": 1e-4, "density": 0.1}, (1.9e-3,)),
    "onties_code": ({"method": "ties", "alpha": 1e-4, "density": 0.2, "semantics": "code"}, (3.5e-4,)),
}
TAXES = ("prose", "manual", "blimp")


def pairs() -> list[dict[str, str]]:
    """Paragraphs of the Debian Reference in both languages, in the book's order, each with the English one before it
    as prompt; between paragraphs that are equal in both books, as many in one as in the other belong together."""
    english, german = (
        [
            " ".join(part.split())
            for part in (SHARED / f"text/debian-reference.{language}.txt").read_text().split("\n\n")
        ]
        for language in ("en", "de")
    )
    found = []
    for what, i, until, j, end in difflib.SequenceMatcher(None, english, german, autojunk=False).get_opcodes():
        if what != "replace" or until - i != end - j:
            continue
        for k in range(until - i):
            before, one, other = english[i + k - 1], english[i + k], german[j + k]
            if min(len(one), len(other)) >= 60 and 0.6 < len(other) / len(one) < 1.8:
                found.append({"prompt": f"{cut(before, 80)}\n", "chosen": cut(other, 200), "rejected": cut(one, 200)})
    return found


def cut(text: str, size: int) -> str:
    """The words that fit into so many characters."""
    return text if len(text) <= size else text[:size].rpartition(" ")[0]


def prepare(folder: Path) -> None:
    """The data: disjoint parts of the manual for base and reference, for preferences, and held out."""
    folder.mkdir(parents=True, exist_ok=True)
    found = pairs()
    first, last = len(found) // 2, len(found) * 7 // 8
    held = found[last:]
    random.Random(0).shuffle(held)
    parts: dict[str, list[dict[str, str]]] = {
        "german": [{"text": row["chosen"]} for row in found[:first]],
        "answers": [{"text": row["prompt"] + row["rejected"]} for row in found[:first]],
        "prefs": found[first:last],
        "chosen": [{"text": row["prompt"] + row["chosen"]} for row in held[:96]],
        "rejected": [{"text": row["prompt"] + row["rejected"]} for row in held[:96]],
        "manual": [{"text": row["rejected"]} for row in held[96:]],
    }
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def reading() -> dict[str, Any]:
    """The base: a network from scratch on prose and German, the same for all seeds."""
    sizes = {"hidden_size": 160, "intermediate_size": 448, "num_hidden_layers": 4, "max_position_embeddings": 256}
    config = {"model_type": "llama", **sizes, "num_attention_heads": 5, "num_key_value_heads": 5}
    new = {"config": config | {"tie_word_embeddings": True}}
    new["tokenizer"] = {"train": "bpe", "vocab_size": 2048, "data": "read"}
    data = {"german": texts("german"), "english": {**PROSE, "split": "train[:-120]"}}
    data["read"] = {"mix": {"english": 0.7, "german": 0.3}}
    train = TRAIN | {"max_steps": 500, "learning_rate": 3e-3, "warmup_steps": 30}
    step = {"tune": {"out": "base", "model": "new", "data": "read", "max_length": 128, "train": train}}
    return {"seed": 0, "models": {"new": new}, "data": data, "steps": [step], "result": "base"}


def recipe(seed: int, base: Path, arms: Mapping[str, Arm]) -> dict[str, Any]:
    """Reference, every arm at every learning rate, each measured on its own, so that arms may be added."""
    train = TRAIN | {"max_steps": 100, "learning_rate": 1e-3}
    follow = {"out": "reference", "model": "base", "data": "answers", "max_length": 128, "train": train}
    steps: list[dict[str, Any]] = [{"tune": follow}]
    names = ["base", "reference"]
    for arm, (merging, rates) in arms.items():
        for rate in rates:
            names.append(f"{arm}_{rate:.0e}")
            tuned = {"out": names[-1], "model": "reference", "data": "prefs", "algorithm": "dpo", "max_length": 192}
            tuned["train"] = TRAIN | {"max_steps": STEPS, "learning_rate": rate, "beta": BETA}
            tuned["train"] |= {"per_device_train_batch_size": 8}
            steps.append({"tune": tuned | ({"online_merge": {"base": "base", **merging}} if merging else {})})
    metrics = ["bits_per_byte", {"blimp": {"path": str(SHARED / "blimp"), "limit": 50}}]
    read = ["prose", "manual", "chosen", "rejected"]
    steps += [{"evaluate": {"out": f"of_{name}", "models": name, "metrics": metrics, "data": read}} for name in names]
    data: dict[str, Any] = {name: texts(name) for name in ("answers", "manual", "chosen", "rejected")}
    data |= {"prefs": {**texts("prefs"), "column": "*"}, "prose": {**PROSE, "split": "train[-120:]"}}
    return {"seed": seed, "models": {"base": {"path": str(base)}}, "data": data, "steps": steps, "result": names[2]}


def texts(name: str) -> dict[str, str]:
    """The data entry of a file that `prepare` wrote."""
    return {"path": f"../{name}.jsonl", "format": "json", "column": "text"}


def fusion(folder: Path, content: Mapping[str, Any]) -> Path:
    """Runs a recipe in its folder; the directory of its outputs."""
    folder.mkdir(exist_ok=True)
    file = folder / "tax.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    call = [sys.executable, "-m", "fusion.run", str(file), "--out", str(folder / "runs")]
    subprocess.run(call, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    return folder / "runs/tax"


def run(seed: int, out: Path, arms: Mapping[str, Arm]) -> dict[str, dict[str, float]]:
    """What was measured of base, reference and each arm at each learning rate."""
    prepare(out)
    base = (fusion(out / "base", reading()) / "base").resolve()
    made = fusion(out / f"seed{seed}", recipe(seed, base, arms))
    found = {}
    for measured in made.glob("of_*"):
        if measured.is_symlink():
            ((name, metrics),) = json.loads((measured / "metrics.json").read_text())["models"].items()
            bits = metrics["bits_per_byte"]
            found[name] = {domain: bits[domain]["bits_per_byte"] for domain in ("prose", "manual")}
            found[name]["blimp"] = 100 * metrics["blimp"]["accuracy"]
            nats = {domain: bits[domain]["bits_per_byte"] * bits[domain]["bytes"] * math.log(2) for domain in bits}
            found[name]["order"] = BETA * (nats["rejected"] - nats["chosen"]) / bits["chosen"]["documents"]
    for measures in found.values():
        measures["reward"] = measures["order"] - found["reference"]["order"]
    return found


def curve(found: Mapping[str, Mapping[str, float]], arm: str, tax: str) -> list[tuple[float, float]]:
    """(reward, tax) of one arm at rising rewards, from the reference, where both are 0."""
    names = ["reference", *(name for name in found if name.rpartition("_")[0] == arm)]
    return sorted(point(found, name, tax) for name in names)


def point(found: Mapping[str, Mapping[str, float]], name: str, tax: str) -> tuple[float, float]:
    """(reward, tax) of one model: bits per byte more, or points of BLiMP less, than the reference."""
    sign = -1 if tax == "blimp" else 1
    return found[name]["reward"], sign * (found[name][tax] - found["reference"][tax])


def at(points: Sequence[tuple[float, float]], reward: float) -> float:
    """The tax at a reward, on the monotone curve through what was measured; NaN beyond it."""
    return float(PchipInterpolator(*zip(*points, strict=True), extrapolate=False)(reward))


def show(seeds: Sequence[dict[str, dict[str, float]]]) -> None:
    """All that was measured, then the tax of each arm at shares of the highest reward that all arms reach,
    and in brackets less AdamW's of the same seed."""
    for number, found in enumerate(seeds):
        print(f"\n{number}: model, reward, prose, manual, blimp; taxes less AdamW's at the same reward")
        for name, one in sorted(found.items()):
            taxes = [against(found, name, tax) for tax in TAXES]
            told = " ".join(f"{one[tax]:8.4f}" for tax in ("reward", *TAXES))
            print(f"  {name:20} {told}   {' '.join(f'{tax:+8.4f}' for tax in taxes)}")
    tops = [min(curve(found, arm, "prose")[-1][0] for arm in ARMS) for found in seeds]
    print(f"\nhighest reward that all arms reach: {', '.join(f'{top:.2f}' for top in tops)}")
    print("| share of it | arm | " + " | ".join(TAXES) + " |\n|---|---|" + "---|" * len(TAXES))
    for share in (0.5, 0.75, 1.0):
        taxes = {
            (arm, tax): [at(curve(found, arm, tax), share * top) for found, top in zip(seeds, tops, strict=True)]
            for arm in ARMS
            for tax in TAXES
        }
        for arm in ARMS:
            cells = [spread(taxes[arm, tax]) for tax in TAXES]
            if arm != "adamw":
                both = (zip(taxes[arm, tax], taxes["adamw", tax], strict=True) for tax in TAXES)
                less = [spread([ours - plain for ours, plain in pair]) for pair in both]
                cells = [f"{cell} ({gap})" for cell, gap in zip(cells, less, strict=True)]
            print(f"| {share:.2f} | {arm} | " + " | ".join(cells) + " |")
    for arm, (_, (rate,)) in SMALL.items():
        gaps = [spread([against(found, f"{arm}_{rate:.0e}", tax) for found in seeds]) for tax in TAXES]
        print(f"{arm} less AdamW at its own reward: " + ", ".join(gaps))


def against(found: Mapping[str, Mapping[str, float]], name: str, tax: str) -> float:
    """The tax of a model less AdamW's at the same reward; NaN where AdamW does not reach that."""
    reward, paid = point(found, name, tax)
    return paid - at(curve(found, "adamw", tax), reward)


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    return f"{statistics.mean(values):+.3f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/bench-tax"))
    parser.add_argument("--tune", action="store_true", help="another density and the code's semantics too")
    given = parser.parse_args()
    arms = ARMS | SMALL | (OTHERS if given.tune else {})
    show([run(seed, given.out.resolve(), arms) for seed in given.seeds])


if __name__ == "__main__":
    main()
