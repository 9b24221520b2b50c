"""Alignment here means correspondence between networks (which unit of one is which of another), not RLHF.

Pure maths on tensors and strings: this package knows no recipe, no checkpoint format and no trainer, and it never
imports `fusion`.

* `alignment.tokens`: the bytes each token of a text covers, and the byte boundaries two tokenizations share;
  needs NumPy and `tokenizers` only.
* `alignment.vocab`: one vocabulary into another, and distributions over one projected onto the other.
* `alignment.names`: tensors of two models that correspond by name, though not one to one.
* `alignment.spaces`, `alignment.maps`: the unit spaces of a network with their exact symmetries, and maps between two
  networks' units; `alignment.families` has them by `config.model_type`.
* `alignment.align`: which unit of a donor is which of a target; `alignment.universe` of several networks at once,
  `alignment.refine` on data; `alignment.layers` which layer, `alignment.widen` a network in a wider one.

`align`, `find_family`, `fold`, `unfold`, `refine`, `trace`, `universe`, `verify`, `widen`, `Maps`, `Space`, `Spaces`
can be imported from here; a module is loaded when its name is first asked for.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from alignment.align import align
    from alignment.families import find_family
    from alignment.fold import fold, unfold
    from alignment.maps import Maps
    from alignment.refine import refine
    from alignment.spaces import Space, Spaces
    from alignment.trace import trace
    from alignment.universe import universe
    from alignment.verify import verify
    from alignment.widen import widen

_HOMES = {
    "align": "alignment.align",
    "find_family": "alignment.families",
    "fold": "alignment.fold",
    "unfold": "alignment.fold",
    "refine": "alignment.refine",
    "trace": "alignment.trace",
    "universe": "alignment.universe",
    "verify": "alignment.verify",
    "widen": "alignment.widen",
    "Maps": "alignment.maps",
    "Space": "alignment.spaces",
    "Spaces": "alignment.spaces",
}
__all__ = [
    "Maps",
    "Space",
    "Spaces",
    "align",
    "find_family",
    "fold",
    "refine",
    "trace",
    "unfold",
    "universe",
    "verify",
    "widen",
]


class _Package(ModuleType):
    """`alignment.fold` is the function, also after its module of the same name was imported, which would hide it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _HOMES:
            value = vars(value)[name]
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'alignment' has no attribute '{name}'")
        value = vars(importlib.import_module(_HOMES[name]))[name]
        setattr(self, name, value)
        return value


sys.modules[__name__].__class__ = _Package
