"""A distill step against a plain language-model step of the same shape: time and peak memory.

    python tests/bench/distill.py            exits 1 when a step costs more than 1.2 times a plain one

SmolLM2-135M's shape with random weights, 49,152 tokens of vocabulary; targets are 16 draws a token, recorded by a model
of another tokenizer. Forward and backward (a distill step with its collation) of the same row in turns in one process;
the optimizer, the same for both, is left out. CPU time, which neighbours on the machine disturb less than wall time,
decides. Memory is the peak of a process of its own for one step of four rows.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

LIMIT = 1.2
CHUNK = 256
sys.path.insert(0, str(Path(__file__).parents[2]))
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
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


def recipe(layers: int, vocabulary: int) -> dict:
    wide = {"config": SHAPE | {"num_hidden_layers": layers, "vocab_size": vocabulary}}
    return {
        "models": {
            "student": wide | {"tokenizer": {"train": "bpe", "vocab_size": 4096, "data": "text"}},
            "teacher": {"config": SMALL, "tokenizer": {"train": "unigram", "vocab_size": 2048, "data": "text"}},
        },
        "data": {"text": {"path": "stdlib:", "max_bytes": 1500, "shuffle": 0, "split": "train[:40]"}},
        "steps": [{"record": {"out": "hints", "teacher": "teacher", "data": "text", "draws": 16}}],
    }


class Steps:
    """Both steps on one model and the same rows."""

    def __init__(self, folder: Path):
        from alignment.vocab import VocabMap
        from fusion._keys import cache_directory
        from fusion.data import documents
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

        recipe = load(folder / "bench.yaml")
        student = resolve_model(recipe, "student", cache_directory())
        tokenizer, self.model = load_tokenizer(student), load_model(student)
        self.model.config.use_cache = False
        self.model.train()
        encode_to_disk(folder, tokenizer, documents(recipe.data["text"], recipe.base, recipe.data))
        store, width = Store.open(folder / "runs/bench/hints"), self.model.config.vocab_size
        map_ = VocabMap.first_piece(load_tokenizer(store.tokenizer), tokenizer, student_size=width)
        objective = Objective(
            partial(forward_kl), store.kind, Fold.build(map_.student_index), 0.5, True, 1.0, CHUNK, True
        )
        learn_in_forward(self.model, objective)
        self.windows = Windows(folder, 512, True)
        self.plain = Collator(self.windows, 0)
        self.taught = Collator(self.windows, 0, Join([Teacher("hints", store, map_)], min_ce, {}))

    def step(self, kind: str, rows: int) -> tuple[float, float]:
        """CPU and wall seconds."""
        import torch

        cpu, wall = time.process_time(), time.perf_counter()
        if kind == "plain":
            batch = self.plain(self.windows.rows[:rows])
            loss = self.model(**batch, num_items_in_batch=(batch["labels"] != -100).sum()).loss
        else:
            batch = self.taught(self.windows.rows[:rows])
            labels = int((batch["labels"][:, 1:] != -100).sum())
            loss, _ = self.model(lesson=batch, counts=torch.tensor([labels, len(batch["target_at"]), labels]))
        loss.backward()
        return time.process_time() - cpu, time.perf_counter() - wall


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--memory-of", choices=("plain", "taught"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory_of:
        Steps(given.folder).step(given.memory_of, rows=4)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "bench.yaml").write_text(json.dumps(recipe(given.layers, given.vocabulary)))
        call = [sys.executable, "-m", "fusion.run", str(folder / "bench.yaml"), "--out", str(folder / "runs")]
        subprocess.run(call, env=ENVIRONMENT, check=True, capture_output=True)
        peak = {}
        for kind in ("plain", "taught"):
            call = [sys.executable, __file__, "--memory-of", kind, "--folder", name]
            out = subprocess.run(call, env=ENVIRONMENT, check=True, capture_output=True, text=True)
            peak[kind] = int(out.stdout.split()[-1])
        steps = Steps(folder)
        steps.step("plain", 1), steps.step("taught", 1)  # the first of each also allocates
        pairs = []
        for turn in range(given.pairs):
            order = ("plain", "taught") if turn % 2 else ("taught", "plain")
            found = {kind: steps.step(kind, 1) for kind in order}
            pairs.append([found["taught"][i] / found["plain"][i] for i in (0, 1)])
            print(f"pair {turn}: CPU {pairs[-1][0]:.3f}, wall {pairs[-1][1]:.3f}", flush=True)
    cpu, wall = (statistics.median(column) for column in zip(*pairs, strict=True))
    chunk = CHUNK * given.vocabulary * 4
    print(f"| distill step / plain step, CPU time (wall {wall:.3f}) | {cpu:.3f} | at most {LIMIT} |")
    more = (peak["taught"] - peak["plain"]) / 2**20
    print(
        f"| peak memory over plain, four rows of 512 | {more:+.0f} MiB | at most {chunk / 2**20:+.0f} MiB, one chunk |"
    )
    return int(cpu > LIMIT or more > chunk / 2**20)


if __name__ == "__main__":
    sys.exit(main())
