"""The merge step of a recipe: planned from headers, run on any number of ranks, keyed by all it depends on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusion import recipe
from fusion.merge import merge_checkpoints
from fusion.plan import plan

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 4,
    "vocab_size": 40,
    "tie_word_embeddings": True,
    "dtype": "float32",
}
CONFIG["layer_types"] = ["full", "slide", "full", "slide"]


def make(folder: Path, seed: int, change=lambda tensors: None) -> Path:
    """A checkpoint of four layers; every seed another one."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {"model.embed_tokens.weight": torch.randn(40, 16, generator=generator)}
    for layer in range(4):
        tensors[f"model.layers.{layer}.mlp.weight"] = torch.randn(16, 16, generator=generator)
        tensors[f"model.layers.{layer}.attn.weight"] = torch.randn(16, 16, generator=generator)
    tensors["model.norm.weight"] = torch.randn(16, generator=generator)
    change(tensors)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "chat_template.jinja").write_text(f"template of {folder.name}")
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, seed in (("base", 0), ("a", 1), ("b", 2)):
        make(tmp_path / name, seed)
    return tmp_path


def loaded(folder: Path, *steps: str, models: str = "base, a, b") -> recipe.Recipe:
    file = folder / "soup.yaml"
    refs = "".join(f"  {name}: {{path: ./{name}}}\n" for name in models.split(", "))
    file.write_text(f"models:\n{refs}steps:\n" + "".join(f"  - merge: {{{step}}}\n" for step in steps))
    return recipe.load(file)


def ran(folder: Path, *steps: str, models: str = "base, a, b") -> Path:
    """Runs a recipe of merges; the directory of its result."""
    loaded(folder, *steps, models=models)
    done = subprocess.run(
        [sys.executable, "-m", "fusion.run", str(folder / "soup.yaml"), "--out", str(folder / "runs")],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "runs" / "soup" / "result"


def refused(folder: Path, *steps: str, models: str = "base, a, b") -> str:
    with pytest.raises(ValueError) as error:
        plan(loaded(folder, *steps, models=models), folder / "runs")
    return str(error.value)


def test_merges_with_parameters_beside_models(folder):
    result = ran(
        folder,
        "out: soup, method: task_arithmetic, base: base, models: {a: 0.5, b: {weight: 0.25}}, params: {scale: 2.0}",
        "out: next, method: linear, models: [soup, a]",
    )
    base, a, b = (load_file(folder / name / "model.safetensors") for name in ("base", "a", "b"))
    soup = load_file(folder / "runs" / "soup" / "soup" / "model.safetensors")
    for name, tensor in soup.items():
        expected = base[name] + 2 * (0.5 * (a[name] - base[name]) + 0.25 * (b[name] - base[name]))
        torch.testing.assert_close(tensor, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(load_file(result / "model.safetensors")[name], (tensor + a[name]) / 2)
    metrics = json.loads((folder / "runs" / "soup" / "soup" / "metrics.json").read_text())
    assert metrics["weights"] == [0.5, 0.25] and metrics["weight_sum"] == 0.75 and metrics["base"] == "base"
    entry = next(one for one in metrics["tensors"] if one["name"] == "model.layers.3.mlp.weight")
    assert (entry["layer"], entry["kind"], entry["action"]) == (3, "mlp.weight", "merged")
    change = [one["model.layers.3.mlp.weight"] - base["model.layers.3.mlp.weight"] for one in (a, b)]
    assert entry["norms"] == pytest.approx([float(one.norm()) for one in change], rel=1e-5)
    cosine = float((change[0] * change[1]).sum() / change[0].norm() / change[1].norm())
    assert entry["cosines"][0][1] == pytest.approx(cosine, abs=1e-5)
    assert entry["moved"] == pytest.approx(float((2 * (0.5 * change[0] + 0.25 * change[1])).norm()), rel=1e-5)
    assert entry["conflict"] == pytest.approx(float(((change[0] * change[1]) < 0).float().mean()))
    assert (result / "chat_template.jinja").read_text() == "template of base"


def test_takes_whole_layers(folder):
    result = ran(folder, "out: tall, base: b, layers: [{model: a, take: [0, 3]}, {model: b, take: [1, 4]}]")
    a, b, tall = (load_file(one / "model.safetensors") for one in (folder / "a", folder / "b", result))
    assert len(tall) == 2 + 6 * 2
    for place, (source, index) in enumerate([(a, 0), (a, 1), (a, 2), (b, 1), (b, 2), (b, 3)]):
        for part in ("mlp", "attn"):
            assert torch.equal(
                tall[f"model.layers.{place}.{part}.weight"], source[f"model.layers.{index}.{part}.weight"]
            )
    assert torch.equal(tall["model.norm.weight"], b["model.norm.weight"])
    config = json.loads((result / "config.json").read_text())
    assert config["num_hidden_layers"] == 6
    assert config["layer_types"] == ["full", "slide", "full", "slide", "full", "slide"]


def test_layers_keep_the_window_that_their_number_gave_them(tmp_path):
    """Where the configuration counts windows off by the layer's number, as older ones do; the list, by hand."""
    local, whole = "sliding_attention", "full_attention"
    for n, (settings, kinds) in enumerate(
        [
            ({"model_type": "gemma2"}, [whole, local, whole]),
            ({"model_type": "gemma3_text", "sliding_window_pattern": 3}, [local, whole, local]),
            ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2}, [whole, local, local]),
            ({"model_type": "qwen2", "use_sliding_window": False, "max_window_layers": 2}, None),
        ]
    ):
        at = make(tmp_path / f"m{n}", n)
        said = {"num_hidden_layers": 4, "eos_token_id": [1, 2, 3, 4], **settings}
        (at / "config.json").write_text(json.dumps(said))
        takes = [{"model": "m", "take": [1, 4]}]
        made = merge_checkpoints(None, {"m": at}, tmp_path / f"out{n}", layers=takes).path
        found = json.loads((made / "config.json").read_text())
        assert found.get("layer_types") == kinds and found["num_hidden_layers"] == 3, settings
        assert found["eos_token_id"] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="layers is empty; give at least one"):
        merge_checkpoints(None, {"m": at}, tmp_path / "none", layers=[])


