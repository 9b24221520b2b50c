"""One rank of tests/test_online_groups.py: trains a small network by the Trainer, as a group of its own.

python groups_rank.py FOLDER STEPS EVERY METHOD RESUME        with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set
"""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from fusion.online import MergeGroupsCallback
from tests.processes import leave
from tests.test_online_callback import Weights, trainer


def main() -> None:
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    steps, every, method, resume = int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
    base, params = (None, {}) if method == "linear" else (folder / "start", {"density": 0.5})
    callback, weights = MergeGroupsCallback(2, every, method, base, params=params), Weights()
    changed = {"optim": "adamw_torch", "adam_epsilon": 1e-3, "average_tokens_across_devices": False}
    changed |= {"max_steps": steps, "ddp_backend": "gloo", "weight_decay": 0.1, "max_grad_norm": 0.5}
    changed |= {"save_strategy": "steps", "save_steps": 4, "save_total_limit": None}
    run = trainer(folder / "start", folder / "checkpoints", callback, weights, **changed)
    callback.trainer = run
    seen, collate = [], run.data_collator

    def noted(rows: list) -> dict:
        batch = collate(rows)
        seen.append(batch["input_ids"])
        return batch

    run.data_collator = noted
    run.train(resume_from_checkpoint=str(folder / "checkpoints" / f"checkpoint-{resume}") if resume != "0" else None)
    found = {f"{step}/{name}": w for step, one in enumerate(weights.seen) for name, w in one.items()}
    save_file(found | {"seen": torch.stack(seen)}, folder / f"{method}-{resume}-{rank}.safetensors")
    leave()


if __name__ == "__main__":
    main()
