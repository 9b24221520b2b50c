"""The contents of chat messages inside the text that a model's own template makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]

# Private-use characters: no template has them, and no template's trimming touches them.
_OPEN, _CLOSE = "\ue0f0", "\ue0f1"


def render(tokenizer: Any, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int, int]]]:
    """The messages in the tokenizer's own chat template, and for each content its first and end character there and how
    many characters the template stripped before it.

    The template is rendered twice, once with marks for contents, so that a content which also occurs in the template
    ("user") is found where it belongs. Raises ValueError for a tokenizer without a template, contents that are not
    strings, and a template that drops, repeats, reorders or rewrites a content; white space stripped around it is
    allowed.
    """
    if not hasattr(tokenizer, "apply_chat_template") or not tokenizer.chat_template:
        raise ValueError(
            f"this {type(tokenizer).__name__} has no chat template: give a transformers tokenizer that comes with one "
            "(chat_template.jinja, or in tokenizer_config.json)"
        )
    for number, message in enumerate(messages):
        if not isinstance(message.get("content"), str) or "role" not in message:
            raise ValueError(f"message {number} must have a role and a content that is a string, not {message!r}")
    rendered: str = tokenizer.apply_chat_template(list(messages), tokenize=False)
    marks = [f"{_OPEN}{number}{_CLOSE}" for number in range(len(messages))]
    marked = [message | {"content": mark} for message, mark in zip(messages, marks, strict=True)]
    rest: str = tokenizer.apply_chat_template(marked, tokenize=False)
    between = []
    for number, mark in enumerate(marks):
        before, found, rest = rest.partition(mark)
        if not found or mark in rest:
            raise ValueError(
                f"the chat template drops, repeats or reorders the content of message {number}: it cannot be located"
            )
        between.append(before)
    between.append(rest)
    return rendered, _walk(rendered, [message["content"] for message in messages], between)


def _walk(rendered: str, contents: list[str], between: list[str]) -> list[tuple[int, int, int]]:
    """Where each content lies, given what the template puts before, between and after them."""
    places = []
    position = len(between[0])
    fits = rendered.startswith(between[0])
    for number, content in enumerate(contents):
        after = between[number + 1]
        # longest first: a content that was not stripped is taken whole
        forms = sorted({content, content.lstrip(), content.rstrip(), content.strip()}, key=len, reverse=True)
        form = next((form for form in forms if fits and rendered.startswith(form + after, position)), None)
        if form is None:
            raise ValueError(
                f"the chat template rewrites the content of message {number} ({content[:40]!r}): "
                "its bytes cannot be located"
            )
        stripped = len(content) - len(content.lstrip()) if not form[:1].isspace() else 0
        places.append((position, position + len(form), stripped))
        position += len(form) + len(after)
    if position != len(rendered):
        raise ValueError("the chat template adds text that depends on the contents: they cannot be located")
    return places
