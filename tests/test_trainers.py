"""Distillation as trained: the loss against brute force, accumulation, shifts that must fail, memory, kill, resume."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from alignment.vocab import VocabMap
from fusion import run
from fusion._keys import cache_directory
from fusion._training import _forget, packs
from fusion.data import documents, encode
from fusion.fuse.min_ce import min_ce
from fusion.job import resolve_model
from fusion.join import Join, Teacher
from fusion.losses._rows import Fold
from fusion.losses.forward_kl import forward_kl
from fusion.recipe import load
from fusion.sources import load_model, load_tokenizer
from fusion.targets import Store
from fusion.trainers import Objective, learn_in_forward
from fusion.windows import Collator, Windows, encode_to_disk

ROOT = Path(__file__).resolve().parents[1]
LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
LLAMA |= {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}
GPT2 = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 128}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SGD = {"optim": "sgd", "learning_rate": 1.0, "max_steps": 1, "max_grad_norm": 0.0, "logging_steps": 1}


def distill(out: str, **more: object) -> dict:
    return {"distill": {"out": out, "model": "student", "targets": ["hints"], "data": "text", "max_length": 96} | more}


def accumulate(steps: int) -> dict:
    return SGD | {"per_device_train_batch_size": 8 // steps, "gradient_accumulation_steps": steps}


RECIPE = {
    "models": {
        "teacher": {"config": LLAMA, "tokenizer": {"train": "bpe", "vocab_size": 400, "data": "text"}},
        "student": {"config": GPT2, "tokenizer": {"train": "unigram", "vocab_size": 500, "data": "text"}},
    },
    "data": {"text": {"path": str(ROOT / "recipes/data/austen.txt"), "max_bytes": 150, "split": "train[100:160]"}},
    "steps": [
        {"record": {"out": "hints", "teacher": "teacher", "data": "text", "draws": 8}},
        {"record": {"out": "whole", "teacher": "student", "data": "text", "top_k": 500}},
        *[distill(f"by_{n}", train=accumulate(n)) for n in (1, 4, 8)],
        distill("lm_only", lm_weight=1.0, train=accumulate(2)),
        {"tune": {"out": "clm", "model": "student", "data": "text", "max_length": 96, "train": accumulate(2)}},
    ],
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of RECIPE."""
    folder = tmp_path_factory.mktemp("trainers")
    (folder / "r.yaml").write_text(json.dumps(RECIPE))
    assert run.main([str(folder / "r.yaml"), "--out", str(folder / "runs")]) == 0
    return folder / "runs" / "r"


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def apart(a: Path, b: Path) -> float:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


def test_accumulation_changes_no_gradient(trained: Path) -> None:
    moved = apart(trained / "by_1", trained / "lm_only")
    assert moved > 1e-4  # a step that changes nothing would pass the rest
    assert apart(trained / "by_1", trained / "by_4") < 1e-6
    assert apart(trained / "by_1", trained / "by_8") < 1e-6


def test_the_language_model_loss_alone_is_plain_training(trained: Path) -> None:
    assert apart(trained / "lm_only", trained / "clm") < 1e-6
    logs = [json.loads((trained / name / "log.jsonl").read_text().splitlines()[0]) for name in ("lm_only", "clm")]
    assert math.isclose(logs[0]["loss"], logs[1]["loss"], rel_tol=1e-5)
    assert logs[0]["target_share"] > 0.2


