"""Which architectures transformers has code of its own for, read from its source without importing it."""

import functools
from collections.abc import Mapping
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any


@functools.cache
def known(model_type: str) -> bool:
    """Whether a configuration of this model_type loads without code from the checkpoint."""
    spec = PathFinder.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return False
    auto = Path(next(iter(spec.submodule_search_locations))) / "models" / "auto"
    return any(f'("{model_type}",' in file.read_text(encoding="utf-8") for file in sorted(auto.glob("*.py")))


def refuse_own_code(place: str, name: str, config: Mapping[str, Any]) -> None:
    """ValueError for a model that can't be run without code of its checkpoint."""
    if "auto_map" in config and not known(str(config.get("model_type"))):
        raise ValueError(
            f"{place}: config.json of '{name}' asks for code of its own (auto_map), which is never run here, and "
            f"transformers has none for {config.get('model_type')!r}; merge, compress and retokenize read weights "
            "alone and take it, what runs a model needs an architecture that transformers knows"
        )
