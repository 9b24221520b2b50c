"""Maps on tensors worked out by hand; their composition, inverse and file; one family carried into another's layout."""

import subprocess
import sys

import pytest
import torch

import alignment
from alignment import Maps, find_family
from alignment._acts import Index, Matrix, Turn, act, after, inverse, reorder, settle, still
from alignment.verify import double
from tests.networks import logits, network

BLOCK = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])


def test_indices_scales_and_roles():
    map = Index(torch.tensor([2, 0, 1]), torch.tensor([2.0, -1.0, 1.0]))
    assert act(map, "w", BLOCK, 1, None).tolist() == [[6, -1, 2], [12, -4, 5]]
    assert act(map, "r", BLOCK, 1, None).tolist() == [[1.5, -1, 2], [3, -4, 5]]
    assert act(map, "e", BLOCK, 1, None).tolist() == [[3, 1, 2], [6, 4, 5]]
    copies = Index(torch.tensor([[0, 1, 2], [2, 1, 0]]), torch.tensor([[1.0, 1, 1], [1, 1, 10]]))
    assert act(copies, "w", BLOCK, 1, 0).tolist() == [[1, 2, 3], [6, 5, 40]]
    assert act(copies, "w", BLOCK.T, 0, 1).tolist() == [[1, 6], [2, 5], [3, 40]]


def test_couplings_of_other_sizes_take_one_matrix_for_writers_and_one_for_readers():
    # three donor units in two target units: the plan's columns over their mass, its rows over theirs
    plan = torch.tensor([[0.25, 0.25, 0.0], [0.0, 0.0, 0.5]])
    map = Matrix(plan / plan.sum(1, keepdim=True), (plan / plan.sum(0)).T)
    writer, reader = torch.tensor([[1.0], [1.0], [5.0]]), torch.tensor([[2.0, 3.0, 7.0]])
    narrow = act(map, "r", reader, 1, None) @ act(map, "w", writer, 0, None)
    assert act(map, "w", writer, 0, None).tolist() == [[1], [5]] and act(map, "r", reader, 1, None).tolist() == [[5, 7]]
    assert narrow.equal(reader @ writer)


def test_pairs_turn():
    turn = Turn(torch.tensor([2j, 1 + 0j]))
    rows = torch.tensor([1.0, 2.0, 3.0, 4.0])  # pairs (1, 3) and (2, 4)
    assert act(turn, "w", rows, 0, None).tolist() == [-6, 2, 2, 4]
    assert act(turn, "r", rows, 0, None).tolist() == [-1.5, 2, 0.5, 4]


def test_composition_inverse_and_order():
    for first, second, n in (
        (
            Index(torch.tensor([2, 0, 1]), torch.tensor([2.0, 3, 4])),
            Index(torch.tensor([1, 0, 2]), torch.tensor([1.0, -1, 5])),
            3,
        ),
        (Matrix(*pair(0)), Matrix(*pair(1)), 3),
        (Turn(torch.tensor([1 + 2j])), Turn(torch.tensor([3 - 1j])), 2),
    ):
        block = torch.randn(n, 4, generator=torch.Generator().manual_seed(2)).double()
        for role in ("w", "r"):
            both = act(second, role, act(first, role, block, 0, None), 0, None)
            torch.testing.assert_close(act(after(second, first), role, block, 0, None), both)
            back = act(inverse(second), role, act(second, role, block, 0, None), 0, None)
            torch.testing.assert_close(back, block)
    assert reorder(Index(torch.tensor([[0, 1], [1, 0]])), torch.tensor([1, 0])).index.tolist() == [[1, 0], [0, 1]]


def pair(seed: int):
    matrix = torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)).double()
    return matrix, torch.linalg.inv(matrix)


def test_what_is_within_rounding_of_the_identity_becomes_it():
    eye = torch.eye(3).double()
    for near, far in (
        (Index(torch.arange(3), torch.full((3,), 1 + 1e-14)), Index(torch.arange(3), torch.full((3,), 1.1))),
        (Matrix(eye + 1e-14, eye - 1e-14), Matrix(*pair(0))),
        (Turn(torch.full((3,), 1 + 1e-14j)), Turn(torch.full((3,), 1j))),
    ):
        assert still(settle(near, 1e-12)) and not still(settle(far, 1e-12))