class Bench:
    """Student, rows, and a join with one store, outside of any trainer."""

    def __init__(self, trained: Path, store: str, folder: Path, packed: bool = True):
        recipe = load(trained.parents[1] / "r.yaml")
        self.documents = list(documents(recipe.data["text"], recipe.base, recipe.data))
        self.directory = trained / "clm"
        self.tokenizer, self.model = load_tokenizer(self.directory), load_model(self.directory)
        self.model.config.use_cache = False
        self.store = Store.open(trained / store)
        self.map = VocabMap.first_piece(load_tokenizer(self.store.tokenizer), self.tokenizer)
        encode_to_disk(folder, self.tokenizer, self.documents)
        self.windows = Windows(folder, 96, packed)
        self.join = Join([Teacher(store, self.store, self.map)], min_ce, {})
        self.batch = Collator(self.windows, 0, self.join)([self.windows[i] for i in range(6)])
        fold = Fold.build(self.map.student_index)
        self.objective = Objective(partial(forward_kl), self.store.kind, fold, 0.3, True, 1.0, 64)

    def loss(self, batch: dict | None = None, **changed: object) -> tuple[torch.Tensor, torch.Tensor]:
        batch = self.batch if batch is None else batch
        vars(self.model).pop("forward", None)
        objective = Objective(**(vars(self.objective) | changed))
        learn_in_forward(self.model, objective)
        labels = int((batch["labels"][:, 1:] != -100).sum())
        counts = torch.tensor([labels, batch["target_at"].numel(), labels])
        return self.model(lesson=batch, counts=counts)


def test_the_loss_is_what_a_loop_over_documents_gives(trained: Path, tmp_path: Path) -> None:
    bench = Bench(trained, "hints", tmp_path)
    loss, sums = bench.loss()
    vars(bench.model).pop("forward")
    by_digest = {d.digest: d for d in bench.documents}
    ce, kd, labels, targets, total = 0.0, 0.0, 0, 0, 0.0
    for row in range(6):
        for piece in bench.windows[row]:
            document = by_digest[bench.windows.digests[piece.document]]
            mine, said = encode(bench.tokenizer, document), bench.store[document.digest]
            ids = torch.from_numpy(mine.ids[piece.start : piece.stop])
            with torch.no_grad():
                log_q = bench.model(ids[None]).logits[0].double().log_softmax(-1)
            theirs = {
                int(end): j
                for j, end in enumerate(said.ends)
                if end > 0 and said.ends[j] > (said.ends[j - 1] if j else 0)
            }
            for t in range(1, len(ids)):
                nll = -log_q[t - 1, ids[t]].item()
                ce, labels = ce + nll, labels + 1
                i = piece.start + t - 1  # the token before: its end is the boundary
                end = int(mine.ends[i])
                j = theirs.get(end) if i and mine.ends[i] > mine.ends[i - 1] else None
                entries = (
                    range(said.offsets[j + 1], said.offsets[j + 2]) if j is not None and j + 1 < len(said.ids) else []
                )
                if not len(entries):
                    total += nll
                    continue
                here = 0.0
                for e in range(said.offsets[j + 1], said.offsets[j + 2]):
                    bucket = bench.map.index[said.entry_ids[e]]
                    members = bench.map.student_index == bucket
                    here -= math.exp(said.entry_log_probs[e]) * log_q[t - 1, members].logsumexp(0).item()
                kd, targets = kd + here, targets + 1
                total += 0.3 * nll + 0.7 * here
    assert targets > 100
    assert sums.tolist() == pytest.approx([ce, kd, labels, targets], rel=1e-5)
    assert loss.item() == pytest.approx(total / labels, rel=1e-5)


def test_a_student_that_agrees_with_its_teacher_has_nothing_to_learn_until_rows_are_shifted(
    trained: Path, tmp_path: Path
) -> None:
    bench = Bench(trained, "whole", tmp_path)
    bench.directory = trained / "whole"
    recipe = load(trained.parents[1] / "r.yaml")

    bench.model = load_model(resolve_model(recipe, "student", cache_directory()))
    bench.model.config.use_cache = False
    _, sums = bench.loss()
    assert sums[1] / sums[3] < 2e-3  # quantised log-probabilities, nothing else
    shifted = bench.batch | {"target_at": (bench.batch["target_at"] + 1).clamp(max=bench.batch["labels"].numel() - 1)}
    _, late = bench.loss(shifted)
    assert late[1] / late[3] > 10 * sums[1] / sums[3]


