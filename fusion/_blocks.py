"""A network of transformers run block by block on the same rows: states are kept, so that a block costs a block."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion._teacher import POSITIONS
from fusion.data import encode

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from alignment.spaces import Spaces
    from fusion.data import Document
    from fusion.job import Job

BATCH = 1024  # tokens run together


def module_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor], device: str) -> Any:
    """The module of a checkpoint's tensors, float32, for evaluation; ValueError where it has others."""
    import torch
    import transformers

    settings = transformers.AutoConfig.for_model(**config)
    settings.use_cache = False
    name = (config.get("architectures") or ["AutoModelForCausalLM"])[0]
    if not hasattr(transformers, name):
        raise ValueError(f"transformers has no {name}, which config.json names as its architecture")
    module, found = getattr(transformers, name).from_pretrained(
        None,
        config=settings,
        state_dict=dict(tensors),
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    if found["missing_keys"] or found["mismatched_keys"]:
        raise ValueError(f"{name}: {min(map(str, [*found['missing_keys'], *found['mismatched_keys']]))} does not fit")
    return module.eval().to(device)


def token_batches(job: Job, models: Iterable[str], data: str, tokens: int, length: int) -> list[dict[str, Tensor]]:
    """Inputs of about BATCH tokens each: the texts of `data` one after the other, in rows of one length, no padding.

    Of models none of which has a tokenizer, a text is token numbers with spaces between. Raises ValueError for other
    texts there, and where there is none.
    """
    import numpy as np
    import torch

    from fusion import sources

    names = list(models)
    config = job.source(names[0]).config
    if config.get("model_type") == "vit":
        raise ValueError(f"{job.place}.data: {names[0]} looks at pictures, and data are texts")
    folders = [Path(job.model(name)) for name in names]
    having = next((folder for folder in folders if (folder / "tokenizer.json").is_file()), None)
    tokenizer = None if having is None else sources.load_tokenizer(having)
    length = min([length, *(int(config[name]) for name in POSITIONS if config.get(name))])
    found: list[Any] = []
    count = 0
    for document in job.documents(data):
        ids = token_numbers(job, config, data, document) if tokenizer is None else encode(tokenizer, document).ids
        found.append(ids)
        count += len(ids)
        if count >= tokens:
            break
    together = torch.from_numpy(np.concatenate([*found, np.zeros(0, np.int64)])[:tokens]).to(job.device)
    length = min(length, len(together))
    if not length:
        raise ValueError(f"{job.place}.data: {data} has no tokens")
    rows = together[: len(together) // length * length].view(-1, length)
    return [{"input_ids": part} for part in rows.split(max(1, BATCH // length))]


def token_numbers(job: Job, config: Mapping[str, Any], data: str, document: Document) -> np.ndarray:
    """(T,) what a text of models without tokenizers says; ValueError where these are no tokens of the model."""
    import numpy as np

    numbers = document.text.split()
    if not all(one.isdecimal() and int(one) < config["vocab_size"] for one in numbers):
        raise ValueError(
            f"{job.place}.data: no model here has a tokenizer, so texts are token numbers below "
            f"{config['vocab_size']} with spaces between, and {data} has {document.text!r:.60}"
        )
    return np.array(numbers, np.int64)


def blocks_of(spaces: Spaces) -> list[str]:
    """The names of a module's blocks in order, of a table in the module's spelling."""
    names: dict[str, list[list[str]]] = {}
    for part in spaces.parts:
        if part.key.startswith("layers."):
            names.setdefault(part.key.split(".")[1], []).append(part.names[0].split("."))
    return [".".join(commonprefix(many)) for many in names.values()]


class Flow:
    """One network on all batches: `states` are what goes into block number `at`; after the last one comes the whole
    network, for what stands outside of its blocks."""

    def __init__(self, module: Any, spaces: Spaces, batches: list[dict[str, Tensor]]) -> None:
        import torch

        self.module, self.spaces, self.batches, self.at = module, spaces, batches, 0
        self.blocks = blocks_of(spaces)
        self.first: list[Tensor] = []
        self.calls: dict[tuple[str, Any], dict[str, Any]] = {}
        hooks = [
            module.get_submodule(name).register_forward_pre_hook(
                lambda block, args, kwargs, name=name: self._called(name, block, args, kwargs), with_kwargs=True
            )
            for name in self.blocks
        ]
        with torch.no_grad():
            for batch in batches:
                module(**batch)
        for hook in hooks:
            hook.remove()
        self.states = self.first

    def _called(self, name: str, block: Any, args: Any, kwargs: Any) -> None:
        """Rows have one length and no padding, so what stands beside a state depends on its shape alone."""
        bound = inspect.signature(block.forward).bind(*args, **kwargs).arguments
        bound.update(bound.pop("kwargs", {}))
        (word, state), *_ = bound.items()
        assert word == "hidden_states"
        if name == self.blocks[0]:
            self.first.append(state.detach())
        self.calls.setdefault((name, state.shape), bound)

    @property
    def name(self) -> str:
        """The block's, with a point; nothing for the whole network."""
        return f"{self.blocks[self.at]}." if self.at < len(self.blocks) else ""

    @property
    def block(self) -> Any:
        return self.module.get_submodule(self.name[:-1])

    def given(self, number: int) -> dict[str, Any]:
        """What the block, or the whole network, takes for one batch."""
        if not self.name:
            return dict(self.batches[number])
        state = self.states[number]
        return {**self.calls[self.blocks[self.at], state.shape], "hidden_states": state}

    def inputs(self, number: int, names: Iterable[str]) -> dict[str, Tensor]:
        """(rows, features) by the full name of a layer of the block: what goes into it for one batch."""
        from alignment.features.activations import inputs_of

        start = len(self.name)
        seen = inputs_of(self.block, self.given(number), [name[start:] for name in names])
        return {self.name + name: x.reshape(-1, x.shape[-1]) for name, x in seen.items()}

    def advance(self) -> None:
        """To the next block."""
        import torch

        block, states = self.block, []
        with torch.no_grad():
            for number in range(len(self.states)):
                out = block(**self.given(number))
                states.append(out if isinstance(out, torch.Tensor) else out[0])
        self.states, self.at = states, self.at + 1

    def restart(self) -> None:
        """To the first block."""
        self.states, self.at = self.first, 0
