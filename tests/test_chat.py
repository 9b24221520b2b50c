"""Conversations: each model reads them in its own template, and only what stands inside the messages corresponds."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from alignment.vocab import VocabMap
from fusion import run
from fusion.data import Document, encode
from fusion.fuse.min_ce import min_ce
from fusion.join import Join, Teacher
from fusion.sources import load_tokenizer
from fusion.targets import Store
from fusion.windows import Collator, Windows, encode_to_disk
from tests.tokenizers import train

TEMPLATES = {
    "byte_level": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    "unigram": "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}",
}
MARKS = {"byte_level": ("<|im_start|>", "<|im_end|>"), "unigram": ("<s>", "</s>")}
CHATS = [
    [
        {"role": "user", "content": f"Why do {n} foxes jump over the lazy dog?"},
        {"role": "assistant", "content": "They walked."},
    ]
    for n in range(12)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which a byte-level teacher and a Unigram student with other templates read the same conversations."""
    folder = tmp_path_factory.mktemp("chat")
    for kind in TEMPLATES:
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=train(kind), clean_up_tokenization_spaces=False)
        bos, eos = MARKS[kind]
        tokenizer.add_special_tokens({"bos_token": bos, "eos_token": eos})
        tokenizer.chat_template = TEMPLATES[kind]
        size = {"vocab_size": len(tokenizer), "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128}
        GPT2LMHeadModel(GPT2Config(**size, bos_token_id=None, eos_token_id=None)).save_pretrained(folder / kind)
        tokenizer.save_pretrained(folder / kind)
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS))
    steps = [
        {"record": {"out": "hints", "teacher": "byte_level", "data": "chats", "draws": 8}},
        {
            "distill": {"out": "taught", "model": "unigram", "targets": ["hints"], "data": "chats", "max_length": 128}
            | {"train": {"max_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 4}}
        },
    ]
    recipe = {
        "models": {kind: {"path": kind} for kind in TEMPLATES},
        "data": {"chats": {"path": "chats.jsonl", "column": "messages"}},
        "steps": steps,
    }
    (folder / "chat.yaml").write_text(json.dumps(recipe))
    assert run.main([str(folder / "chat.yaml"), "--out", str(folder / "runs")]) == 0
    return folder


def test_conversations_are_recorded_and_taught(folder: Path) -> None:
    log = [json.loads(line) for line in (folder / "runs/chat/taught/log.jsonl").read_text().splitlines()]
    assert 0.2 < log[-1]["target_share"] <= 1


def test_targets_stand_inside_the_messages_only(folder: Path, tmp_path: Path) -> None:
    tokenizer, store = load_tokenizer(folder / "unigram"), Store.open(folder / "runs/chat/hints")
    documents = [Document.of(chat) for chat in CHATS]
    encode_to_disk(tmp_path, tokenizer, documents)
    windows = Windows(tmp_path, 128, packed=False)
    map_ = VocabMap.first_piece(load_tokenizer(store.tokenizer), tokenizer)
    join = Join([Teacher("hints", store, map_)], min_ce, {})
    batch = Collator(windows, 0, join)(windows.rows)
    width = batch["labels"].shape[1]
    for at in batch["target_at"].tolist():
        row, position = divmod(at, width)
        encoded = encode(tokenizer, documents[row])
        assert encoded.is_content[position + 1]
    inside = sum(int(encode(tokenizer, d).is_content.sum()) for d in documents)
    learnt = int((batch["labels"] != -100).sum())
    assert learnt == inside
    template = [~encode(tokenizer, d).is_content for d in documents]
    assert all(np.any(outside) for outside in template)
