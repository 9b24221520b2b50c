"""The house keeps its shape: who imports whom, that words are documented, that every recipe loads and plans."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fusion import recipe, words
from fusion.plan import plan

ROOT = Path(__file__).resolve().parent.parent
STDLIB = set(sys.stdlib_module_names)
SOURCES = sorted(file for package in ("fusion", "alignment") for file in (ROOT / package).rglob("*.py"))
# What a module may import when it is itself imported, besides the standard library and this project's own modules.
LIGHT = {
    "fusion/__init__": set(),
    "fusion/recipe": {"yaml"},
    "fusion/words": set(),
    "fusion/_say": set(),
    "fusion/_types": set(),
    "fusion/cli": {"click"},
    "fusion/run": set(),
    "fusion/job": set(),
    "fusion/data": set(),
    "fusion/sources": set(),
    "fusion/_files": set(),
    "fusion/plan": {"torch", "safetensors", "tokenizers"},
    "fusion/_checked": set(),
    "fusion/_keys": set(),
}
ALIGNMENT = {"torch", "numpy", "scipy", "ot", "tokenizers", "safetensors"}
PURE = ("merge", "post", "losses", "fuse")  # rooms of functions on tensors
HEAVY = ("torch", "transformers", "trl", "deepspeed", "accelerate", "datasets", "peft")


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT).with_suffix(""))


def imported(file: Path, anywhere: bool = False) -> set[str]:
    """Dotted names that a file imports, at its top level or anywhere, `if TYPE_CHECKING:` left out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not anywhere:
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            assert node.level == 0, f"{file}: relative imports hide the arrows"
            found.add(module)
            found.update(f"{module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def tops(names: set[str]) -> set[str]:
    """Third-party packages among dotted names."""
    return {name.partition(".")[0] for name in names} - STDLIB - {"fusion", "alignment"}


@pytest.mark.parametrize("file", SOURCES, ids=name_of)
def test_arrows(file):
    name, everywhere, above = name_of(file), imported(file, anywhere=True), imported(file)
    parts = name.split("/")
    for forbidden in ("fusion.cli", "recipes", "launch", "tests"):
        assert not any(one == forbidden or one.startswith(f"{forbidden}.") for one in everywhere), forbidden
    if name != "fusion/cli":
        assert "fusion.run" not in everywhere, "only the command line imports run"
    if parts[0] == "alignment":
        assert not any(one.split(".")[0] == "fusion" for one in everywhere), "alignment knows no fusion"
        assert tops(everywhere) <= ALIGNMENT and "ot" not in tops(above)
    if name in LIGHT:
        assert tops(above) <= LIGHT[name]
    if parts[0] == "fusion" and parts[1] in PURE and parts[-1] != "__init__":
        own = {one for one in everywhere if one.split(".")[0] in ("fusion", "alignment")}
        assert tops(everywhere) <= {"torch"}
        assert all(
            one == f"fusion.{parts[1]}"
            or ".".join(one.split(".")[:2]) in ("fusion.losses", "fusion.merge", f"fusion.{parts[1]}")
            for one in own
        ), own
    if parts[:2] == ["fusion", "steps"]:
        assert not tops(above) & set(HEAVY), "heavy libraries load inside the step's function"


@pytest.mark.parametrize("folder", ["fusion", "fusion/merge", "fusion/online", "alignment"])
def test_every_file_is_on_the_map(folder):
    """docs/house.md names each file once, under its folder, and no other; words are found by their names."""
    page = (ROOT / "docs" / "house.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w.]+)`", page.partition(f"## {folder}:")[2].partition("## ")[0])
    files = [file.stem for file in (ROOT / folder).glob("*.py")] + [file.name for file in (ROOT / folder).glob("*.c")]
    private = [name for name in files if name != "__init__" and (folder != "fusion/merge" or name.startswith("_"))]
    assert sorted(named) == sorted(private)


@pytest.mark.parametrize("file", SOURCES, ids=name_of)
def test_modules_are_small_and_say_what_they_are(file):
    text = file.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), "a module begins by saying what it is"
    assert len(text.splitlines()) < 300, "split by question"


@pytest.mark.parametrize("room", words.ROOMS)
def test_words_are_documented(room):
    page = ROOT / "docs" / f"{'methods' if room == 'merge' else room}.md"
    for word in words.list_room(room):
        assert word.summary, f"{word.file} has no docstring"
        assert page.is_file() and f"`{word.word}`" in page.read_text(encoding="utf-8"), (
            f"{page} has no row for {word.word}"
        )


@pytest.mark.parametrize("word", words.list_room("steps"), ids=lambda word: word.word)
def test_step_rows_name_every_parameter(word):
    row = (ROOT / "docs" / "steps.md").read_text(encoding="utf-8").partition(f"| `{word.word}` |")[2].partition("\n")[0]
    assert [name for name in word.names if f"`{name}`" not in row] == []
    assert word.constants["OUTPUT"] in ("model", "targets", "metrics", "a compressed task vector")


@pytest.mark.parametrize("file", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda file: file.stem)
def test_recipes_load_and_plan(file, tmp_path):
    loaded = recipe.load(file)
    try:
        planned = plan(loaded, tmp_path)
    except ValueError as error:
        needed = [
            text
            for text in str(error).split("\n")
            if "HF_HUB_OFFLINE" not in text
            and "there is no " not in text
            and "no file at" not in text
            and "package" not in text
        ]
        assert needed == [], "a recipe may lack models and data on this machine, nothing else"
        pytest.skip(str(error).replace("\n", "; "))
    assert len(planned.steps) == len(loaded.steps)


def test_planning_leaves_heavy_libraries_unloaded():
    code = "import json, sys; import fusion.plan, fusion.cli, fusion.run; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not set(HEAVY) & set(json.loads(done.stdout))


def test_version_is_the_distributions():
    from fusion import __version__

    assert f'version = "{__version__}"' in (ROOT / "pyproject.toml").read_text()