@pytest.mark.parametrize(
    "case", [("llama", 0), ("gpt_neox", 0), ("mixtral", 0), ("qwen3", 0)], ids=lambda case: case[0]
)
def test_maps_of_a_network_compose_invert_and_load(case, tmp_path):
    config, tensors, outputs = network(*case, folded=True)
    spaces = find_family(config)
    first, second = spaces.random_symmetry(1), spaces.random_symmetry(2)
    there = first.carry(tensors)
    close(first.inverse().carry(there), tensors)
    close(second.after(first).carry(tensors), second.carry(there))
    second.after(first).check(spaces)
    first.inverse().check(spaces)
    first.save(tmp_path / "maps.safetensors")
    loaded = Maps.load(tmp_path / "maps.safetensors")
    assert loaded.source == spaces and loaded.target == spaces and list(loaded.maps) == list(first.maps)
    again = loaded.carry(tensors)
    assert all(again[name].equal(there[name]) for name in there)


def close(one, other):
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        torch.testing.assert_close(one[name], tensor, rtol=1e-10, atol=1e-12)


def test_a_file_without_maps_gets_a_sentence(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="holds no maps"):
        Maps.load(tmp_path / "a.safetensors")


def test_nothing_given_is_changed():
    config, tensors, _ = network("gpt2")
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    Maps(find_family(config), find_family(config), {}).carry(tensors)["transformer.wte.weight"].zero_()
    find_family(config).random_symmetry(0).carry(tensors)
    assert all(tensors[name].equal(before[name]) for name in tensors)


def test_half_precision_keeps_its_dtype_and_its_places():
    config, tensors, _ = network("llama")
    half = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    spaces = find_family(config)
    index = Index(torch.randperm(24, generator=torch.Generator().manual_seed(0)))
    carried = Maps(spaces, spaces, {"residual": index}).carry(half)
    assert carried["model.norm.weight"].equal(half["model.norm.weight"][index.index])
    assert all(tensor.dtype == torch.bfloat16 for tensor in spaces.random_symmetry(0).carry(half).values())


def test_a_llama_in_phi3s_layout_computes_the_same():
    """Keys name parts alike in all families, so a separate q, k and v go into one tensor."""
    config, tensors, outputs = network("llama")
    phi = {**config, "model_type": "phi3"}
    carried = Maps(find_family(config), find_family(phi), {}).carry(tensors)
    assert carried["model.layers.0.self_attn.qkv_proj.weight"].shape == (48, 24)
    import transformers

    fields = {name: config[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    described = transformers.Phi3Config(
        **fields, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, rms_norm_eps=config["rms_norm_eps"]
    )
    model = transformers.Phi3ForCausalLM(described).double().eval()
    with double():
        torch.testing.assert_close(logits(model, carried), outputs(tensors), rtol=1e-10, atol=1e-12)


def test_a_tied_head_goes_into_one_of_its_own_but_not_the_other_way():
    config, tensors, outputs = network("qwen2", 1)
    own = {**config, "tie_word_embeddings": False}
    maps = Maps(find_family(config), find_family(own), find_family(config).random_symmetry(0).maps)
    carried, tied = maps.carry(tensors), find_family(config).random_symmetry(0).carry(tensors)
    assert carried["lm_head.weight"].equal(tied["model.embed_tokens.weight"])
    with pytest.raises(ValueError, match="the target has no place for head.weight"):
        Maps(find_family(own), find_family(config), {}).carry(carried)


def test_what_a_donor_lacks_comes_from_the_target():
    config, tensors, _ = network("llama")
    biased, targets, _ = network("llama", 1)
    maps = Maps(find_family({**config, "tie_word_embeddings": True}), find_family(biased), {})
    del tensors["lm_head.weight"]
    with pytest.raises(ValueError, match="no counterpart of layers.0.q.bias.*`into`"):
        maps.carry(tensors)
    carried = maps.carry(tensors, into=targets)
    assert carried.keys() == targets.keys()
    name = "model.layers.0.self_attn.q_proj"
    assert carried[f"{name}.bias"].equal(targets[f"{name}.bias"]) and carried[f"{name}.weight"].equal(
        tensors[f"{name}.weight"]
    )


def said(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_the_package_stays_light():
    heavy = "{'torch', 'numpy', 'scipy', 'tokenizers'}"
    assert said(f"import sys, alignment; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_a_function_is_not_hidden_by_its_module():
    load = "import alignment.align, alignment.fold, alignment.verify, alignment as a"
    assert said(f"{load}; print(callable(a.align) and callable(a.fold) and callable(a.verify))") == "True"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = alignment.nothing


def test_a_part_that_the_target_lacks_is_left_out():
    """BERT's pooler and heads are parts that a checkpoint may lack."""
    config, tensors, _ = network("bert")
    spaces = find_family(config)
    bare = {name: one for name, one in tensors.items() if not name.startswith("cls.predictions.transform")}
    assert len(bare) < len(tensors)
    carried = Maps(spaces, spaces, {}).carry(tensors, into=bare)
    assert carried.keys() == bare.keys()
