"""A model reference becomes a directory that holds config.json, *.safetensors and tokenizer.json.

Local directories are used in place, hub repositories through the hub's own cache; a GGUF file (Gerganov et al.,
ggml 2023) is converted once, a model from scratch is made once, an adapter on its base and a training checkpoint are
written once, all under this project's cache directory.
What is read for planning (headers, digests) needs neither torch nor transformers; only this module loads models.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusion._composed import COMPOSED, kind_of
from fusion._files import HEX, Header, config_of, file_digest, header, stamp, tensor_files

if TYPE_CHECKING:
    from fusion.recipe import ModelRef

__all__ = ["Header", "check", "digest", "header", "load_model", "load_tokenizer", "resolve", "tokenizer_digest"]

DTYPES = ("float32", "bfloat16", "float16")
DOWNLOAD = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]
SPECIALS = ("bos_token", "eos_token", "unk_token", "pad_token", "add_bos_token", "add_eos_token")
_tokenizer_digests: dict[tuple, str] = {}


def check(name: str, ref: ModelRef, base: Path, models: Mapping[str, ModelRef] | None = None) -> str:
    """hub, directory, gguf, scratch or of COMPOSED, checked from headers and names; `models`: what `base` may name.

    Nothing is downloaded, converted or trained. Raises ValueError with a sentence for what can't become a model.
    """
    place = ref.place or f"models.{name}"
    kind = _kind(place, ref, base)
    if kind in COMPOSED:
        from fusion import _composed

        _composed.check(place, name, ref, base, models or {})
    elif kind == "directory":
        _check_directory(place, local(ref, base))
    elif kind == "gguf":
        from fusion import _gguf

        _gguf.locate(place, ref.path or [], base)
    elif kind == "scratch":
        from fusion import _scratch

        _scratch.check(place, ref.config or {}, ref.tokenizer)
    return kind


def resolve(
    name: str,
    ref: ModelRef,
    cache: Path,
    base: Path,
    texts: Callable[[str], Iterable[str]],
    seed: int = 0,
    models: Mapping[str, ModelRef] | None = None,
) -> Path:
    """The directory of model `name`: used in place, downloaded, converted or made, whichever `ref` asks for.

    cache: where conversions and models from scratch are kept, by the digest of all they depend on.
    base: the folder that relative paths start from.  texts: name of a data set -> its texts (trains tokenizers).
    models: those that an adapter's `base` may name.
    """
    kind = check(name, ref, base, models)
    place = ref.place or f"models.{name}"
    if kind == "directory":
        return local(ref, base)
    if kind in COMPOSED:
        from fusion import _composed

        opened = _composed.source(name, ref, cache, base, texts, seed, models or {})
        directory = _composed.written(opened, Path(cache))
    elif kind == "hub":
        directory = download(place, ref)
    elif kind == "gguf":
        from fusion import _gguf

        directory = _gguf.convert(place, _gguf.locate(place, ref.path or [], base), ref.sha256, Path(cache))
    else:
        from fusion import _scratch

        directory = _scratch.make(name, ref.config or {}, ref.tokenizer or {}, Path(cache), texts, seed, place)
    _check_directory(place, directory)
    return directory


def _kind(place: str, ref: ModelRef, base: Path) -> str:
    given = [field for field, value in (("hub", ref.hub), ("path", ref.path), ("config", ref.config)) if value]
    if len(given) != 1:
        raise ValueError(f"{place}: give exactly one of hub, path, config; given: {', '.join(given) or 'none'}")
    several = not isinstance(ref.path, str) and ref.path is not None
    is_gguf = several or str(ref.path).startswith("package:") or str(ref.path).endswith(".gguf")
    if ref.sha256 and not is_gguf:
        raise ValueError(f"{place}: sha256 goes with the path of a GGUF file")
    if ref.hub:
        if ref.hub.startswith((".", "/", "~")) or ref.hub.count("/") > 1:
            raise ValueError(f"{place}: hub {ref.hub!r} is no repository id (owner/name); a directory goes in path")
        if ref.revision and not HEX.fullmatch(ref.revision):
            raise ValueError(f"{place}: revision {ref.revision!r} can move; give the commit, 40 hexadecimal digits")
        return "adapter" if ref.base else "hub"
    kind = "scratch" if ref.config else "gguf" if is_gguf else kind_of(local(ref, base))
    if ref.base and kind not in COMPOSED and (kind != "directory" or local(ref, base).exists()):
        raise ValueError(f"{place}: base goes with an adapter, a compressed task vector or a training checkpoint only")
    return kind


def local(ref: ModelRef, base: Path) -> Path:
    """Where a model directory lies; relative paths start at the recipe."""
    return (Path(base) / Path(str(ref.path)).expanduser()).resolve()


def _check_directory(place: str, directory: Path) -> None:
    if not directory.exists():
        raise ValueError(f"{place}: there is no directory {directory}")
    if not directory.is_dir():
        raise ValueError(f"{place}: {directory} is neither a directory nor a .gguf file")
    if (directory / "adapter_config.json").exists():
        raise ValueError(f"{place}: {directory} is a PEFT adapter; name the model it sits on as base")
    if not list(directory.glob("*.safetensors")):
        refuse_pickled(directory, f"{place}: ")
        raise ValueError(f"{place}: no *.safetensors in {directory}")
    _check_vocabulary(place, directory, header(directory).config)


def refuse_pickled(directory: Path, place: str = "") -> None:
    """ValueError with the command that converts them when a directory holds pickled weights only."""
    pickled = sorted(p.name for p in (*directory.glob("*.bin"), *directory.glob("*.pt"), *directory.glob("*.pth")))
    if pickled:
        raise ValueError(
            f"{place}{directory} holds only pickled weights ({pickled[0]}), which can run code when read; "
            f'if you trust them, convert: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{directory}').save_pretrained('{directory}')\""
        )


def _check_vocabulary(place: str, directory: Path, config: dict[str, Any]) -> None:
    """A tokenizer must not name ids that the head doesn't have (the other way round is padding)."""
    file = directory / "tokenizer.json"
    text_config = config.get("text_config") or config
    if not file.exists() or "vocab_size" not in text_config:
        return
    size = vocabulary_size(file)
    if size > text_config["vocab_size"]:
        raise ValueError(
            f"{place}: the tokenizer has {size} tokens, the head has only {text_config['vocab_size']} rows "
            f"({directory})"
        )


