"""Every test runs offline, on one thread a process, and finds the tools of its own environment."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before anything imports torch or a Hugging Face library: they read these once. Subprocesses inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# `.venv/bin/pytest` does not activate the environment, but DeepSpeed looks ninja up on the PATH.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])

import pytest

# What tests make from scratch is theirs alone; real models, which take minutes to convert, stay where a user has them.
CONVERTED = Path(os.environ.get("FUSION_CACHE") or Path.home() / ".cache" / "fusion")
os.environ["FUSION_CACHE"] = tempfile.mkdtemp(prefix="fusion-tests-")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Texts and problems beside the checkout; a test that needs them is skipped where they are absent."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data, which is not beside this checkout")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _cache() -> Iterator[None]:
    yield
    shutil.rmtree(os.environ["FUSION_CACHE"], ignore_errors=True)


def _real_model(name: str) -> Path:
    """$FUSION_MODELS/NAME if that is given, else what the recipe's package holds, converted once; skips if neither."""
    if root := os.environ.get("FUSION_MODELS"):
        folder = Path(root) / name
        if not (folder / "config.json").is_file():
            pytest.skip(f"needs the real model {name}: {folder} has no config.json")
        return folder
    from fusion import recipe, sources

    loaded = recipe.load(REPOSITORY / "recipes" / "smollm2_gemma3.yaml")
    try:
        return sources.resolve(name, loaded.models[name], CONVERTED, loaded.base, lambda _: [])
    except ValueError as error:
        pytest.skip(f"needs the real model {name}, or FUSION_MODELS: {error}")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct as safetensors + tokenizer.json."""
    return _real_model("smollm2")


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """Gemma3-270M as safetensors + tokenizer.json."""
    return _real_model("gemma3")
