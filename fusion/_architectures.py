"""Which architectures transformers has code of its own for, read from its source without importing it."""

import functools
from importlib.machinery import PathFinder
from pathlib import Path


@functools.cache
def known(model_type: str) -> bool:
    """Whether a configuration of this model_type loads without code from the checkpoint."""
    spec = PathFinder.find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return False
    auto = Path(next(iter(spec.submodule_search_locations))) / "models" / "auto"
    return any(f'("{model_type}",' in file.read_text(encoding="utf-8") for file in sorted(auto.glob("*.py")))