_sizes: dict[tuple, int] = {}


def vocabulary_size(file: Path) -> int:
    """The highest token id of a tokenizer.json plus one."""
    key = stamp(file)
    if key not in _sizes:
        from tokenizers import Tokenizer

        vocabulary = Tokenizer.from_file(str(file)).get_vocab(with_added_tokens=True)
        _sizes[key] = max(vocabulary.values(), default=-1) + 1
    return _sizes[key]


def download(place: str, ref: ModelRef) -> Path:
    """The snapshot in the hub's cache: safetensors, json and tokenizer files only."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    no_adapter = [] if ref.base else ["adapter_*"]
    try:
        path = snapshot_download(
            ref.hub, revision=ref.revision, allow_patterns=DOWNLOAD, ignore_patterns=["*/*"] + no_adapter
        )
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ValueError(
            f"{place}: {ref.hub} is not in the local hub cache and the hub can't be reached (HF_HUB_OFFLINE is "
            f"{os.environ.get('HF_HUB_OFFLINE', 'not set')}); go online once, or give a local directory as path"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ValueError(f"{place}: the hub refused {ref.hub} at {ref.revision}: {error}") from error
    if not ref.revision:
        warnings.warn(
            f"{place}: {ref.hub} has no revision and may change; this run uses commit {Path(path).name}",
            stacklevel=2,
        )
    return Path(path)


def digest(directory: Path) -> str:
    """32 hex digits of config.json and all tensor files; the same wherever the files lie."""
    directory = Path(directory)
    state = hashlib.blake2b(digest_size=16)
    for file in [directory / "config.json", *tensor_files(directory)]:
        state.update(f"{file.name}:{file_digest(file)}\n".encode())
    return state.hexdigest()


def tokenizer_digest(directory: Path) -> str:
    """32 hex digits of what decides ids and chat rendering: tokenizer.json, special tokens, chat template.

    Padding and truncation settings, the order of keys and the library's version do not count.
    """
    directory = Path(directory)
    files = [directory / n for n in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")]
    if not files[0].exists():
        raise ValueError(_slow(directory))
    key = tuple(stamp(f) for f in files if f.exists())
    if key not in _tokenizer_digests:
        content = json.loads(files[0].read_text(encoding="utf-8"))
        settings = json.loads(files[1].read_text(encoding="utf-8")) if files[1].exists() else {}
        template = files[2].read_text(encoding="utf-8") if files[2].exists() else settings.get("chat_template")
        specials = {
            k: settings[k]["content"] if isinstance(settings[k], dict) else settings[k]
            for k in SPECIALS
            if k in settings
        }
        parts = [
            {k: v for k, v in content.items() if k not in ("padding", "truncation", "version")},
            specials,
            template,
        ]
        text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
        _tokenizer_digests[key] = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
    return _tokenizer_digests[key]


def _slow(directory: Path) -> str:
    convert = f"T.from_pretrained('{directory}').save_pretrained('{directory}')"
    return (
        f"{directory} has no tokenizer.json: a fast tokenizer with offsets is needed; convert with: "
        f'python -c "from transformers import AutoTokenizer as T; {convert}"'
    )


def load_tokenizer(directory: Path) -> Any:
    """The fast transformers tokenizer of a model directory; ValueError for slow ones and for ones without offsets."""
    from transformers import AutoTokenizer

    if not (Path(directory) / "tokenizer.json").exists():
        raise ValueError(_slow(directory))
    tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise ValueError(
            f"{directory}: {type(tokenizer).__name__} is a slow tokenizer without offsets; {_slow(directory)}"
        )
    return tokenizer


def load_model(directory: Path, dtype: str = "float32", attention: str | None = None, device: str = "cpu") -> Any:
    """The causal language model of a directory in evaluation mode.

    dtype: float32, bfloat16 or float16.  attention: transformers' attn_implementation, its own choice if None.
    Raises ValueError naming weights that are missing or misshapen; extra ones are warned about.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown; allowed: {', '.join(DTYPES)}")
    config_of(Path(directory))
    header(Path(directory))
    model, info = AutoModelForCausalLM.from_pretrained(
        str(directory),
        dtype=getattr(torch, dtype),
        attn_implementation=attention,
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    for what in ("missing_keys", "mismatched_keys"):
        if info[what]:
            names = sorted(str(k) for k in info[what])
            raise ValueError(
                f"{directory}: {what.replace('_', ' ')} in the checkpoint: {', '.join(names[:5])} ({len(names)})"
            )
    if info["unexpected_keys"]:
        names = sorted(info["unexpected_keys"])
        warnings.warn(
            f"{directory}: {len(names)} tensors are not used by the model: {', '.join(names[:5])}", stacklevel=2
        )
    return model.eval().to(device)
