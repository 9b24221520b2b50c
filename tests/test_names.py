"""Tables of names: every rule by hand, every tensor accounted for, and regions read through them as they would lie."""

import json
import random
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignment.names import correspond, mapped, rules
from fusion._names import renamed
from fusion.checkpoint import Checkpoint
from fusion.merge import blends, merge_checkpoints
from fusion.plan import plan
from fusion.recipe import load

LAYERS = ("0", "1")


def fused() -> dict[str, torch.Tensor]:
    """A model with one tensor for queries, keys and values, one transposed for gate and up, and two MLPs."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"qkv": (12, 4), "up": (4, 10), "text_mlp": (3, 4), "image_mlp": (3, 4), "norm": (4,)}
    found = {
        f"layers.{n}.{name}": torch.randn(shape, generator=generator) for n in LAYERS for name, shape in shapes.items()
    }
    return found | {"embed": torch.randn(5, 4, generator=generator), "eye": torch.randn(2, 2, generator=generator)}


def apart() -> dict[str, torch.Tensor]:
    """The same network's relative with a tensor each, norms in pairs, and one thing that the other lacks."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"q": (6, 4), "k": (3, 4), "v": (3, 4), "gate": (4, 6), "up": (4, 4), "mlp": (3, 4)}
    shapes |= {"norm.0": (4,), "norm.1": (4,)}
    found = {f"h.{n}.{name}": torch.randn(shape, generator=generator) for n in LAYERS for name, shape in shapes.items()}
    return found | {"embed": torch.randn(5, 4, generator=generator), "step": torch.tensor(3.0)}


TABLE = [
    {"concatenate": ["h.*.q", "h.*.k", "h.*.v"], "to": "layers.*.qkv"},
    {"concatenate": ["h.*.gate", "h.*.up"], "to": "layers.*.up", "axis": 1},
    {"duplicate": "h.*.mlp", "to": ["layers.*.text_mlp", "layers.*.image_mlp"]},
    {"leave": ["h.*.norm.1", "step"]},
    {"rename": "h.*.norm.0", "to": "layers.*.norm"},
]
BACK = [
    {"split": "layers.*.qkv", "to": ["h.*.q", "h.*.k", "h.*.v"]},
    {"split": "layers.*.up", "to": ["h.*.gate", "h.*.up"], "axis": 1},
    {"rename": "layers.*.text_mlp", "to": "h.*.mlp"},
    {"duplicate": "layers.*.norm", "to": ["h.*.norm.0", "h.*.norm.1"]},
    {"leave": ["eye", "layers.*.image_mlp"]},
]


