"""The table of a network: its parts tile its tensors, its spaces have the sizes of its config, bad input is named."""

import json
import math

import pytest
import torch
import transformers
from safetensors.torch import load_file

from alignment import find_family
from alignment._acts import Index, Matrix, Turn
from alignment._groups import draw, why_not
from alignment.spaces import GROUPS, Norm, Part, Space, Spaces
from tests.networks import CASES, NETWORKS, build, network


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}{case[1]}")
def test_a_saved_file_is_spelled_as_the_table(case, tmp_path):
    """Names in a file may differ from the module's: GPT-NeoX's head, experts."""
    name, config, variants = NETWORKS[case[0]]
    build(name, getattr(transformers, config)(**variants[case[1]])).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    find_family(json.loads((tmp_path / "config.json").read_text()), tensors).check(tensors)


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_parts_tile_the_tensors(case):
    config, tensors, _ = network(*case)
    spaces = find_family(config)
    spaces.check(tensors)
    seen = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    for part in spaces.parts:
        assert len(part.names) == 1
        if part.names[0] in seen:
            part.view(seen[part.names[0]]).add_(1)
    for name, count in seen.items():
        assert (count == 1).all(), f"{name} is not tiled by its parts"


def test_spaces_of_grouped_queries():
    config, _, _ = network("llama")
    spaces = find_family(config)
    assert spaces.by_name["residual"] == Space("residual", 24, "signed permutation")
    assert spaces.by_name["layers.1.kv"] == Space("layers.1.kv", 2, "permutation")
    assert spaces.by_name["layers.1.q"] == Space("layers.1.q", 2, "permutation", "layers.1.kv")
    assert spaces.by_name["layers.1.qk"] == Space("layers.1.qk", 6, "pair turns", "layers.1.kv")
    assert spaces.by_name["layers.1.vo"] == Space("layers.1.vo", 6, "general linear", "layers.1.kv")
    assert spaces.by_name["layers.1.mlp"] == Space("layers.1.mlp", 40, "scaled permutation")
    assert spaces.copies(spaces.by_name["layers.1.vo"]) == 2
    output = spaces.by_key["layers.0.o.weight"]
    assert [(axis.space, axis.role) for axis in output.axes] == [
        ("residual", "w"),
        ("layers.0.kv", "r"),
        ("layers.0.q", "r"),
        ("layers.0.vo", "r"),
    ]
    assert spaces.within_axis(output, 3) == 1 and spaces.within_axis(output, 0) is None


def test_partial_rotary_splits_heads():
    spaces = find_family(network("gpt_neox")[0])
    assert (spaces.by_name["layers.0.qk"].size, spaces.by_name["layers.0.qk"].group) == (4, "pair turns")
    assert (spaces.by_name["layers.0.qk_rest"].size, spaces.by_name["layers.0.qk_rest"].group) == (4, "general linear")


def test_views_share_memory_and_stacks_are_read():
    fused = torch.arange(36.0).view(12, 3)
    part = Part("v", ("qkv",), (12, 3), (2, 3, 2, 3), ((1, 2, 1),), find(2, 2, 3))
    assert part.read({"qkv": fused})[1, 0].tolist() == fused[10].tolist()
    part.view(fused).zero_()
    assert fused[[4, 5, 10, 11]].eq(0).all() and fused[[3, 9]].ne(0).all()
    stack = Part("e", ("a", "b"), (3,), (2, 3), (), find(2, 3))
    assert stack.read({"a": torch.ones(3), "b": torch.zeros(3)}).tolist() == [[1, 1, 1], [0, 0, 0]]


def find(*sizes):
    from alignment.spaces import Axis

    return tuple(Axis(size) for size in sizes)


def test_json_holds_the_whole_table():
    for case in (("llama", 0), ("gpt2", 0), ("bert", 1), ("mixtral", 0)):
        spaces = find_family(network(*case)[0])
        assert Spaces.from_json(spaces.to_json()) == spaces
    assert Spaces.from_json(spaces.relabel({1: 0}).to_json()) == spaces.relabel({1: 0})
    assert all(isinstance(norm, Norm) for norm in spaces.norms)


def test_layers_are_called_otherwise():
    spaces = find_family(network("llama")[0]).relabel({1: 0})
    assert (
        "layers.0.qk" in spaces.by_name and "unmatched.0.qk" in spaces.by_name and "layers.1.qk" not in spaces.by_name
    )
    assert spaces.by_key["layers.0.q.weight"].names == ("model.layers.1.self_attn.q_proj.weight",)
    assert spaces.by_name["layers.0.qk"].within == "layers.0.kv"


def test_bad_checkpoints_get_a_sentence():
    config, tensors, _ = network("llama")
    spaces = find_family(config)
    with pytest.raises(ValueError, match="model.norm.weight of its config is not in the checkpoint"):
        spaces.check({name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"})
    with pytest.raises(ValueError, match="no space is known for extra.weight"):
        spaces.check({**tensors, "extra.weight": torch.ones(1)})
    with pytest.raises(ValueError, match=r"model.norm.weight has shape \(25,\), and its config gives 24"):
        spaces.check({**tensors, "model.norm.weight": torch.ones(25)})
    tied, tensors, _ = network("llama", 1)
    head = torch.zeros_like(tensors["model.embed_tokens.weight"])
    with pytest.raises(ValueError, match="ties lm_head.weight to model.embed_tokens.weight, and the two differ"):
        find_family(tied).check({**tensors, "lm_head.weight": head})
    alias = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}
    carried = find_family(tied).random_symmetry(0).carry(alias)
    assert carried["lm_head.weight"] is carried["model.embed_tokens.weight"]


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("within", [None, "heads"])
def test_drawn_elements_are_of_their_group_and_no_others(group, within):
    space = Space("s", 6, group, within)
    map = draw(space, 3, torch.Generator().manual_seed(0))
    if group == "fixed":
        assert map is None and "nothing of it may move" in str(why_not(space, 3, Index(torch.arange(6))))
        return
    assert map is not None and why_not(space, 3, map) is None
    again = draw(space, 3, torch.Generator().manual_seed(0))
    for name, value in vars(map).items():
        assert value is None or value.equal(vars(again)[name])
    if isinstance(map, Matrix):
        assert float(torch.linalg.cond(map.write).max()) < math.e + 1e-6
        assert "undo" in str(why_not(space, 3, Matrix(map.write, 2 * map.read)))
    elif isinstance(map, Index):
        assert "no permutation" in str(why_not(space, 3, Index(torch.zeros_like(map.index))))
        assert "cannot be undone" in str(why_not(space, 3, Index(map.index, torch.zeros(map.index.shape))))
        assert "units" in str(why_not(space, 3, Index(torch.arange(5))))
    else:
        assert isinstance(map, Turn) and "pairs" in str(why_not(space, 3, Turn(map.turn[..., :2])))