def test_only_copy_and_dtype(folder):
    result = ran(
        folder,
        'out: soup, method: linear, base: base, models: [a, b], only: ["*.mlp.*"], copy: ["*.0.mlp.*"], '
        "dtype: bfloat16, tokenizer: b",
    )
    base, a, b, soup = (
        load_file(one / "model.safetensors") for one in (*(folder / n for n in ("base", "a", "b")), result)
    )
    for name, tensor in soup.items():
        merging = ".mlp." in name and ".0." not in name
        assert torch.equal(tensor, ((a[name] + b[name]) / 2 if merging else base[name]).bfloat16()), name
    assert json.loads((result / "config.json").read_text())["dtype"] == "bfloat16"
    assert (result / "chat_template.jinja").read_text() == "template of b"


def test_names_map_a_text_model_into_a_larger_one(folder):
    def sighted(tensors):
        for name in list(tensors):
            tensors[f"language_model.{name}"] = tensors.pop(name)
        tensors["vision.patch.weight"] = torch.ones(4, 4)

    make(folder / "eye", 5, sighted)
    step = (
        'out: soup, method: linear, base: eye, models: {eye: 0.75, a: {weight: 0.25, names: {"*": "language_model.*"}}}'
    )
    assert "lacks 1 of the 11 tensors to merge: vision.patch.weight" in refused(folder, step, models="eye, a")
    result = ran(folder, step + ', only: ["language_model.*"]', models="eye, a")
    eye, a, soup = (load_file(one / "model.safetensors") for one in (folder / "eye", folder / "a", result))
    assert torch.equal(soup["vision.patch.weight"], eye["vision.patch.weight"])
    name = "model.layers.1.mlp.weight"
    expected = 0.75 * eye[f"language_model.{name}"] + 0.25 * a[name]
    torch.testing.assert_close(soup[f"language_model.{name}"], expected)


def test_two_ranks_run_the_step(folder):
    alone = ran(folder, "out: soup, method: ties, base: base, models: [a, b]")
    code = "import sys; from fusion.run import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "WORLD_SIZE": "2", "MASTER_ADDR": "here"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(folder / "soup.yaml"), "--out", str(folder / "two")],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": "29511"},
        )
        for rank in range(2)
    ]
    assert [one.wait(120) for one in ranks] == [0, 0]
    both = folder / "two" / "soup" / "result" / "model.safetensors"
    assert both.read_bytes() == (alone / "model.safetensors").read_bytes()


def test_key_covers_statistics_and_plugins(folder, monkeypatch):
    lab = folder / "my_lab"
    lab.mkdir()
    (lab / "half.py").write_text('"""Half."""\n\n\ndef half(tensors):\n    return tensors[0] / 2\n')
    monkeypatch.syspath_prepend(str(folder))

    def key(step):
        return plan(loaded(folder, step), folder / "runs").steps[0].key

    plugin = "out: soup, method: my_lab.half, models: [a]"
    first = key(plugin)
    (lab / "half.py").write_text('"""Half."""\n\n\ndef half(tensors):\n    return tensors[0] / 4\n')
    assert key(plugin) != first
    shapes = load_file(folder / "a" / "model.safetensors")
    for name in ("a", "b"):
        save_file({f"fisher/{n}": torch.ones(t.shape) for n, t in shapes.items()}, folder / f"{name}.safetensors")
    step = "out: soup, method: fisher, models: {a: {statistics: a.safetensors}, b: {statistics: b.safetensors}}"
    first = key(step)
    save_file({f"fisher/{n}": torch.ones(t.shape) * 2 for n, t in shapes.items()}, folder / "a.safetensors")
    assert key(step) != first
    soup = load_file(ran(folder, step) / "model.safetensors")
    assert torch.isfinite(soup["model.norm.weight"]).all()
    save_file({f"fisher/{n}": torch.ones(3) for n in shapes}, folder / "b.safetensors")
    assert "among the statistics of 'b' is 3, the tensor it is about 40 x 16" in refused(folder, step)
    one = step.replace("b: {statistics: b.safetensors}", "b: 1")
    assert "fisher needs fisher/... of model.embed_tokens.weight of every model; 'b' has none" in refused(folder, one)


