"""Does a value from a recipe fit an annotation? Answered from the annotation's text, so that nothing is imported."""

import ast
from typing import Any

_SIMPLE: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((int,), "a whole number"),
    "float": ((float, int), "a number"),
    "str": ((str,), "a string"),
    "bool": ((bool,), "true or false"),
    "list": ((list,), "a list"),
    "Sequence": ((list,), "a list"),
    "tuple": ((list,), "a list"),
    "dict": ((dict,), "a mapping"),
    "Mapping": ((dict,), "a mapping"),
}


def fit(value: Any, annotation: str) -> tuple[Any, str]:
    """The value as the annotation has it, and what is allowed ("" where the value fits or nothing is known)."""
    if not annotation:
        return value, ""
    node = ast.parse(annotation, mode="eval").body
    options = _options(node)
    for option in options:
        fitted, known = _fit(value, option)
        if known != "no":
            return fitted, ""
    return value, " or ".join(dict.fromkeys(_described(option) for option in options))


def _options(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _options(node.left) + _options(node.right)
    if isinstance(node, ast.Subscript) and _name(node.value) == "Optional":
        return [*_options(node.slice), ast.Constant(None)]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):  # a quoted annotation
        return _options(ast.parse(node.value, mode="eval").body)
    return [node]


def _fit(value: Any, node: ast.expr) -> tuple[Any, str]:
    """(value, "yes" | "no"); annotations that are not simple accept everything."""
    if isinstance(node, ast.Constant) and node.value is None:
        return value, "yes" if value is None else "no"
    name = _name(node.value if isinstance(node, ast.Subscript) else node)
    if name == "Literal" and isinstance(node, ast.Subscript):
        allowed = ast.literal_eval(node.slice)
        return value, "yes" if value in (allowed if isinstance(allowed, tuple) else (allowed,)) else "no"
    if name not in _SIMPLE:
        return value, "yes"
    types, _ = _SIMPLE[name]
    if isinstance(value, bool) and bool not in types:
        return value, "no"
    if not isinstance(value, types):
        return value, "no"
    if isinstance(value, int) and name == "float":
        return float(value), "yes"
    if isinstance(node, ast.Subscript):
        return _inside(value, node)
    return value, "yes"


def _inside(value: Any, node: ast.Subscript) -> tuple[Any, str]:
    """Entries of a list or a mapping, when the annotation says what they are."""
    inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if isinstance(value, dict):
        if len(inner) != 2:
            return value, "yes"
        pairs = {key: fit(entry, ast.unparse(inner[1])) for key, entry in value.items()}
        keys_fit = all(not fit(key, ast.unparse(inner[0]))[1] for key in value)
        bad = not keys_fit or any(wrong for _, wrong in pairs.values())
        return {key: fitted for key, (fitted, _) in pairs.items()}, "no" if bad else "yes"
    if _name(node.value) == "tuple" and not (len(inner) == 2 and ast.unparse(inner[1]) == "..."):
        if len(inner) != len(value):
            return value, "no"
        entries = [fit(entry, ast.unparse(kind)) for entry, kind in zip(value, inner, strict=True)]
    else:
        entries = [fit(entry, ast.unparse(inner[0])) for entry in value]
    return [fitted for fitted, _ in entries], "no" if any(wrong for _, wrong in entries) else "yes"


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _described(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return "nothing" if node.value is None else repr(node.value)
    if isinstance(node, ast.Subscript):
        name = _name(node.value)
        if name == "Literal":
            allowed = ast.literal_eval(node.slice)
            return " or ".join(repr(one) for one in (allowed if isinstance(allowed, tuple) else (allowed,)))
        inner = node.slice.elts[-1] if isinstance(node.slice, ast.Tuple) else node.slice
        of = " or ".join(_described(option) for option in _options(inner) if ast.unparse(option) != "...")
        return f"{_SIMPLE[name][1]} of {of}" if of else _SIMPLE[name][1]
    return _SIMPLE[_name(node)][1] if _name(node) in _SIMPLE else ast.unparse(node)
