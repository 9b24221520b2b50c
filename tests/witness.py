"""A step of tests that trains like `tune` and leaves behind which documents each rank saw in which optimizer step."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from fusion.job import Job

OUTPUT = "model"


class Witness(TrainerCallback):
    """Reads the rows that reach the network, whatever is wrapped around it, and writes them down at the end."""

    def __init__(self, directory: Path, tokenizer: Any):
        self.directory, self.tokenizer = directory, tokenizer
        self.seen: list[tuple[int, str]] = []  # (optimizer step, document)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        def read(_: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
            for row in named["input_ids"].tolist():
                self.seen.append((state.global_step, self.tokenizer.decode(row, skip_special_tokens=True)))

        model.register_forward_pre_hook(read, with_kwargs=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        one = {"world": args.world_size, "main": state.is_world_process_zero, "seen": self.seen}
        (self.directory / f"witness-{args.process_index}.json").write_text(json.dumps(one))


def witness(
    job: "Job", *, out: str, model: str, data: str, max_length: int, train: dict[str, Any] | None = None
) -> None:
    """The model after language modelling on the data, a document a row, with witness-RANK.json beside it."""
    from fusion._training import learn
    from fusion.sources import load_tokenizer

    callback = Witness(job.directory, load_tokenizer(job.model(model)))
    learn(
        job,
        model=model,
        data=data,
        max_length=max_length,
        pack=False,
        train=train or {},
        peft=None,
        callbacks=[callback],
    )
