"""Numbers of mergekit 0.1.5, fusion-bench 0.2.33 and PEFT 0.21.2, and the parameters that reproduce them here."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fusion.merge import merge_state_dicts

GOLDEN = Path(__file__).parent / "golden"
WEIGHTS = [0.5, 0.3, 0.2]
FUSION_BENCH = {"density": 0.2, "scale": 0.3, "elect": "unweighted", "scope": "model", "count": "plus_one"}
PEFT = {"density": 0.5, "normalize": False}
# case -> word, parameters, and the models it is given (B: the base as one of them), with or without the base
CASES = {
    "linear_normalized": ("linear", {"weights": WEIGHTS}, "012"),
    "linear_raw": ("linear", {"weights": WEIGHTS, "normalize": False}, "012"),
    "task_arithmetic": ("task_arithmetic", {"weights": WEIGHTS, "scale": 0.7}, "012+base"),
    "ties": ("ties", {"weights": WEIGHTS, "density": [0.5, 0.5, 0.5], "scale": 0.7}, "012+base"),
    "ties_sum": ("ties", {"weights": WEIGHTS, "density": 0.5, "combine": "sum"}, "012+base"),
    "breadcrumbs": ("breadcrumbs", {"weights": WEIGHTS, "density": 0.8, "gamma": 0.05, "scale": 0.7}, "012+base"),
    "breadcrumbs_ties": (
        "breadcrumbs",
        {"weights": WEIGHTS, "density": 0.8, "gamma": 0.05, "scale": 0.7, "consensus": "ties"},
        "012+base",
    ),
    "sce": ("sce", {"select_topk": 0.5, "variant": "mergekit"}, "012+base"),
    "model_stock": ("model_stock", {}, "012+base"),
    "slerp": ("slerp", {"t": 0.3}, "B0"),
    "nuslerp": ("nuslerp", {"weights": [0.5, 0.3]}, "01"),
    "nuslerp_base": ("nuslerp", {"weights": [0.5, 0.3]}, "01+base"),
    "multislerp": ("multislerp", {"weights": WEIGHTS}, "012"),
    "karcher": ("karcher", {}, "012"),
    "ram": ("ram", {}, "012+base"),
    "nearswap": ("nearswap", {"t": 0.01}, "B0"),
    "iso_c": ("iso_c", {"scale": 1.0}, "012+base"),
    "iso_cts": ("iso_cts", {"scale": 1.0, "common_fraction": 0.8}, "012+base"),
    "tsv_m": ("tsv_m", {"scale": 1.0}, "012+base"),
    "ties_global_sum": ("ties", {**FUSION_BENCH, "combine": "sum"}, "012+base"),
    "ties_global_mean": ("ties", FUSION_BENCH, "012+base"),
    "emr_unified": ("emr", {}, "012+base"),
    "regmean": ("regmean", {"off_diagonal": 0.9}, "012"),
    "fisher": ("fisher", {"weights": WEIGHTS, "normalize": True, "floor": 1e-6}, "012"),
    "peft_ties_total": ("ties", {**PEFT, "weights": WEIGHTS, "elect": "unweighted"}, "012+base"),
    "peft_ties_frequency": ("ties", {**PEFT, "weights": WEIGHTS, "elect": "count"}, "012+base"),
    "magnitude_prune": ("breadcrumbs", {"weights": WEIGHTS, "density": 0.5, "gamma": 0.0}, "012+base"),
}
VECTORS = {"emr_unified"}  # the file has the task vector, without the base
DECOMPOSED = {"iso_c", "iso_cts", "tsv_m"}
FILES = {name: load_file(GOLDEN / f"{name}.safetensors") for name in ("merge_mergekit", "merge_others")}


def under(prefix: str) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for file in FILES.values()
        for name, tensor in file.items()
        if name.startswith(prefix)
    }


def test_no_case_is_left_out():
    listed = [case["id"] for name in FILES for case in json.loads((GOLDEN / f"{name}.json").read_text())["cases"]]
    assert sorted(listed) == sorted(CASES)


@pytest.mark.parametrize("case", CASES)
def test_peers_numbers(case):
    word, params, given = CASES[case]
    want = under(f"out/{case}/")
    models = [under("base/") if m == "B" else under(f"model{m}/") for m in given.removesuffix("+base")]
    base = under("base/") if given.endswith("+base") else None
    inputs = {"regmean": "gram", "fisher": "fisher"}.get(word)
    if inputs is not None:
        params = {**params, "inputs": {inputs: [under(f"{inputs}/model{m}/") for m in given]}}
    merged = merge_state_dicts(word, models, base=base, **params)
    atol = 1e-4 if case in DECOMPOSED else 1e-5
    assert set(want) <= set(merged)
    for name, tensor in want.items():
        tensor = tensor + base[name] if case in VECTORS else tensor
        off = float((merged[name] - tensor).abs().max())
        assert off <= atol, f"{name} is {off} off"


def test_the_page_says_how_to_get_every_number_and_names_tests_that_are_there():
    here = Path(__file__).parent
    page = (here.parent / "docs" / "methods.md").read_text(encoding="utf-8").partition("## To reproduce a peer")[2]
    more = [case["id"] for case in json.loads((GOLDEN / "merge_more.json").read_text())["cases"]]
    said = set(re.findall(r"\w+", page))
    assert [case for case in (*CASES, *more) if case not in said] == []
    tests = "".join(file.read_text(encoding="utf-8") for file in here.rglob("test_*.py"))
    named = {one for one in said if one.startswith("test_")} - {file.stem for file in here.rglob("test_*.py")}
    assert [one for one in sorted(named) if f"def {one}(" not in tests] == []
