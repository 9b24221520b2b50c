"""Words: file, function, parameters; read without importing, checked in sentences."""

import sys
from pathlib import Path

import pytest

from fusion import words
from fusion._types import fit

LAB = '''
"""Not imported while planning."""
raise RuntimeError("imported")
'''
METHOD = '''
"""What comes out, from a paper."""
from typing import Literal
UNIT = "row"
LIMITS = (1, -2.5)
made = open

def ties2(
    tensors, base, *, stats, density: float = 0.2, mode: Literal["a", "b"] = "a", name: str, k: int | None = None,
    free=made, must: int
):
    """The elected mean."""
'''


@pytest.fixture
def lab(tmp_path, monkeypatch) -> Path:
    """A package on the path whose import fails, with a word in it."""
    (tmp_path / "my_lab").mkdir()
    (tmp_path / "my_lab" / "__init__.py").write_text(LAB)
    (tmp_path / "my_lab" / "ties2.py").write_text(METHOD)
    (tmp_path / "my_lab" / "empty.py").write_text("x = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_dotted_word_may_lie_in_a_folder_without_init(lab):
    (lab / "my_lab" / "bench" / "deep").mkdir(parents=True)
    (lab / "my_lab" / "bench" / "deep" / "ties2.py").write_text(METHOD)
    assert words.find("merge", "my_lab.bench.deep.ties2").file == lab / "my_lab" / "bench" / "deep" / "ties2.py"


def test_a_dotted_word_is_read_and_not_imported(lab):
    sys.modules.pop("my_lab", None)  # other tests have one of that name
    word = words.find("merge", "my_lab.ties2")
    assert word.file == lab / "my_lab" / "ties2.py" and word.module == "my_lab.ties2"
    assert word.summary == "The elected mean."
    assert word.constants == {"UNIT": "row", "LIMITS": (1, -2.5)}
    assert word.names == ("density", "mode", "k", "free", "must")  # stats and name come from the engine
    density, mode, _, free, must = word.parameters
    assert (density.default, density.required, density.annotation) == (0.2, False, "float")
    assert mode.default == "a" and free.default == "made" and must.required
    assert "my_lab" not in sys.modules


def test_unknown_words(lab):
    for room, word, sentence in [
        ("steps", "distil", "unknown step 'distil'; did you mean 'distill'?"),
        ("losses", "forward_k1", "unknown loss 'forward_k1'; did you mean 'forward_kl'?"),
        ("losses", "_head", "unknown loss '_head'"),
        ("fuse", "__init__", "unknown fusion rule '__init__'"),
        ("stepz", "distill", "unknown room 'stepz'; did you mean 'steps'?"),
        ("merge", "my_lab.ties3", "no module 'my_lab.ties3' can be found from here"),
        ("merge", "nobody.ties", "no module 'nobody.ties' can be found"),
        ("merge", "my_lab.empty", "there is no function 'empty' in it"),
    ]:
        with pytest.raises(ValueError) as caught:
            words.find(room, word)
        assert sentence in str(caught.value)


def test_parse_checks_parameters(lab):
    word = "my_lab.ties2"
    assert words.parse("merge", {word: {"density": 1, "must": 2}}, "x") == (word, {"density": 1.0, "must": 2})
    for value, sentence in [
        (word, "x: my_lab.ties2 needs 'must'"),
        ({word: {"densty": 1, "must": 1}},
         "x.my_lab.ties2: my_lab.ties2 has no parameter 'densty'; did you mean 'density'?"),
        ({word: {"mode": "c", "must": 1}}, "x.my_lab.ties2.mode: 'a' or 'b' is needed here, not str 'c'"),
        ({word: {"density": "lots", "must": 1}}, "x.my_lab.ties2.density: a number is needed here, not str 'lots'"),
        ({word: {"must": True}}, "x.my_lab.ties2.must: a whole number is needed here, not bool True"),
        ({word: {"k": 1.5, "must": 1}}, "x.my_lab.ties2.k: a whole number or nothing is needed here, not float 1.5"),
        ({word: [1]}, "x.my_lab.ties2: parameters are a mapping, not [1]"),
        ({"a": {}, "b": {}}, "x: a word or {word: {parameter: value}} is needed here, not {'a': {}, 'b': {}}"),
        (3, "x: a word or {word: {parameter: value}} is needed here, not 3"),
        ("tees", "x: unknown merge method 'tees'"),
    ]:  # fmt: skip
        with pytest.raises(ValueError) as caught:
            words.parse("merge", value, "x")
        assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize(
    ("value", "annotation", "allowed"),
    [
        (1, "float", ""),
        (None, "int | None", ""),
        (None, "Optional[int]", ""),
        (None, "int", "a whole number"),
        ("a", "str | list[str]", ""),
        (["a", 1], "str | list[str]", "a string or a list of a string"),
        ({"a": 1}, "dict[str, float]", ""),
        ({"a": "b"}, "dict[str, float]", "a mapping of a number"),
        ([0.9, 1], "tuple[float, float]", ""),
        ([0.9], "tuple[float, float]", "a list of a number"),
        ([1, 2, 3], "tuple[int, ...]", ""),
        ("x", 'Literal["x"]', ""),
        (False, "bool", ""),
        (0, "bool", "true or false"),
        ("anything", "torch.Tensor", ""),
        ("anything", "", ""),
        ([1], "Sequence[float] | None", ""),
    ],
)
def test_values_fit_annotations(value, annotation, allowed):
    assert fit(value, annotation)[1] == allowed


def test_rooms_are_folders(repository):
    for room in words.ROOMS:
        for word in words.list_room(room):
            assert word.file.parent == repository / words.ROOMS[room] / room
            assert callable(words.load(room, word.word))
