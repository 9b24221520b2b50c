"""Markdown of a model card: front matter, text that means nothing but itself, fences."""

import re
from collections.abc import Mapping

import yaml


def front_matter(fields: Mapping[str, object]) -> str:
    """The YAML block that a card begins with."""
    return f"---\n{yaml.safe_dump(dict(fields), sort_keys=False, allow_unicode=True)}---"


def text(value: object) -> str:
    """`value` as one line of Markdown that means nothing but itself."""
    return re.sub(r"([\\`*_\[\]<>|#&~])", r"\\\1", " ".join(str(value).split()))


def fence(content: str) -> str:
    """YAML in a fence longer than any run of backticks in it."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", content)), default=0))
    return f"{ticks}yaml\n{content.rstrip()}\n{ticks}"
