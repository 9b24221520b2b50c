"""Merge methods: one file per word, pure functions on tensors; the engine's functions are handed on from here."""

from typing import Any

__all__ = ["blends", "merge_checkpoints", "merge_state_dicts", "merge_tensors"]


def __getattr__(name: str) -> Any:
    # lazily, since the engine imports torch and the methods' room has to stay importable without it
    if name not in __all__:
        raise AttributeError(f"module 'fusion.merge' has no attribute '{name}'")
    from fusion import engine

    return vars(engine)[name] if name in vars(engine) else engine.__getattr__(name)
