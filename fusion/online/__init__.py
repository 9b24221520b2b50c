"""Merging while a network trains: a task vector joins every optimizer step, whatever the optimizer and the sharding."""

from typing import Any

HANDED_ON = {
    "OnlineMerge": "fusion.online.settings",
    "OnlineMergeCallback": "fusion.online.callback",
    "MergeGroupsCallback": "fusion.online.groups",
    "MergeWithCallback": "fusion.online.periodic",
    "merge_into": "fusion.online.live",
}
__all__ = ["MergeGroupsCallback", "MergeWithCallback", "OnlineMerge", "OnlineMergeCallback", "merge_into"]


def __getattr__(name: str) -> Any:
    """Loads torch and transformers only when something of here is used."""
    if name not in HANDED_ON:
        raise AttributeError(f"module 'fusion.online' has no attribute '{name}'")
    from importlib import import_module

    return vars(import_module(HANDED_ON[name]))[name]
