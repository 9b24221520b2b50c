"""One file per architecture family: what `config.model_type` names is a function from config to spaces."""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from alignment.spaces import Spaces


def find_family(config: Any, names: Collection[str] = ()) -> Spaces:
    """The spaces of a network with this config: a mapping as in config.json, or an object with `to_dict`.

    `names` are a checkpoint's tensor names, where they are spelled otherwise than in the module (experts a tensor each,
    no prefix). Raises ValueError for a family that has no file here.
    """
    given: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    family = given.get("model_type")
    if not isinstance(family, str):
        raise ValueError("the config has no model_type")
    known = sorted(file.stem for file in Path(__file__).parent.glob("*.py") if not file.stem.startswith("_"))
    if family not in known:
        near = get_close_matches(family, known, 1)
        guess = f"; did you mean '{near[0]}'?" if near else ""
        text = given.get("text_config")
        inside = f"; its language model is config.text_config, of family '{text.get('model_type')}'" if text else ""
        raise ValueError(
            f"no family '{family}' in {', '.join(known)}{guess}{inside}. Of any other torch module that torch.fx can "
            "follow, alignment.trace(module, example) derives the spaces"
        )
    function = vars(importlib.import_module(f"alignment.families.{family}"))[family]
    spaces: Spaces = function(given, names)
    return spaces
