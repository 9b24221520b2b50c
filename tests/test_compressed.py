"""Compressed task vectors on disk: what is read back is what the method makes of one model, at the size promised."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from fusion import _compressed
from fusion._compressed import compress, open_compressed
from fusion.checkpoint import Checkpoint, open_source
from fusion.merge import merge_state_dicts, merge_tensors

N = 70_001  # more than one page, no whole number of bytes


def noise(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def saved(directory, tensors, dtype=torch.float32):
    directory.mkdir()
    cast = {name: x.to(dtype).contiguous() if x.is_floating_point() else x for name, x in tensors.items()}
    save_file(cast, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "who": directory.name}))
    return Checkpoint.open(directory)


def pair(tmp_path, dtype=torch.float32):
    base = {"long": noise(0, N), "w": noise(1, 300, 130), "same": noise(2, 9), "scalar": noise(3), "empty": noise(4, 0)}
    moved = {name: x + 0.05 * noise(7, *x.shape) for name, x in base.items() if name != "same"}
    moved["w"][:100] = base["w"][:100]  # entries that did not move at all
    base["ids"] = moved["ids"] = torch.arange(6)
    return saved(tmp_path / "base", base, dtype), saved(tmp_path / "model", {**moved, "same": base["same"]}, dtype)


def whole(source, name):
    entry = source.entries[name]
    out = torch.full((entry.numel,), torch.nan if entry.dtype.is_floating_point else 0, dtype=entry.dtype)
    source.read(name, 0, entry.numel, out)
    return out.view(entry.shape)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("one_bit", {}),
        ("one_bit", {"scale": 0.5}),
        ("compeft", {"density": 0.1}),
        ("compeft", {"density": 1.0, "alpha": 0.7}),
        ("compeft", {"density": 0.0}),
    ],
)
def test_what_is_read_is_what_the_method_makes(tmp_path, dtype, method, params):
    base, model = pair(tmp_path, dtype)
    packed = compress(method, model, base, tmp_path / "packed", params)
    assert packed.config["who"] == "model" and list(packed.entries) == list(base.entries)
    for name in ("long", "w", "scalar"):
        start, end = whole(base, name).float(), whole(model, name).float()
        expected = merge_tensors(method, [end], base=start, **params)
        torch.testing.assert_close(whole(packed, name), expected, atol=1e-7, rtol=1e-6)
        assert packed.entries[name].dtype == torch.float32 and packed.entries[name].stored == dtype
    for name in ("same", "ids", "empty"):
        assert torch.equal(whole(packed, name), whole(base, name)) and packed.entries[name] == base.entries[name]


@pytest.mark.parametrize("method", ["one_bit", "compeft"])
def test_any_region_is_the_region_of_the_whole(tmp_path, method):
    base, model = pair(tmp_path)
    packed = compress(method, model, base, tmp_path / "packed")
    everything = whole(packed, "long")
    for start, stop in ((0, 1), (3, 3), (5, 4096), (65_535, 65_537), (65_536, N), (N - 1, N), (8, 70_000)):
        into = torch.full((stop - start,), torch.nan)
        packed.read("long", start, stop, into)
        assert torch.equal(into, everything[start:stop]), (start, stop)


@pytest.mark.parametrize("method", ["one_bit", "compeft"])
def test_chunks_leave_no_trace(tmp_path, method, monkeypatch):
    base, model = pair(tmp_path)
    compress(method, model, base, tmp_path / "a")
    monkeypatch.setattr(_compressed, "CHUNK", _compressed.PAGE)
    compress(method, model, base, tmp_path / "b")
    for file in sorted(one.name for one in (tmp_path / "a").iterdir()):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_sizes_are_a_bit_and_a_bit_and_a_density(tmp_path):
    n = 1 << 20
    base = saved(tmp_path / "base", {"w": noise(0, 1024, 1024)}, torch.bfloat16)
    model = saved(tmp_path / "model", {"w": noise(0, 1024, 1024) + noise(1, 1024, 1024)}, torch.bfloat16)
    for method, params, bits in (
        ("one_bit", {}, 1),
        ("compeft", {"density": 0.05}, 1.05),
        ("compeft", {"density": 0.5}, 1.5),
    ):
        out = tmp_path / f"{method}{bits}"
        compress(method, model, base, out, params)
        size = (out / _compressed.FILE).stat().st_size
        assert n * bits / 8 <= size <= n * bits / 8 * 1.01 + 1000, (method, size)
        assert (out / _compressed.SETTINGS).stat().st_size < 300
    assert (model.path / "model.safetensors").stat().st_size / size > 10


def test_the_file_is_what_its_docstring_says(tmp_path):
    base = saved(tmp_path / "base", {"w": torch.zeros(10)})
    model = saved(tmp_path / "model", {"w": torch.tensor([1.0, -1, 0, 3, -3, 0, 0, 0, 5, -5])})
    compress("one_bit", model, base, tmp_path / "one")
    held = load_file(tmp_path / "one" / _compressed.FILE)
    assert {name: x.tolist() for name, x in held.items()} == {
        "w/scale": pytest.approx(1.8), "w/signs": [0b00001001, 0b01]}  # fmt: skip
    compress("compeft", model, base, tmp_path / "few", {"density": 0.4, "alpha": 2.0})
    held = load_file(tmp_path / "few" / _compressed.FILE)
    scale = held.pop("w/scale")
    assert float(scale) == pytest.approx(2 * 7.0**0.5)
    lists = {name: x.tolist() for name, x in held.items()}
    assert lists == {"w/kept": [0b00011000, 0b11], "w/signs": [0b0101], "w/before": [0]}
    settings = json.loads((tmp_path / "few" / _compressed.SETTINGS).read_text())
    assert settings["method"] == "compeft" and settings["params"] == {"density": 0.4, "alpha": 2.0}


def test_it_is_a_model_wherever_models_are_opened(tmp_path):
    base, model = pair(tmp_path)
    packed = compress("one_bit", model, base, tmp_path / "packed")
    again = open_source(tmp_path / "packed", base)
    assert torch.equal(whole(again, "w"), whole(packed, "w"))


def test_bad_input_gets_a_sentence(tmp_path):
    base, model = pair(tmp_path)
    compress("one_bit", model, base, tmp_path / "packed")
    with pytest.raises(ValueError, match="only on top of its base; give it"):
        open_compressed(tmp_path / "packed", None)
    with pytest.raises(ValueError, match="was made from another base than .*model: the check of 3 tensors is"):
        open_compressed(tmp_path / "packed", model)
    with pytest.raises(ValueError, match="exists; compressed task vectors go into a new directory"):
        compress("one_bit", model, base, tmp_path / "packed")
    with pytest.raises(ValueError, match="'ties' does not compress; there are compeft, one_bit"):
        compress("ties", model, base, tmp_path / "new")
    with pytest.raises(ValueError, match="no parameter 'densty'; did you mean 'density'"):
        compress("compeft", model, base, tmp_path / "new", {"densty": 0.2})
    tensors = {name: whole(model, name) for name in model.entries}
    for change, sentence in (
        ({"w": torch.zeros(3)}, r"'w' is \(3,\) in .*odd0 and \(300, 130\)"),
        ({"other": torch.zeros(3)}, "has no tensor 'other'"),
        ({"ids": torch.arange(6) + 1}, "'ids' holds whole numbers"),
    ):
        odd = saved(tmp_path / f"odd{len(list(tmp_path.glob('odd*')))}", {**tensors, **change})
        with pytest.raises(ValueError, match=sentence):
            compress("one_bit", odd, base, tmp_path / "new")
    less = saved(tmp_path / "less", {"w": tensors["w"]})
    with pytest.raises(ValueError, match="has no tensor 'empty', .* are missing"):
        compress("one_bit", less, base, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_density_may_go_by_layer(tmp_path):
    names = [f"model.layers.{layer}.w" for layer in range(3)]
    base = saved(tmp_path / "base", {name: noise(0, 1000) for name in names})
    model = saved(tmp_path / "model", {name: noise(0, 1000) + noise(1, 1000) for name in names})
    packed = compress("compeft", model, base, tmp_path / "packed", {"density": {"layers": [0.1, 0.3]}})
    moved = [int((whole(packed, name) != whole(base, name)).sum()) for name in names]
    assert moved == [100, 200, 300]
    with pytest.raises(ValueError, match="scope is model, and task vectors are compressed tensor by tensor"):
        compress("compeft", model, base, tmp_path / "new", {"scope": "model"})
    spoilt = {name: whole(model, name) for name in names} | {names[1]: torch.full((1000,), torch.nan)}
    with pytest.raises(ValueError, match="model.layers.1.w of .*spoilt has NaN or infinity in it"):
        compress("one_bit", saved(tmp_path / "spoilt", spoilt), base, tmp_path / "new")


# the methods


def test_one_bit_by_hand():
    base, one, other = torch.zeros(4), torch.tensor([1.0, -2.0, 0.0, 5.0]), torch.tensor([-1.0, -1.0, -1.0, 1.0])
    merged = merge_tensors("one_bit", [one, other], base=base, weights=[0.5, 2.0], scale=0.5)
    assert merged.tolist() == [0.5 * (1 - 2), 0.5 * (-1 - 2), 0.5 * (-1 - 2), 0.5 * (1 + 2)]  # means 2 and 1
    still = merge_tensors("one_bit", [base.clone(), other], base=base)
    assert torch.equal(still, other)


def test_compeft_by_hand():
    base, one = torch.zeros(5), torch.tensor([1.0, -3.0, 3.0, 0.5, -1.5])
    deviation = float(one.std(correction=0))
    for density, signs in (
        (0.2, [0, -1, 1, 0, 0]),  # one of five, and what ties with it
        (0.6, [0, -1, 1, 0, -1]),
        (1.0, [1, -1, 1, 1, -1]),
        (0.0, [0, 0, 0, 0, 0]),
    ):
        merged = merge_tensors("compeft", [one], base=base, density=density, alpha=2.0, scale=0.5)
        torch.testing.assert_close(merged, torch.tensor(signs, dtype=torch.float32) * deviation)
    both = merge_tensors("compeft", [one, one * 2], base=base, density=[0.2, 0.6], alpha=[1.0, 0.5], weights=[1, 3])
    expected = torch.tensor([0.0, -1, 1, 0, 0]) + 3 * torch.tensor([0.0, -1, 1, 0, -1])
    torch.testing.assert_close(both, expected * deviation)


def test_compeft_of_the_whole_model_has_one_threshold_and_one_magnitude():
    base = {"a": torch.zeros(3), "b": torch.zeros(7)}
    model = {"a": torch.tensor([10.0, -9.0, 8.0]), "b": noise(1, 7) / 10}
    merged = merge_state_dicts("compeft", [model], base=base, density=0.3, scope="model")
    deviation = torch.cat([model["a"], model["b"]]).std(correction=0)
    torch.testing.assert_close(merged["a"], torch.tensor([1.0, -1.0, 1.0]) * deviation)
    assert torch.equal(merged["b"], base["b"])


def test_compeft_reports_what_it_kept():
    made = merge_tensors(
        "compeft", [noise(1, 1000), noise(2, 1000)], base=torch.zeros(1000), density=[0.1, 0.3], outputs=True
    )
    assert made.extras["kept"].value.tolist() == [100, 300]
    with pytest.raises(ValueError, match="density"):
        merge_tensors("compeft", [noise(1, 9)], base=torch.zeros(9), density=1.5)


def test_a_recipe_compresses_and_another_reads(tmp_path):
    import yaml

    from fusion import recipe
    from fusion.plan import plan
    from fusion.run import main

    base, model = pair(tmp_path)
    one = {
        "models": {"base": {"path": "./base"}, "tuned": {"path": "./model"}},
        "steps": [{"compress": {"out": "small", "model": "tuned", "base": "base"}}],
        "result": "small",
    }
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(one))
    assert main([str(tmp_path / "one.yaml"), "--out", str(tmp_path / "runs")]) == 0
    made = tmp_path / "runs" / "one" / "small"
    assert json.loads((made / "metrics.json").read_text())["bits_per_entry"] < 1.5
    two = {
        "models": {"base": {"path": "./base"}, "again": {"path": "runs/one/small/task_vector", "base": "base"}},
        "steps": [{"merge": {"out": "sum", "method": "linear", "models": ["again", "base"]}}],
        "result": "sum",
    }
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(two))
    assert main([str(tmp_path / "two.yaml"), "--out", str(tmp_path / "runs")]) == 0
    got = load_file(tmp_path / "runs" / "two" / "sum" / "model.safetensors")
    again = open_compressed(made / "task_vector", base)
    torch.testing.assert_close(got["w"], (whole(again, "w") + whole(base, "w")) / 2)
    saved(tmp_path / "other", {"w": torch.zeros(3)})
    for fields, sentence in (
        ({"method": "compeft", "params": {"density": 3}}, "compress: density is 3; allowed are numbers from 0 to 1"),
        ({"model": "other"}, "compress: .*other has no tensor 'empty', which .*base has"),
    ):
        wrong = {**one, "models": {**one["models"], "other": {"path": "./other"}}}
        wrong["steps"] = [{"compress": {**one["steps"][0]["compress"], **fields}}]
        (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(wrong))
        with pytest.raises(ValueError, match=sentence):
            plan(recipe.load(tmp_path / "wrong.yaml"), tmp_path / "runs")
    del two["models"]["again"]["base"]
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(two))
    with pytest.raises(ValueError, match="compressed task vector; name the model it is on"):
        plan(recipe.load(tmp_path / "two.yaml"), tmp_path / "runs")
