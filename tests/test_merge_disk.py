"""Merges from disk to disk: the same bits as in memory, however they are cut, shared, ordered or interrupted."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from fusion import words
from fusion._method import Method
from fusion.cli import main
from fusion.merge import merge_checkpoints, merge_state_dicts
from tests.processes import ended, forked

SHAPES = {
    "model.embed_tokens.weight": (150, 64),  # 2.3 blocks of 4,096
    "model.layers.0.mlp.up_proj.weight": (96, 160),
    "model.layers.0.norm.weight": (64,),
    "model.layers.1.mlp.up_proj.weight": (96, 160),
    "model.layers.1.conv.weight": (6, 5, 3, 3),
    "model.layers.1.norm.weight": (5000,),
    "model.layers.10.scale": (),
    "model.layers.2.frozen.weight": (80, 64),
    "model.layers.2.nothing.weight": (0, 64),
    "model.norm.weight": (64,),
}
REQUIRED = {"slerp": {"t": 0.3}, "nearswap": {"t": 0.02}, "expo": {"alpha": 0.1}}
ALL = [word.word for word in words.list_room("merge") if word.constants.get("UNIT") != "adapter"]


def make(folder: Path, seed: int, dtype=torch.float32, shuffle: bool = False) -> Path:
    """A small model: seed 0 is the base, another one stands a little beside it, but for one frozen tensor."""
    base, other = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in SHAPES.items():
        tensor = torch.randn(shape, generator=base)
        change = torch.randn(shape, generator=other) * 0.1
        tensors[name] = (tensor if seed == 0 or "frozen" in name else tensor + change).to(dtype)
    tensors["model.rotary.position_ids"] = torch.arange(7)
    folder.mkdir(parents=True)
    write(folder / "model.safetensors", tensors, list(reversed(tensors)) if shuffle else list(tensors))
    (folder / "config.json").write_text(json.dumps({"model_type": "tiny", "num_hidden_layers": 11, "dtype": "float32"}))
    return folder


def write(file: Path, tensors, order) -> None:
    """A safetensors file whose tensors lie in this order, which the library would sort."""
    kinds = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64", torch.float16: "F16"}
    table, data = {}, b""
    for name in order:
        raw = (
            tensors[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensors[name].numel() else b""
        )
        table[name] = {
            "dtype": kinds[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(table).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for seed in range(4):
        make(folder / f"m{seed}", seed)
        make(folder / f"shuffled{seed}", seed, shuffle=True)
        tensors = load_file(folder / f"m{seed}" / "model.safetensors")
        save_file(statistics(tensors, seed), folder / f"statistics{seed}.safetensors")
    return folder


def statistics(tensors, seed: int):
    """Made-up statistics of every kind that methods read."""
    generator = torch.Generator().manual_seed(100 + seed)
    found = {}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        found[f"fisher/{name}"] = torch.rand(tensor.shape, generator=generator)
        if tensor.dim() == 2 and tensor.numel():
            x = torch.randn(2 * tensor.shape[1], tensor.shape[1], generator=generator)
            y = torch.randn(2 * tensor.shape[0], tensor.shape[0], generator=generator)
            found[f"gram/{name}"], found[f"output_gram/{name}"] = x.T @ x, y.T @ y
            found[f"activations/{name}"] = torch.rand(tensor.shape[1], generator=generator)
    return found


def arguments(word: str, models: Path, kind: str = "m"):
    """What a method is given: models, base, parameters, statistics."""
    method = Method.of(word)
    fewest, most = method.models
    count = min(3, most or 3)
    chosen = {f"m{n}": models / f"{kind}{n}" for n in range(1, count + 1)}
    given: dict = {"params": dict(REQUIRED.get(word, {}))}
    if method.base_required:
        given["base"] = models / f"{kind}0"
    if "weights" in method.needs:
        given["weights"] = [0.5, 0.3, 0.4][:count]
    if method.inputs:
        given["statistics"] = {name: models / f"statistics{name[1:]}.safetensors" for name in chosen}
    return chosen, given


IDS = "model.rotary.position_ids"


def tensors_of(models: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(models / name / "model.safetensors")


def raw(directory: Path) -> dict[str, bytes]:
    """Every byte of the weights and by-products."""
    return {str(file.relative_to(directory)): file.read_bytes() for file in sorted(directory.rglob("*.safetensors"))}


def run(word: str, models: Path, out: Path, kind: str = "m", **options) -> dict[str, bytes]:
    chosen, given = arguments(word, models, kind)
    merge_checkpoints(word, chosen, out, **{"threads": 1, "seed": 7, **given, **options})
    return raw(out)


@pytest.mark.parametrize("word", ALL)
def test_same_bits_however_it_is_cut(word, models, tmp_path):
    whole = run(word, models, tmp_path / "a", chunk=1 << 22)
    assert run(word, models, tmp_path / "b", chunk=1 << 12, threads=4) == whole
    assert run(word, models, tmp_path / "c", kind="shuffled", memory="16MiB") == whole
    loaded = load_file(tmp_path / "a" / "model.safetensors")
    assert set(loaded) == {*SHAPES, "model.rotary.position_ids"}
    assert all(bool(torch.isfinite(one).all()) for one in loaded.values())


@pytest.mark.parametrize("word", ALL)
def test_same_bits_as_in_memory(word, models, tmp_path):
    chosen, given = arguments(word, models)
    run(word, models, tmp_path / "out", chunk=1 << 12)
    inputs = None
    if given.get("statistics"):
        sides = [load_file(file) for file in given["statistics"].values()]
        inputs = {
            kind: [{n.split("/", 1)[1]: t for n, t in side.items() if n.startswith(f"{kind}/")} for side in sides]
            for kind in Method.of(word).inputs
        }
    memory = merge_state_dicts(
        word,
        [load_file(path / "model.safetensors") for path in chosen.values()],
        base=load_file(given["base"] / "model.safetensors") if "base" in given else None,
        weights=given.get("weights"),
        inputs=inputs,
        seed=7,
        **given["params"],
    )
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        assert torch.equal(tensor, memory[name]), name


@pytest.mark.parametrize("word", ALL)
def test_two_ranks_write_the_same_bits(word, models, tmp_path):
    whole = run(word, models, tmp_path / "alone")

    def rank(number):
        return lambda: run(word, models, tmp_path / "shared", chunk=1 << 12, rank=number, world=2)

    assert [ended(child) for child in [forked(rank(n)) for n in range(2)]] == [0, 0]
    assert raw(tmp_path / "shared") == whole
    named = json.loads((tmp_path / "shared" / "merge.json").read_text())["tensors"]
    assert named == json.loads((tmp_path / "alone" / "merge.json").read_text())["tensors"]
    assert not list((tmp_path / "shared").glob("*jsonl")) and not list((tmp_path / "shared").glob("finished*"))


def killed_at(number: int, word: str, models: Path, out: Path) -> int:
    """Runs a merge that is killed at its `number`-th write; the exit status."""

    def work():
        from fusion.checkpoint import Writer

        write, count = Writer.write, iter(range(number))

        def counted(*given):
            if next(count, None) is None:
                os.kill(os.getpid(), signal.SIGKILL)
            write(*given)

        Writer.write = counted
        run(word, models, out, chunk=1 << 12, threads=2)

    return ended(forked(work))


@pytest.mark.parametrize("word", ALL)
def test_killed_three_times_it_goes_on_to_the_same_bits(word, models, tmp_path):
    whole = run(word, models, tmp_path / "whole")
    out = tmp_path / "out"
    for number in torch.randint(0, 6, (3,), generator=torch.Generator().manual_seed(len(word))).tolist():
        assert killed_at(number, word, models, out) == -signal.SIGKILL
        assert not out.exists(), "nothing that looks whole"
    run(word, models, out, chunk=1 << 12)
    assert raw(out) == whole and not out.with_name("out.partial").exists()


VARIANTS = [
    ("ties", {"scope": "model", "density": 0.3}),
    ("ties", {"density": {"layers": [0.2, 0.9]}}),
    ("ties", {"density": {"match": {"*.0.*": 1.0, "*norm*": 1.0, "*": 0.5}}}),
    ("ties", {"density": 1.0, "scope": "model"}),
    ("task_arithmetic", {"scale": {"match": {"*.mlp.*": 0.3, "*": 0.5}}}),
    ("dare", {"density": 0.5, "consensus": "ties", "rescale": "l1"}),
    ("della", {"consensus": "ties"}),
    ("breadcrumbs", {"density": 0.5, "gamma": 0.05, "consensus": "ties"}),
    ("sce", {"select_topk": 0.5}),
]


@pytest.mark.parametrize("word, params", VARIANTS, ids=lambda value: value if isinstance(value, str) else str(value))
def test_parameters_change_no_law(word, params, models, tmp_path):
    whole = run(word, models, tmp_path / "a", params=params, chunk=1 << 22)
    assert run(word, models, tmp_path / "b", params=params, chunk=1 << 12, threads=3) == whole
    shared = {"params": params, "chunk": 1 << 12, "world": 2}
    ranks = [forked(lambda n=n: run(word, models, tmp_path / "c", rank=n, **shared)) for n in range(2)]
    assert [ended(child) for child in ranks] == [0, 0] and raw(tmp_path / "c") == whole
    chosen, given = arguments(word, models)
    memory = merge_state_dicts(
        word,
        [load_file(path / "model.safetensors") for path in chosen.values()],
        base=load_file(given["base"] / "model.safetensors"),
        weights=given.get("weights"),
        seed=7,
        **params,
    )
    for name, tensor in load_file(tmp_path / "a" / "model.safetensors").items():
        assert torch.equal(tensor, memory[name]), name


def test_post_words_see_the_merge_before_it_is_rounded(models, tmp_path):
    post = [{"lines": {"alpha": 0.5}}, {"aim": {"omega": 0.4}}]
    side = {"base": models / "statistics0.safetensors"}
    whole = run("ties", models, tmp_path / "a", post=post, statistics=side, chunk=1 << 22)
    assert run("ties", models, tmp_path / "b", post=post, statistics=side, chunk=1 << 12, threads=3) == whole
    base = load_file(models / "m0" / "model.safetensors")
    run("ties", models, tmp_path / "c")
    merged, after = (load_file(tmp_path / one / "model.safetensors") for one in ("c", "a"))
    name = "model.layers.1.mlp.up_proj.weight"
    a = load_file(models / "statistics0.safetensors")[f"activations/{name}"]
    expected = base[name] + (merged[name] - base[name]) * (0.5 + 0.5 * 1 / 10) * (1 - 0.6 * a / a.max())
    torch.testing.assert_close(after[name], expected)
    assert torch.equal(after["model.layers.2.frozen.weight"], base["model.layers.2.frozen.weight"])
    with pytest.raises(ValueError, match="aim reads the statistic 'activations' of the base, and no file"):
        run("ties", models, tmp_path / "d", post=["aim"])


def test_repair_sees_the_models_rows_in_any_chunks(models, tmp_path):
    whole = run("linear", models, tmp_path / "a", post=["repair"], chunk=1 << 22)
    assert run("linear", models, tmp_path / "b", post=["repair"], chunk=1 << 12, threads=3) == whole
    name = "model.layers.1.mlp.up_proj.weight"
    own = [load_file(models / f"m{i}" / "model.safetensors")[name].float() for i in (1, 2, 3)]
    after = load_file(tmp_path / "a" / "model.safetensors")[name].float()
    wanted = sum(share * one.norm(dim=1) for share, one in zip((0.5, 0.3, 0.4), own)) / 1.2
    torch.testing.assert_close(after.norm(dim=1), wanted)
    with pytest.raises(ValueError, match="repair: .* takes them one after another"):
        run("opcm", models, tmp_path / "c", post=["repair"])


def test_post_words_have_the_same_bits_in_memory(tmp_path):
    dicts = []
    for seed in range(3):
        make(tmp_path / f"h{seed}", seed, torch.bfloat16)
        dicts.append(load_file(tmp_path / f"h{seed}" / "model.safetensors"))
    side = {f"model.layers.{layer}.mlp.up_proj.weight": torch.rand(160) for layer in (0, 1)}
    save_file({f"activations/{name}": one for name, one in side.items()}, tmp_path / "activations.safetensors")
    post = [{"lines": {"alpha": 0.3}}, {"aim": {"omega": 0.4}}]
    models = {"a": tmp_path / "h1", "b": tmp_path / "h2"}
    statistics = {"base": tmp_path / "activations.safetensors"}
    for word in ("linear", "ties", "tsv_m"):
        merge_checkpoints(word, models, tmp_path / word, base=tmp_path / "h0", post=post, statistics=statistics)
        memory = merge_state_dicts(word, dicts[1:], base=dicts[0], post=post, inputs={"activations": side})
        for name, tensor in load_file(tmp_path / word / "model.safetensors").items():
            assert torch.equal(tensor, memory[name]), (word, name)


def test_equal_tensors_are_copied(models, tmp_path):
    chosen, given = arguments("linear", models)
    found = merge_checkpoints("linear", chosen, tmp_path / "out", threads=1, weights=[0.1, 0.2, 0.3])
    frozen = load_file(tmp_path / "out" / "model.safetensors")["model.layers.2.frozen.weight"]
    assert torch.equal(frozen, load_file(models / "m1" / "model.safetensors")["model.layers.2.frozen.weight"])
    actions = {entry["name"]: entry["action"] for entry in found.metrics["tensors"]}
    assert actions["model.layers.2.frozen.weight"] == "equal" and actions["model.rotary.position_ids"] == "copied"
    assert actions["model.embed_tokens.weight"] == "merged"
    sums = merge_checkpoints("linear", chosen, tmp_path / "sum", weights=[1, 1, 1], params={"normalize": False})
    assert {entry["name"]: entry["action"] for entry in sums.metrics["tensors"]}[
        "model.layers.2.frozen.weight"
    ] == "merged"


@pytest.mark.parametrize("word", ["opcm", "cabs"])
def test_equal_models_of_a_sequential_method_meet_post_words(word, models, tmp_path):
    twins, given = arguments(word, models)
    same = dict.fromkeys(twins, models / "m1")
    found = merge_checkpoints(word, same, tmp_path / "out", **given, post=[{"lines": {"alpha": 1.0}}])
    actions = {entry["name"]: entry["action"] for entry in found.metrics["tensors"]}
    assert actions["model.layers.2.frozen.weight"] in ("equal", "merged")
    base = load_file(models / "m0" / "model.safetensors")["model.layers.2.frozen.weight"]
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["model.layers.2.frozen.weight"], base)


def test_shards_index_and_provenance(models, tmp_path):
    chosen, given = arguments("linear", models)
    merge_checkpoints("linear", chosen, tmp_path / "out", shard_size=30_000, threads=1)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files and len(files) > 3
    whole = {name: tensor for file in files for name, tensor in load_file(tmp_path / "out" / file).items()}
    assert index["metadata"]["total_size"] == sum(one.numel() * one.element_size() for one in whole.values())
    assert set(whole) == set(index["weight_map"])
    about = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert about["method"] == "linear" and set(about["inputs"]) == set(chosen) and set(about["tensors"]) == set(whole)
    import xxhash

    tensor = whole["model.norm.weight"]
    assert about["tensors"]["model.norm.weight"] == xxhash.xxh3_128(tensor.numpy().tobytes()).hexdigest()


def changed(models: Path, folder: Path, change, config=lambda settings: None) -> Path:
    """Model m1 with something else about it."""
    tensors = load_file(models / "m1" / "model.safetensors")
    settings = json.loads((models / "m1" / "config.json").read_text())
    change(tensors)
    config(settings)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def setting(name, value):
    return lambda tensors: tensors.__setitem__(name, value)


LARGE = [name for name, shape in SHAPES.items() if len(shape) > 1]
EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"
BAD = {
    "missing": (lambda t: t.pop(NORM), "'odd' lacks 1 of the 11 tensors to merge: model.norm.weight"),
    "extra": (setting("model.more", torch.ones(2)), "'odd' has 1 tensors that the base has no place for: model.more"),
    "shape": (setting(NORM, torch.ones(65)), "model.norm.weight is 65 in 'odd' and 64 in the base"),
    "vocabulary": (setting(EMBED, torch.ones(151, 64)), "their vocabularies have 151 and 150 rows; .* retokenize step"),
    "dtype": (setting(NORM, torch.ones(64).half()), "is float32 in 'm2' and float16 in 'odd'; say .*dtype: float32"),
    "codes_alone": (
        setting(NORM, torch.ones(64).char()),
        "is int8 in 'odd' and float32 in 'm2'; whole numbers",
    ),
    "integers": (setting("model.rotary.position_ids", torch.arange(7) + 1), "whole numbers .int64. that differ"),
    "nan": (setting(NORM, torch.full((64,), float("nan"))), "model.norm.weight of 'odd' has NaN in it"),
    "infinity": (setting(EMBED, torch.full((150, 64), float("inf"))), "embed_tokens.weight of 'odd' has infinity"),
    "codes": (
        lambda t: t.update({NORM: torch.ones(64, 2).char(), f"{NORM}_scale": torch.ones(1)}),
        "'odd' is quantised: model.norm.weight is I8 beside model.norm.weight_scale",
    ),
    "float8": (setting(EMBED, torch.ones(150, 64).to(torch.float8_e4m3fn)), "'odd' is quantised: .* is F8_E4M3"),
    "complex": (setting(NORM, torch.ones(64, dtype=torch.complex64)), "complex"),
}


def test_models_of_two_dtypes_agree_or_not_whatever_the_chunks(models, tmp_path):
    """One of float32 that holds bfloat16's numbers is equal by its numbers and not by its bytes."""
    halves = {name: x.bfloat16() if x.is_floating_point() else x for name, x in tensors_of(models, "m1").items()}
    for name, kept in (("half", halves), ("wide", {n: x.float() if n != IDS else x for n, x in halves.items()})):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "model.safetensors", kept, list(kept))
        (tmp_path / name / "config.json").write_text((models / "m1" / "config.json").read_text())
    both = {"half": tmp_path / "half", "wide": tmp_path / "wide"}
    made = [
        merge_checkpoints("linear", both, tmp_path / f"out{chunk}", weights=[0.1, 0.2], dtype="float32", chunk=chunk)
        for chunk in (1 << 12, 1 << 22)
    ]
    assert raw(made[0].path) == raw(made[1].path)
    assert [one["action"] for one in made[0].metrics["tensors"]] == [
        one["action"] for one in made[1].metrics["tensors"]
    ]


