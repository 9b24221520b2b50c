"""What online merging holds, in bytes a parameter: kept between steps, and the peak of a step above what lay there.

Bytes are those that torch's allocator hands out on the CPU, as its profiler records them. A Llama of 30.3 million
parameters and SGD, whose own step takes none; in one process, and with --zero3 under ZeRO-3 (one rank, sub-groups of a
million elements or one tensor).

    python -m tests.bench.online_memory [--zero3]
"""

import argparse
import gc
import os
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from fusion.online import OnlineMerge
from tests.bench.online import SHAPE
from tests.processes import free_port

SUB_GROUP = 1_000_000
ARMS: dict[str, dict[str, Any] | None] = {
    "bare": None,
    "OnDARE": {"method": "dare", "density": 0.5},
    "OnTIES": {"method": "ties", "density": 0.01},
    "OnDARE, code": {"method": "dare", "density": 0.01, "semantics": "code"},
}


def allocated(work: Callable[[], object]) -> tuple[int, int]:
    """Bytes that work leaves behind, and the most that it had at once."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = work()  # what it returns lives until the profile ends
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    del kept
    return now, most


def zero3(model: torch.nn.Module) -> Any:
    """DeepSpeed's engine over the model."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, "sub_group_size": SUB_GROUP},
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def arm(settings: dict[str, Any] | None, sharded: bool) -> tuple[int, int, int]:
    """Parameters, bytes kept by attaching, and the most in the first step, in which a window begins."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False))
    size = sum(p.numel() for p in model.parameters())
    g = torch.Generator().manual_seed(1)
    vectors = {n: (torch.randn(p.shape, generator=g) * 1e-3).bfloat16() for n, p in model.named_parameters()}
    engine = zero3(model) if sharded else model
    optimizer = engine.optimizer.optimizer if sharded else torch.optim.SGD(model.parameters(), lr=1e-3)
    held = 0
    if settings is not None:
        merge = OnlineMerge(alpha=1e-6, **settings)
        copied = Copied(vectors)
        held = allocated(lambda: merge.attach(optimizer, model.named_parameters(), copied))[0]
    ids = torch.randint(SHAPE["vocab_size"], (1, 16), generator=torch.Generator().manual_seed(2))
    loss = engine(input_ids=ids, labels=ids).loss
    engine.backward(loss) if sharded else loss.backward()
    return size, held, allocated(engine.step if sharded else optimizer.step)[1]


class Copied(dict[str, torch.Tensor]):
    """Task vectors as a callback reads them: new memory for each."""

    def __getitem__(self, name: str) -> torch.Tensor:
        return super().__getitem__(name).clone()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--zero3", action="store_true")
    given = parser.parse_args()
    if given.zero3:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ |= {"MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu"}
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", verbose=False)
    print("| optimizer | kept | peak of a step |")
    print("|---|---|---|")
    for name, settings in ARMS.items():
        size, held, peak = arm(settings, given.zero3)
        print(f"| {name} | {held / size:.2f} | {peak / size:.2f} |")
    print(f"bytes a parameter, {size / 1e6:.1f} M parameters")


if __name__ == "__main__":
    main()