def test_both_ways_to_take_gradients_agree(trained: Path, tmp_path: Path) -> None:
    bench = Bench(trained, "hints", tmp_path)
    found = []
    for eager in (False, True):
        bench.model.zero_grad()
        bench.loss(eager=eager)[0].backward()
        found.append({n: p.grad.clone() for n, p in bench.model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-7)


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(one, torch.Tensor):
                self.numel = max(self.numel, one.numel())
        return out


@pytest.mark.parametrize("eager", [False, True])
def test_no_tensor_of_all_logits_is_ever_made(trained: Path, tmp_path: Path, eager: bool) -> None:
    bench = Bench(trained, "hints", tmp_path)
    positions, vocabulary = bench.batch["labels"].numel(), bench.model.config.vocab_size
    with Largest() as seen:
        bench.loss(eager=eager)[0].backward()
    assert seen.numel < positions * vocabulary
    assert seen.numel <= max(64 * vocabulary, positions * 4 * 32 * 4)
    with Largest() as plain:
        vars(bench.model).pop("forward", None)
        bench.model(bench.batch["input_ids"], labels=bench.batch["labels"]).loss.backward()
    assert plain.numel >= positions * vocabulary  # the hook sees what plain training makes


def test_rows_with_one_document_give_the_same_loss_as_packed_rows(trained: Path, tmp_path: Path) -> None:
    assert packs(trained / "clm") is None
    packed, alone = Bench(trained, "hints", tmp_path / "a"), Bench(trained, "hints", tmp_path / "b", packed=False)
    everything = [
        Collator(b.windows, 0, b.join)([b.windows[i] for i in range(len(b.windows))]) for b in (packed, alone)
    ]
    losses = [b.loss(batch)[1] for b, batch in zip((packed, alone), everything, strict=True)]
    assert losses[0].tolist() == pytest.approx(losses[1].tolist(), rel=1e-5)


def test_kill_and_the_same_command_give_the_same_model(trained: Path, tmp_path: Path) -> None:
    train = {"max_steps": 12, "per_device_train_batch_size": 2, "save_steps": 4, "logging_steps": 1}
    recipe = RECIPE | {"steps": [RECIPE["steps"][0], distill("taught", train=train)]}
    (tmp_path / "r.yaml").write_text(json.dumps(recipe))
    call = [sys.executable, "-m", "fusion.run", str(tmp_path / "r.yaml"), "--out"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([*call, str(tmp_path / "straight")], env=environment, check=True, capture_output=True)
    broken = tmp_path / "broken"
    process = subprocess.Popen(
        [*call, str(broken)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    until = time.monotonic() + 120
    while not list(broken.glob("r/taught-*.partial/checkpoints/checkpoint-4/saved-*")):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (broken / "r" / "taught").exists()
    subprocess.run([*call, str(broken)], env=environment, check=True, capture_output=True)
    assert apart(tmp_path / "straight" / "r" / "taught", broken / "r" / "taught") == 0.0
    logs = [
        [json.loads(line) for line in (folder / "r/taught/log.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "straight", broken)
    ]
    assert [line["loss"] for line in logs[0]] == [line["loss"] for line in logs[1]]


def test_a_log_line_that_a_kill_cut_off_is_dropped(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 4}\n{"step": 5}\n{"step": 6, "lo')
    _forget(log, 4, rank=0)
    assert log.read_text() == '{"step": 4}\n'


def test_adapters_join_the_weights_and_sft_trains(tmp_path: Path) -> None:
    train = {"max_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1}
    peft = {"r": 2, "target_modules": ["c_attn"]}
    sft = {"out": "sft", "model": "student", "data": "text", "algorithm": "sft", "max_length": 128, "train": train}
    start = {
        "tune": {
            "out": "start",
            "model": "student",
            "data": "text",
            "max_length": 96,
            "train": train | {"learning_rate": 0.0},
        }
    }
    steps = [RECIPE["steps"][0], start, distill("adapted", peft=peft, train=train), {"tune": sft}]
    (tmp_path / "r.yaml").write_text(json.dumps(RECIPE | {"steps": steps}))
    assert run.main([str(tmp_path / "r.yaml"), "--out", str(tmp_path / "runs")]) == 0
    runs = tmp_path / "runs" / "r"
    before, after = weights(runs / "start"), weights(runs / "adapted")
    assert before.keys() == after.keys()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all("c_attn.weight" in name for name in moved)
    assert apart(runs / "start", runs / "sft") > 1e-4
    assert load_model(runs / "adapted").config.use_cache and load_model(runs / "sft").config.use_cache
