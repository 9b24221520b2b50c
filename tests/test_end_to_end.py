"""Two teachers with different skills make one student that has both (E1): real trainings, as small as they get."""

import itertools
import json
import random
from pathlib import Path

from fusion import run

GPT2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 32}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
LESSON = 20  # documents of each skill that the student sees


def skills() -> dict[str, list[str]]:
    """Strings to copy and to reverse: `c:bdfa=bdfa`, `r:bdfa=afdb`."""
    strings = ["".join(letters) for letters in itertools.product("abcdefgh", repeat=3)]
    random.Random(0).shuffle(strings)
    return {"copy": [f"c:{s}={s}" for s in strings], "reverse": [f"r:{s}={s[::-1]}" for s in strings]}


def recipe(folder: Path) -> dict:
    data: dict[str, dict] = {}
    for name, documents in skills().items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": one}) + "\n" for one in documents))
        whole = {"path": f"{name}.jsonl"}
        data[name] = whole | {"split": "train[:400]"}
        data[f"{name}_lesson"] = whole | {"split": f"train[400:{400 + LESSON}]"}
        data[f"{name}_new"] = whole | {"split": "train[450:512]"}
    data["lesson"] = {"mix": {"copy_lesson": 0.5, "reverse_lesson": 0.5}}
    data["union"] = {"mix": {"copy_new": 0.5, "reverse_new": 0.5}}
    train = {"per_device_train_batch_size": 8, "learning_rate": 3e-3, "warmup_steps": 10, "save_strategy": "no"}
    long, short = train | {"max_steps": 200}, train | {"max_steps": 100}
    bytes_, bpe = {"train": "bytes"}, {"train": "bpe", "vocab_size": 280, "data": "copy"}
    return {
        "models": {
            "a": {"config": GPT2, "tokenizer": bpe},  # another tokenizer: pairs of letters
            "b": {"config": GPT2, "tokenizer": bytes_},
            "pupil": {"config": GPT2, "tokenizer": bytes_},
        },
        "data": data,
        "steps": [
            {"tune": {"out": "copier", "model": "a", "data": "copy", "max_length": 128, "train": long}},
            {"tune": {"out": "reverser", "model": "b", "data": "reverse", "max_length": 128, "train": long}},
            {"record": {"out": "copier_says", "teacher": "copier", "data": "lesson", "draws": 32}},
            {"record": {"out": "reverser_says", "teacher": "reverser", "data": "lesson", "draws": 32}},
            {
                "distill": {"out": "fused", "model": "pupil", "targets": ["copier_says", "reverser_says"]}
                | {"data": "lesson", "fuse": "min_ce", "lm_weight": 0.1, "max_length": 128, "train": short}
            },
            {"tune": {"out": "alone", "model": "pupil", "data": "lesson", "max_length": 128, "train": short}},
            {
                "evaluate": {"out": "scores", "models": ["copier", "reverser", "fused", "alone"]}
                | {"metrics": ["bits_per_byte"], "data": "union"}
            },
        ],
    }


def test_the_student_of_two_teachers_beats_each_and_beats_itself_without_them(tmp_path: Path) -> None:
    (tmp_path / "skills.yaml").write_text(json.dumps(recipe(tmp_path)))
    assert run.main([str(tmp_path / "skills.yaml"), "--out", str(tmp_path / "runs")]) == 0
    found = json.loads((tmp_path / "runs/skills/scores/metrics.json").read_text())["models"]
    bits = {name: entry["bits_per_byte"]["union"]["bits_per_byte"] for name, entry in found.items()}
    print(bits)
    assert bits["fused"] < min(bits["copier"], bits["reverser"])
    assert bits["fused"] < bits["alone"] - 0.05
