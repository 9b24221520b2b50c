"""A tune step while planning: its data against its algorithm, its rewards, its online merging."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from fusion import data, words
from fusion._checked import columns
from fusion._rows import COLUMNS, check_columns
from fusion._say import nearest

if TYPE_CHECKING:
    from fusion.plan import View

REWARDED = ("grpo", "rloo")
KL = {"grpo": 0.0, "rloo": 0.05}  # TRL's own beta, where a recipe gives none
MODELS = ("base", "reference")


def reward_files(given: Mapping[str, Any]) -> list[str]:
    """The sources of the rewards that can be found; `check` says which can't."""
    found = [_reward_file(word) for word in given.get("rewards") or ()]
    return [file for file in found if file]


def _reward_file(word: str) -> str:
    try:
        return str(words.find("steps", word).file) if "." in word else ""
    except ValueError:
        return ""


def check(view: View) -> None:
    """Raises ValueError, with the place, for what is wrong with a tune step as far as headers tell."""
    _data(view)
    _rewards(view)
    if view.fields["online_merge"] is not None:
        _online_merge(view, view.fields["online_merge"])
    if view.fields["merge_with"] is not None:
        _merge_with(view, view.fields["merge_with"])


def _data(view: View) -> None:
    algorithm, ref = view.fields["algorithm"], view.recipe.data[view.fields["data"]]
    place = f"{view.place}.data"
    if algorithm not in COLUMNS:
        if ref.column == data.ALL:
            raise ValueError(
                f"{place}: '{ref.name}' has rows of preferences (column: '*'), and {algorithm} learns from texts; "
                f"algorithms for preferences are {', '.join(COLUMNS)}"
            )
        return
    if ref.column != data.ALL or ref.mix:
        raise ValueError(
            f"{place}: {algorithm} learns from whole rows; give data.{ref.name} a json or parquet file and column: '*'"
        )
    if ref.path is not None and (known := columns(ref, data.files(ref, view.recipe.base))):
        check_columns(algorithm, known, f"{place}: {ref.name}")


def _rewards(view: View) -> None:
    algorithm, rewards = view.fields["algorithm"], view.fields["rewards"] or []
    place = f"{view.place}.rewards"
    if algorithm not in REWARDED:
        if rewards:
            raise ValueError(f"{place}: {algorithm} has no rewards; they are for {' and '.join(REWARDED)}")
        return
    if not rewards:
        raise ValueError(f"{place}: {algorithm} needs rewards, dotted words such as my_lab.brevity")
    for word in rewards:
        if "." not in word:
            raise ValueError(
                f"{place}: '{word}' has no dot; a reward is a function in a module of its name, such as my_lab.brevity"
            )
        try:
            words.find("steps", word)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from None


def _online_merge(view: View, given: Mapping[str, Any]) -> None:
    from fusion.online.settings import Extras, OnlineMerge, refuse_below_adapter

    place = f"{view.place}.online_merge"
    own, extra = ([field.name for field in fields(kind)] for kind in (OnlineMerge, Extras))
    known = [*MODELS, *own, *extra]
    for name in given:
        if name not in known:
            raise ValueError(f"{place}: there is no parameter '{name}'{nearest(name, known)}")
    if "base" not in given:
        raise ValueError(
            f"{place}: it needs a base, the model before supervised fine-tuning: what is merged into every step is "
            f"reference - base"
        )
    reference = given.get("reference") or view.fields["model"]
    if reference == given["base"]:
        raise ValueError(f"{place}: reference and base are both '{reference}', so there is nothing to merge")
    algorithm, train = view.fields["algorithm"], view.fields["train"] or {}
    if view.fields["peft"] and algorithm in REWARDED and train.get("beta", KL[algorithm]):
        raise ValueError(
            f"{place}: {algorithm}'s KL term asks the network without its adapter, and online merging changes what "
            f"lies below it; set train: {{beta: 0.0}}, or leave peft out"
        )
    try:
        merge = OnlineMerge(**{"seed": view.recipe.seed} | {name: given[name] for name in own if name in given})
        extras = Extras(**{name: given[name] for name in extra if name in given})
        if view.fields["peft"]:
            refuse_below_adapter(merge, extras)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{place}: {error}") from None
    _shapes(view, given["base"], reference, place)


def _merge_with(view: View, given: Mapping[str, Any]) -> None:
    from fusion.online.meet import MergeWith

    place = f"{view.place}.merge_with"
    own = [field.name for field in fields(MergeWith) if field.name != "based"]
    known = ["model", "base", *own]
    for name in given:
        if name in ("align", "maps"):
            raise ValueError(
                f"{place}: inside a job units keep their order; rounds of tune, align and merge put them in "
                f"one, as in recipes/papers/dimat.yaml"
            )
        if name not in known:
            raise ValueError(f"{place}: there is no parameter '{name}'{nearest(name, known)}")
    groups = given.get("groups") is not None
    needed = [("every", "the number of steps between two merges")]
    for name, what in needed if groups else [("model", "the model to merge with, or groups"), *needed]:
        if given.get(name) is None:
            raise ValueError(f"{place}: it needs {name}, {what}")
    if groups:
        _groups(view, given, place)
    if view.fields["peft"]:
        raise ValueError(f"{place}: it merges whole weights, and peft trains an adapter; leave one of the two out")
    window = (view.fields["online_merge"] or {}).get("every", 1)
    try:
        merge = MergeWith(based=bool(given.get("base")), **{name: given[name] for name in own if name in given})
        merge.check_steps(int((view.fields["train"] or {}).get("max_steps", -1)))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{place}: {error}") from None
    if merge.every % window:
        raise ValueError(
            f"{place}.every: {merge.every} is no multiple of online_merge.every ({window}), and a merge inside its "
            f"window would count as the optimizer's own step; allowed are {window}, {2 * window}, ..."
        )
    if not groups:
        _shapes(view, given["model"], view.fields["model"], place)


def _groups(view: View, given: Mapping[str, Any], place: str) -> None:
    if given.get("model") is not None:
        raise ValueError(f"{place}: groups meet each other, and a model is one to meet; leave one of the two out")
    if view.fields["online_merge"] is not None:
        raise ValueError(
            f"{place}: groups train apart, and online_merge adds up over all ranks; leave one of the two out"
        )
    if view.fields["algorithm"] in COLUMNS:
        raise ValueError(
            f"{place}: {view.fields['algorithm']} looks at the rows of all ranks; groups train apart by clm or sft"
        )


def _shapes(view: View, base: str, reference: str, place: str) -> None:
    """The two have tensors of the same shapes, where both are on this machine."""
    from fusion._merge_check import headers_here

    one, other = headers_here(view, base), headers_here(view, reference)
    if one is None or other is None:
        return
    common = one.entries.keys() & other.entries.keys()
    if not common:
        raise ValueError(
            f"{place}: '{base}' and '{reference}' have no tensor in common; they are different architectures"
        )
    for name in sorted(common):
        if one.entries[name].shape != other.entries[name].shape:
            raise ValueError(
                f"{place}: '{name}' is {one.entries[name].shape} in '{base}' and {other.entries[name].shape} in "
                f"'{reference}'; a resized vocabulary needs a base of that size (step retokenize)"
            )