def by_hand(one: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found = {"embed": one["embed"]}
    for n in LAYERS:
        found[f"layers.{n}.qkv"] = torch.cat([one[f"h.{n}.{name}"] for name in "qkv"])
        found[f"layers.{n}.up"] = torch.cat([one[f"h.{n}.gate"], one[f"h.{n}.up"]], 1)
        found[f"layers.{n}.text_mlp"] = found[f"layers.{n}.image_mlp"] = one[f"h.{n}.mlp"]
        found[f"layers.{n}.norm"] = one[f"h.{n}.norm.0"]
    return found


def test_every_rule_by_hand():
    found, expected = mapped(apart(), TABLE, fused()), by_hand(apart())
    assert found.keys() == expected.keys()
    assert all(found[name].equal(tensor) for name, tensor in expected.items())
    back = mapped(fused(), BACK, apart())
    assert back.keys() == apart().keys() - {"step"}
    for n in LAYERS:
        assert torch.cat([back[f"h.{n}.{name}"] for name in "qkv"]).equal(fused()[f"layers.{n}.qkv"])
        assert back[f"h.{n}.up"].equal(fused()[f"layers.{n}.up"][:, 6:])
        assert back[f"h.{n}.norm.1"].equal(fused()[f"layers.{n}.norm"])


def test_a_plain_table_renames_by_the_first_pattern_that_fits():
    own, target = {"a.0.w": (1,), "a.1.w": (1,), "b": (2,), "c": (3,)}, {"x.0.w": (1,), "last": (1,), "b": (2,)}
    found = correspond({"a.1.*": "last", "a.*": "x.*", "c": None}, own, target)
    assert {name: one.stretches[0][0] for name, one in found.items()} == {"last": "a.1.w", "x.0.w": "a.0.w", "b": "b"}
    found = correspond({"a.0.w": ["x.0.w", "last"], "a.1.w": None, "c": None}, own, target)
    assert {name: one.stretches[0][0] for name, one in found.items()} == {"x.0.w": "a.0.w", "last": "a.0.w", "b": "b"}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda t: t[:-1],
            "nothing says what h.0.norm.0, h.1.norm.0 would be in the target; add rules, or {leave: ...}",
        ),
        (lambda t: t[1:], "nothing says what h.0.q, h.0.k, h.0.v and 3 more would be"),
        (lambda t: [*t, {"rename": "h.*.v", "to": "x"}], "no tensor that is left is called like 'h.*.v'"),
        (lambda t: [*t, {"leave": "ebmed"}], "no tensor that is left is called like 'ebmed'"),
        (lambda t: [*t, {"rename": "embed", "to": "imbed"}], "embed would be imbed, which the target does not have"),
        (lambda t: [*t, {"duplicate": "h.*.q", "to": ["layers.*.qkv", "eye"]}], "h.0.q and h.0.q would both be"),
        (lambda t: [{**t[0], "concatenate": ["h.*.q", "h.*.z"]}], "there is no tensor h.0.z"),
        (lambda t: [{**t[0], "concatenate": ["h.*.q", "h.*.gate"]}], "h.0.gate is 4 x 6 and h.0.q 6 x 4; only axis 0"),
        (lambda t: [{**t[0], "axis": 2}], "h.0.q has 2 axes, and no axis 2"),
        (lambda t: [{"rename": "embed", "to": "*"}], "'*' has more * than 'embed'"),
        (lambda t: [{"rename": "h.*.q", "too": "x"}], "rename takes to beside it, not 'too'"),
        (lambda t: [{"renam": "h.*.q", "to": "x"}], "a rule is {rename: NAME, to: NAME}, or with concatenate"),
        (lambda t: [{"split": "h.*.q", "to": "x"}], "split takes one name to two or more names"),
        (lambda t: [{"concatenate": ["a", "b"], "to": "x", "axis": -1}], "axis is a number from 0 on, not -1"),
        (lambda t: "a", "a rule is {rename: NAME"),
        (lambda t: {"a": 3}, "a: a name or a list of names is needed here, not 3"),
        (lambda t: {3: "a"}, "a table: a name or a list of names is needed here, not 3"),
    ],
)
def test_what_is_not_accounted_for_is_named(change, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        mapped(apart(), change(TABLE), fused())


def test_parts_that_do_not_add_up():
    with pytest.raises(ValueError, match=re.escape("layers.0.qkv has 12 on axis 0, and h.0.q, h.0.k have [6, 3]")):
        mapped(fused(), [{**BACK[0], "to": ["h.*.q", "h.*.k"]}], apart())
    with pytest.raises(ValueError, match="the target has no h.0.w"):
        mapped(fused(), [{**BACK[0], "to": ["h.*.q", "h.*.w"]}], apart())
    with pytest.raises(ValueError, match="what would be layers.0.norm is 4, and it is 4 x 4 in the target"):
        mapped(apart(), TABLE, {**fused(), "layers.0.norm": torch.eye(4)})
    assert str(rules(TABLE)[0]) == "concatenate h.*.q, h.*.k, h.*.v to layers.*.qkv"


@pytest.fixture
def folder(tmp_path):
    for name, tensors in (("fused", fused()), ("apart", apart())):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": name}))
    return tmp_path


@pytest.mark.parametrize("way", ["into one", "apart"])
def test_any_region_reads_as_it_would_lie(folder, way):
    names, table = (("apart", "fused"), TABLE) if way == "into one" else (("fused", "apart"), BACK)
    source, target = (Checkpoint.open(folder / name) for name in names)
    found = renamed(names[0], source, table, target)
    tensors = [load_file(folder / name / "model.safetensors") for name in names]
    whole = mapped(tensors[0], table, tensors[1])
    assert {name: entry.shape for name, entry in found.entries.items()} == {n: tuple(t.shape) for n, t in whole.items()}
    draw = random.Random(0)
    for name, tensor in whole.items():
        for _ in range(20):
            start = draw.randrange(tensor.numel())
            stop = draw.randint(start + 1, tensor.numel())
            into = torch.empty(stop - start)
            found.read(name, start, stop, into)
            assert into.equal(tensor.flatten()[start:stop]), (name, start, stop)


def test_a_merge_through_a_table(folder):
    out = folder / "out"
    given = {"base": folder / "fused", "weights": [0.6, 0.4], "names": {"apart": TABLE}}
    models = {"fused": folder / "fused", "apart": folder / "apart"}
    with pytest.raises(ValueError, match="'apart' lacks 1 of the 12 tensors to merge: eye; say with copy:"):
        merge_checkpoints("linear", models, out, **given)
    merge_checkpoints("linear", models, out, **given, copy=["eye"])
    one, other, soup = fused(), by_hand(apart()), load_file(out / "model.safetensors")
    assert soup.keys() == one.keys() and soup["eye"].equal(one["eye"])
    for name, tensor in other.items():
        torch.testing.assert_close(soup[name], 0.6 * one[name] + 0.4 * tensor)


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_a_range_of_weights_without_writing_a_model(folder, method):
    models = {"fused": folder / "fused", "apart": folder / "apart"}
    given = {"base": folder / "fused", "names": {"apart": TABLE}, "copy": ["eye"]}
    range_of = [(1.0 - n / 4, n / 4) for n in range(5)]
    found = list(blends(method, models, range_of, **given))
    assert sorted(one.name for one in folder.iterdir()) == ["apart", "fused"]
    for number, weights in enumerate(range_of):
        out = folder / f"out-{number}"
        merge_checkpoints(method, models, out, weights=weights, **given)
        written = load_file(out / "model.safetensors")
        assert found[number].keys() == written.keys()
        assert all(found[number][name].equal(tensor) for name, tensor in written.items())
    assert not found[1]["embed"].equal(found[2]["embed"]) and found[1]["eye"] is found[2]["eye"]
    with pytest.raises(ValueError, match="3 weights for 2 models"):
        next(blends(method, models, [(0.5, 0.5), (0.2, 0.3, 0.5)], **given))


def test_mixed_dtypes_and_bad_tables_are_named_while_planning(folder):
    file = folder / "apart" / "model.safetensors"
    save_file({n: t.bfloat16() if n.endswith("k") else t for n, t in load_file(file).items()}, file)
    text = "models: {fused: {path: ./fused}, apart: {path: ./apart}}\nsteps:\n  - merge:\n      out: soup\n"
    text += "      method: linear\n      base: fused\n      models: {fused: 0.5, apart: {weight: 0.5, names: %s}}\n"
    for table, sentence in (
        (json.dumps(TABLE), r"names of apart: layers.0.qkv would be h.0.q, which is float32, and h.0.k, which is bfl"),
        ("[{copy: a}]", r"steps\[0\].merge.models.apart.names: a rule is {rename: NAME"),
    ):
        (folder / "r.yaml").write_text(text % table)
        with pytest.raises(ValueError, match=sentence):
            plan(load(folder / "r.yaml"), folder / "runs")
