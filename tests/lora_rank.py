"""One rank of tests/test_online_lora.py: trains a fresh adapter over `start` with online merging below it.

python -m tests.lora_rank KIND MODELS FOLDER        with RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT set
"""

import sys
from pathlib import Path

from safetensors.torch import save_file

from tests.processes import leave
from tests.test_online_lora import RATE, adapted, how, trained

ZERO = {
    "train_micro_batch_size_per_gpu": "auto",
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
    "zero_optimization": {"stage": 2},
}


def main() -> None:
    kind, models, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    changed = {"deepspeed": ZERO} if kind == "zero2" else {}
    changed |= {"learning_rate": RATE}
    run = adapted(models, folder, how(models, "ties", density=0.5), **changed)
    run.train()
    if run.args.process_index == 0:
        whole = {name: weight.contiguous().clone() for name, weight in trained(run).items()}
        save_file(whole, folder / "whole.safetensors")
    leave()


if __name__ == "__main__":
    main()
