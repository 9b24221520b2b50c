"""python launch/cluster/ray_train.py RECIPE PROCESSES [fusion run's options]     on a Ray cluster with ray[train]

Ray sets RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in each worker, which is all that fusion.run reads.
Not run by this repository's tests. RECIPE and --out have to be paths that all workers see.
"""

import sys

from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer

from fusion.run import main


def worker(settings: dict[str, list[str]]) -> None:
    """One rank."""
    status = main(settings["arguments"])
    if status:
        raise RuntimeError(f"fusion.run ended with {status}; its sentence is in the log of the rank that failed first")


if __name__ == "__main__":
    recipe, processes, *options = sys.argv[1:]
    scaling = ScalingConfig(num_workers=int(processes), use_gpu=True)
    TorchTrainer(worker, train_loop_config={"arguments": [recipe, *options]}, scaling_config=scaling).fit()
