"""CPU time of a training step with online merging at K = 1, over the same step with the bare optimizer.

A Llama of 30 million parameters, AdamW, 8 sequences of 256 tokens, forward, backward and step. The bare optimizer,
OnDARE and OnTIES each train a copy of the same network; they take turns within each round, in an order that rotates,
and a ratio is the median over the rounds, since a machine's speed drifts more than they differ. Exits with 1 above
1.15 (OnDARE) or 1.3 (OnTIES). On a shared machine use CPU time, not the clock's.

    python -m tests.bench.online [--rounds 5] [--threads 1] [--batch 8] [--length 256] [--density 0.01] [--profile]
"""

import argparse
import cProfile
import pstats
import statistics
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fusion.online import OnlineMerge

MOST = {"dare": 1.15, "ties": 1.3}
SHAPE = {"vocab_size": 16384, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 10}
SHAPE |= {"num_attention_heads": 6, "num_key_value_heads": 6, "max_position_embeddings": 256}


class Arm:
    """A network, its optimizer and the CPU and clock seconds of its steps."""

    def __init__(self, name: str, density: float):
        torch.manual_seed(0)
        self.name = name
        self.model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        if name != "bare":
            g = torch.Generator().manual_seed(1)
            vectors = {
                n: (torch.randn(p.shape, generator=g) * 1e-3).bfloat16() for n, p in self.model.named_parameters()
            }
            merge = OnlineMerge(name, alpha=1e-6, density=density)
            merge.attach(self.optimizer, self.model.named_parameters(), vectors)
        self.cpu: list[float] = []
        self.clock: list[float] = []
        self.stepping: list[float] = []  # CPU seconds of optimizer.step alone

    def step(self, ids: torch.Tensor) -> None:
        cpu, clock = time.process_time(), time.perf_counter()
        self.optimizer.zero_grad()
        self.model(input_ids=ids, labels=ids).loss.backward()
        before = time.process_time()
        self.optimizer.step()
        end = time.process_time()
        self.stepping.append(end - before)
        self.cpu.append(end - cpu)
        self.clock.append(time.perf_counter() - clock)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--density", type=float, default=0.01)
    parser.add_argument("--profile", action="store_true", help="where the merged steps' time goes")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    arms = [Arm(name, given.density) for name in ("bare", "dare", "ties")]
    size = sum(p.numel() for p in arms[0].model.parameters())
    print(f"{size / 1e6:.1f} M parameters, {given.batch} sequences of {given.length}, density {given.density}")
    ids = torch.randint(SHAPE["vocab_size"], (given.batch, given.length), generator=torch.Generator().manual_seed(2))
    for arm in arms:  # compiles, and makes the optimizer's state
        arm.step(ids[:1, :16])
    for arm in arms:
        arm.cpu, arm.clock, arm.stepping = [], [], []
    for number in range(given.rounds):
        for place in range(len(arms)):
            arms[(number + place) % len(arms)].step(ids)
    print("| optimizer | CPU s a step | of it its step | CPU time / bare (median) | range | clock / bare | at most |")
    print("|---|---|---|---|---|---|---|")
    slow = False
    for arm in arms:
        ratios = [one / bare for one, bare in zip(arm.cpu, arms[0].cpu, strict=True)]
        clock = statistics.median(one / bare for one, bare in zip(arm.clock, arms[0].clock, strict=True))
        ratio, most = statistics.median(ratios), MOST.get(arm.name)
        slow = slow or (most is not None and ratio > most)
        print(
            f"| {arm.name} | {statistics.median(arm.cpu):.3f} | {statistics.median(arm.stepping):.3f} | {ratio:.3f} | "
            f"{min(ratios):.3f} to {max(ratios):.3f} | {clock:.3f} | {most or ''} |"
        )
    if given.profile:
        for arm in arms[1:]:
            profile = cProfile.Profile()
            profile.runcall(arm.optimizer.step)
            print(arm.name)
            pstats.Stats(profile).sort_stats("tottime").print_stats(14)
    sys.exit(int(slow))


if __name__ == "__main__":
    main()