PLAIN = "out: soup, method: ties, base: base, models: "


@pytest.mark.parametrize(
    "step, sentence",
    [
        ("out: s, method: tis, models: [a]", "steps[0].merge.method: unknown merge method 'tis'; did you mean 'ties'?"),
        (
            PLAIN + "[a, b], params: {densty: 0.1}",
            "merge.params: ties has no parameter 'densty'; did you mean 'density'?",
        ),
        (PLAIN + "{a: {wieght: 1}}", "merge.models.a: there is no 'wieght' here; did you mean 'weight'?"),
        (PLAIN + "{a: {weight: x}}", "merge.models.a.weight: a number is needed here"),
        (PLAIN + "{a: {scale: 2.0}}", "ties's 'scale' is one for all models; give it in params"),
        (PLAIN + "[a, b], params: {density: [0.1]}", "density: 1 values for 2 models"),
        (PLAIN + "[a, b], params: {density: {layers: []}}", "layers is empty"),
        (PLAIN + "[a, c]", "there is no model 'c'"),
        ("out: s, method: ties, models: [a, b]", "give it: base"),
        ("out: s, method: slerp, models: [a, b]", "needs 't'"),
        ("out: s, models: [a, b]", "either a method, which merges, or layers"),
        ("out: s, method: linear", "merge needs 'models'"),
        (PLAIN + '[a], only: ["*.mpl.*"]', "only: no tensor is called like '*.mpl.*'"),
        (PLAIN + "[a], dtype: float23", "dtype 'float23' is unknown"),
        (PLAIN + "[a], memory: lots", "memory is 'lots'; a size like 512MiB"),
        (PLAIN + "[a], tokenizer: nobody", "tokenizer: no model is called 'nobody'"),
        (PLAIN + "[a], post: [{lines: {}}]", "lines needs 'alpha'"),
        (PLAIN + "[a], rank: 4", "rank: it is of an adapter"),
        ("out: s, layers: [{model: a, take: [2, 6]}]", "take: 2 to 6 of 'a', which has 4 layers (0 to 3)"),
        ("out: s, layers: [{model: a, take: 3}]", "two whole numbers [first, end]"),
        ("out: s, layers: [{model: a, take: [0, 2]}], params: {x: 1}", "'params' has nothing to say to that"),
    ],
)
def test_plan_refuses_in_sentences(step, sentence, folder):
    assert sentence in refused(folder, step)


def test_a_tensor_that_memory_does_not_hold_is_said(folder, capsys):
    """By the plan and by the merge, with both numbers: 16 x 2,048 in float32, twice each of two models, and four."""
    wide = {"model.layers.0.mlp.weight": torch.randn(16, 2048), "model.norm.weight": torch.ones(16)}
    for name in ("base", "a", "b"):
        save_file({n: x + 0.1 * torch.randn(x.shape) for n, x in wide.items()}, folder / name / "model.safetensors")
    said = "iso_c goes by whole tensors, and one like model.layers.0.mlp.weight (16 x 2048) takes about 1.0 MB at once"
    step = "out: s, method: iso_c, base: base, models: [a, b], memory: "
    assert plan(loaded(folder, step + "2MB"), folder / "runs").steps[0].notes == ()
    (note,) = plan(loaded(folder, step + "1MB"), folder / "runs").steps[0].notes
    assert note == said + ", more than memory (1.0 MB): what does not fit is worked on alone"
    both = {name: folder / name for name in ("a", "b")}
    merge_checkpoints("iso_c", both, folder / "out", base=folder / "base", memory="1MB")
    assert note in capsys.readouterr().out
    merge_checkpoints("linear", both, folder / "plain", base=folder / "base", memory="1MB")
    assert "at once" not in capsys.readouterr().out
    for seed, name in enumerate(("base", "a", "b")):
        experts = torch.randn(2, 40, 1024, generator=torch.Generator().manual_seed(seed))
        save_file({"experts": experts}, folder / name / "model.safetensors")
    (note,) = plan(loaded(folder, step.replace("iso_c", "della") + "1MB"), folder / "runs").steps[0].notes
    assert note.startswith(
        "della goes by whole rows, and one of a tensor like experts (2 x 40 x 1024) takes about 3.1 MB"
    )
    for memory in ("1MB", "99MB"):
        merge_checkpoints("della", both, folder / memory, base=folder / "base", memory=memory)
    assert len({(folder / one / "model.safetensors").read_bytes() for one in ("1MB", "99MB")}) == 1