def test_a_tokenizer_takes_no_part_of_another_ones(models, tmp_path):
    for name, files in (("one", ("tokenizer.json", "chat_template.jinja")), ("other", ("tokenizer.json",))):
        at = changed(models, tmp_path / name, lambda tensors: None)
        for file in files:
            (at / file).write_text(json.dumps({"model": {"vocab": {}}, "whose": name}))
        (at / "generation_config.json").write_text("{}")
    both = {"one": tmp_path / "one", "other": tmp_path / "other"}
    out = merge_checkpoints("linear", both, tmp_path / "out", tokenizer="other").path
    assert json.loads((out / "tokenizer.json").read_text())["whose"] == "other"
    assert not (out / "chat_template.jinja").exists() and (out / "generation_config.json").exists()


def test_a_template_and_special_tokens_that_stay_behind_are_said(models, tmp_path, capsys):
    ends = {"base": 2, "same": 2, "chat": 7}
    for name, end in ends.items():
        changed(models, tmp_path / name, lambda tensors: None, setting("eos_token_id", end))
    (tmp_path / "chat" / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    tuned = {name: tmp_path / name for name in ("same", "chat")}
    merge_checkpoints("linear", tuned, tmp_path / "out", base=tmp_path / "base")
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("no chat template is carried: the base has none, 'chat' has one; with tokenizer: chat")
    assert said[1].startswith("'chat' has eos_token_id 7 and the base 2, which is carried") and len(said) == 2
    merge_checkpoints("linear", tuned, tmp_path / "theirs", base=tmp_path / "base", tokenizer="chat")
    assert capsys.readouterr().out == ""
    assert json.loads((tmp_path / "theirs" / "config.json").read_text())["eos_token_id"] == 7


def test_settings_under_which_weights_compute_something_else_are_said(models, tmp_path, capsys):
    for name, theta in {"base": 1e4, "same": 1e4, "long": 1e6}.items():
        changed(models, tmp_path / name, lambda tensors: None, setting("rope_theta", theta))
    tuned = {name: tmp_path / name for name in ("same", "long")}
    out = merge_checkpoints("linear", tuned, tmp_path / "out", base=tmp_path / "base").path
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith("'long' has rope_theta 1000000.0 and the base 10000.0, which the result has: the weights of")
    assert json.loads((out / "config.json").read_text())["rope_theta"] == 1e4


@pytest.mark.parametrize("what", BAD)
def test_bad_inputs_get_a_sentence(what, models, tmp_path):
    change, sentence = BAD[what]
    odd = changed(models, tmp_path / "odd", change)
    with pytest.raises(ValueError, match=sentence):
        merge_checkpoints("ties", {"m2": models / "m2", "odd": odd}, tmp_path / "out", base=models / "m0")
    assert not (tmp_path / "out").exists(), "no partial output ever looks whole"


def test_rows_that_stand_for_other_tokens(models, tmp_path):
    def speaking(name, words):
        at = changed(models, tmp_path / name, lambda tensors: None)
        vocabulary = {word: number for number, word in enumerate(words)}
        (at / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
        return at

    words = [f"w{number}" for number in range(150)]
    one, same = speaking("one", words), speaking("same", ["<new>", *words[1:]])
    other = speaking("other", [*words[:2], words[3], words[2], *words[4:]])
    merge_checkpoints("linear", {"one": one, "same": same}, tmp_path / "fine")
    with pytest.raises(
        ValueError, match="2 of 150 tokens of 'other' and 'one' differ .row 2 is 'w3' and 'w2'.*retoken"
    ):
        merge_checkpoints("linear", {"one": one, "other": other}, tmp_path / "out")
    merge_checkpoints("linear", {"one": one, "other": other}, tmp_path / "out", copy=["*embed*"])


def test_what_dtype_and_shapes_do_not_tell(models, tmp_path):
    """Codes are not numbers because a dtype is asked for, and heads of other widths may have the same shapes."""
    codes = changed(models, tmp_path / "codes", setting(NORM, torch.ones(64).byte()))
    for order in ({"m1": models / "m1", "codes": codes}, {"codes": codes, "m1": models / "m1"}):
        with pytest.raises(ValueError, match="is uint8 in 'codes' and float32 in 'm1'; whole numbers are codes"):
            merge_checkpoints("linear", order, tmp_path / "out", dtype="float32")
    both = {}
    for number in (4, 8):
        attention = setting("model.layers.0.attn.weight", torch.ones(64, 64))
        both[f"h{number}"] = changed(models, tmp_path / f"h{number}", attention, setting("num_attention_heads", number))
    with pytest.raises(ValueError, match="'h8' has num_attention_heads 8 and 'h4' 4: their attention is cut into"):
        merge_checkpoints("linear", both, tmp_path / "out")
    merge_checkpoints("linear", both, tmp_path / "out", copy=["*att*"])


def test_results_that_are_not_finite_are_refused(models, tmp_path):
    chosen, _ = arguments("linear", models)
    with pytest.raises(ValueError, match="the merged .* has numbers that float16 can't hold .above 6.55e.04."):
        merge_checkpoints(
            "linear", chosen, tmp_path / "out", dtype="float16", weights=[1e6, 0, 0], params={"normalize": False}
        )


def test_heads_tied_here_and_not_there(models, tmp_path):
    head = torch.randn(150, 64)
    tied = changed(models, tmp_path / "tied", lambda t: None, setting("tie_word_embeddings", True))
    own = changed(models, tmp_path / "own", setting("lm_head.weight", head), setting("tie_word_embeddings", False))
    with pytest.raises(ValueError, match="head of its own"):
        merge_checkpoints("linear", {"tied": tied, "own": own}, tmp_path / "out")
    with pytest.raises(ValueError, match="head of its own"):
        merge_checkpoints("linear", {"own": own, "tied": tied}, tmp_path / "out")

    def stored(tensors):
        tensors["lm_head.weight"] = tensors[EMBED].clone()

    twice = changed(models, tmp_path / "twice", stored, setting("tie_word_embeddings", True))
    for number, order in enumerate(({"tied": tied, "twice": twice}, {"twice": twice, "tied": tied})):
        merge_checkpoints("linear", order, tmp_path / f"out{number}")
        assert "lm_head.weight" not in load_file(tmp_path / f"out{number}" / "model.safetensors")


def test_output_that_exists_and_a_full_disk(models, tmp_path, monkeypatch):
    chosen, _ = arguments("linear", models)
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out exists; give another directory"):
        merge_checkpoints("linear", chosen, tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="link exists; give another directory"):
        merge_checkpoints("linear", chosen, tmp_path / "link")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/out can't be made, because .*file is a file"):
        merge_checkpoints("linear", chosen, tmp_path / "file" / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(ValueError, match="the result takes .* kB, and .* has 1 B free; make room"):
        merge_checkpoints("linear", chosen, tmp_path / "other")


def test_other_parameters_begin_anew(models, tmp_path, capsys):
    assert killed_at(4, "ties", models, tmp_path / "out") == -signal.SIGKILL
    fresh = run("ties", models, tmp_path / "fresh", params={"density": 0.7})
    assert run("ties", models, tmp_path / "out", params={"density": 0.7}) == fresh
    assert "was begun with other inputs or parameters; it is begun anew" in capsys.readouterr().out


def test_nothing_stays_of_an_earlier_begin(models, tmp_path):
    """One that was killed when everything lay there: its index would name files that are not the next one's."""
    (tmp_path / "out.partial").mkdir()
    for name in ("model.safetensors.index.json", "chat_template.jinja", "tokenizer.json", "merge.json"):
        (tmp_path / "out.partial" / name).write_text('{"weight_map": {"w": "gone.safetensors"}}')
    run("linear", models, tmp_path / "out")
    found = {file.name for file in (tmp_path / "out").iterdir()}
    assert found == {"model.safetensors", "config.json", "merge.json"}


def test_what_was_damaged_meanwhile_is_made_again(models, tmp_path):
    whole = run("ties", models, tmp_path / "whole")
    assert killed_at(9, "ties", models, tmp_path / "out") == -signal.SIGKILL
    file = tmp_path / "out.partial" / "model.safetensors"
    length = int.from_bytes(file.read_bytes()[:8], "little")
    with open(file, "r+b") as stream:
        stream.seek(8 + length)
        stream.write(bytes(file.stat().st_size - 8 - length))
    assert run("ties", models, tmp_path / "out") == whole


def test_two_processes_do_not_write_the_same_output(models, tmp_path):
    import fcntl

    (tmp_path / "out.partial").mkdir()

    def busy():
        with open(tmp_path / "out.partial" / ".lock", "w") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            (tmp_path / "locked").touch()
            time.sleep(60)

    child = forked(busy)
    while not (tmp_path / "locked").exists():
        time.sleep(0.01)
    with pytest.raises(ValueError, match="another process is writing"):
        run("linear", models, tmp_path / "out")
    os.kill(child, signal.SIGKILL)
    ended(child)


def test_command_line(models, tmp_path):
    command = [sys.executable, "-m", "fusion.cli", "merge", "ties", "--base", str(models / "m0")]
    command += ["--model", f"{models / 'm1'}:0.5", "--model", str(models / "m2"), "--param", "density=0.4"]
    command += ["--out", str(tmp_path / "out"), "--threads", "1", "--copy", "*norm*", "--post", "{lines: {alpha: 0.5}}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert re.search(r"out: 11 tensors \(6 merged, 1 equal, 4 copied\), .* peak memory", done.stdout)
    same = merge_checkpoints(
        "ties",
        {"m1": models / "m1", "m2": models / "m2"},
        tmp_path / "same",
        base=models / "m0",
        weights=[0.5, 1.0],
        params={"density": 0.4},
        copy=["*norm*"],
        post=[{"lines": {"alpha": 0.5}}],
    )
    assert raw(same.path) == raw(tmp_path / "out")
    done = subprocess.run([*command, "--param", "densty=1"], capture_output=True, text=True, env=environment)
    assert done.returncode == 1 and "out exists" in done.stderr
    heavy = "import sys; from fusion.cli import main; sys.argv[1:] = sys.argv[1:]; "
    heavy += "import atexit; atexit.register(lambda: print('transformers' in sys.modules)); main()"
    done = subprocess.run(
        [sys.executable, "-c", heavy, *command[3:-1], "{lines: {alpha: 1}}", "--out", str(tmp_path / "light")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.stdout.strip().endswith("False"), "a merge needs no transformers"


TYPED = [
    (["--threads", "0"], "threads is 0; at least 1 is needed"),
    (["--memory", "12parsecs"], "memory is '12parsecs'; a size like 512MiB or 5GB is needed"),
    (["--memory", "1kB"], "regions of 4096 elements of 2 models take 1 MiB; allow at least that"),
    (["--shard-size", "x"], "shard_size is 'x'; a size like"),
    (["--param", "density"], "--param density: NAME=VALUE is needed"),
    (["--param", "densty=0.5"], "ties has no parameter 'densty'; did you mean 'density'?"),
    (["--param", "density=[0.1]"], "ties.density: 1 values for 2 models"),
    (["--param", "density=2"], "density is 2; allowed are numbers from 0 to 1"),
    (["--param", "combine=sum", "--param", "normalize=true"], "combine is 'sum' and normalize is true"),
    (["--param", "density={"], "'{' is not YAML: while parsing a flow node"),
    (["--param", "density=1", "--param", "density=0.5"], "--param density=0.5: 'density' is given twice"),
    (["--post", "line"], "unknown post word 'line'; did you mean 'lines'?"),
    (["--dtype", "floatt32"], "dtype 'floatt32' is unknown; did you mean 'float32'?"),
    (["--device", "gpu"], "--device gpu: there is none such here; allowed: cpu"),
    (["--tokenizer", "m9"], "tokenizer: no model is called 'm9'; there are base, m1, m2"),
    (["--model", "m1:half"], "there is no directory m1:half"),
    (
        ["--model", "some/one"],
        "there is no directory some/one; what lies on the hub goes into a recipe: {hub: some/one}",
    ),
    (["--model", "no.gguf"], "no.gguf: there is no file"),
    (["--only", "nothing*"], "nothing"),
]


@pytest.mark.parametrize(
    ("more", "sentence"), TYPED, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_what_is_typed_wrong_gets_a_sentence(more, sentence, models, tmp_path):
    both = ["--base", str(models / "m0"), "--model", str(models / "m1"), "--model", str(models / "m2")]
    done = CliRunner().invoke(main, ["merge", "ties", *both, "--out", str(tmp_path / "out"), *more])
    assert done.exit_code == 1 and sentence in done.output and isinstance(done.exception, SystemExit)
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_the_command_warns_of_a_wrong_base(models, tmp_path):
    stranger = changed(models, tmp_path / "stranger", lambda t: t.update({n: torch.randn(t[n].shape) for n in LARGE}))
    both = ["--base", str(models / "m0"), "--model", str(models / "m1"), "--model", str(stranger)]
    done = CliRunner().invoke(main, ["merge", "ties", *both, "--out", str(tmp_path / "out")])
    sentence = "stranger is as far from m0 as a model that has nothing to do with it"
    assert done.exit_code == 0 and sentence in done.output and "m1 is as far" not in done.output
    assert sentence in (tmp_path / "out" / "README.md").read_text()


def test_the_card_of_a_merge_makes_it_again(models, tmp_path):
    """What it says is what was typed; a directory in the hub's cache goes by its repository."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    hub = tmp_path / "hub" / "models--some-one--a_model" / "snapshots" / commit
    shutil.copytree(models / "m1", hub)
    typed = ["merge", "ties", "--base", str(models / "m0"), "--model", f"{hub}:0.5", "--model", str(models / "m2")]
    typed += ["--param", "density={match: {'*.0.*': 1.0, '*': 0.5}}", "--copy", "*norm*", "--seed", "3"]
    done = CliRunner().invoke(main, [*typed, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["tags"] == ["fusion", "merge"] and front["base_model_relation"] == "merge"
    assert front["base_model"] == ["some-one/a_model"] and f"some-one/a\\_model at {commit}" in card
    assert "Yadav et al. 2023, arXiv:2306.01708" in card
    said = yaml.safe_load(card.split("```yaml\n")[1].split("```")[0])
    assert said["params"] == {"density": {"match": {"*.0.*": 1.0, "*": 0.5}}} and said["copy"] == ["*norm*"]
    assert [one["weight"] for one in said["models"].values()] == [0.5, 1.0] and said["seed"] == 3
    again = shlex.split(next(line for line in card.splitlines() if line.startswith("    fusion merge ")))[1:]
    assert "dtype" not in card, "nothing that was not said"
    again[again.index(str(tmp_path / "out"))] = str(tmp_path / "again")
    assert CliRunner().invoke(main, again).exit_code == 0 and raw(tmp_path / "again") == raw(tmp_path / "out")
    shown = CliRunner().invoke(main, ["show", str(tmp_path / "out")]).output
    for text in ("merge.json", "ties", "density", "inputs base", "11 tensors with a checksum each"):
        assert text in shown


def test_memory_does_not_grow_with_a_tensor(tmp_path):
    """One tensor of 400 MB a model, sparse on disk, in a process of its own."""
    rows, width = 24_576, 8192
    for number in range(3):
        size = rows * width * 2
        table = {"w": {"dtype": "BF16", "shape": [rows, width], "data_offsets": [0, size]}}
        header = json.dumps(table).encode()
        (tmp_path / f"m{number}").mkdir()
        with open(tmp_path / f"m{number}" / "model.safetensors", "wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + size)
            file.seek(8 + len(header) + 2 * number)
            file.write(b"\x80\x3f")
    code = (
        "import sys; from fusion.merge import merge_checkpoints as merge; "
        "from pathlib import Path; at = Path(sys.argv[1]); "
        "found = merge('model_stock', {'a': at / 'm1', 'b': at / 'm2'}, at / 'out', base=at / 'm0', memory='64MiB'); "
        "print(found.metrics['peak_rss'])"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    # started by a small process: what starts another one counts in its peak
    starter = "import subprocess, sys; sys.exit(subprocess.call(sys.argv[1:]))"
    command = [sys.executable, "-c", starter, sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 450e6
