"""Checkpoints by region: what is read is what was saved, and what is no checkpoint is refused in a sentence."""

import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fusion._say import bytes_of
from fusion.checkpoint import Checkpoint, Entry, Writer, layout, natural, open_source

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.uint8]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_any_region(dtype, tmp_path):
    tensor = torch.arange(60).remainder(7).to(dtype).reshape(5, 12)
    save_file(
        {"b.w": tensor, "a.s": tensor[0, 3].clone(), "c.none": tensor[:0].clone()}, tmp_path / "model.safetensors"
    )
    opened = Checkpoint.open(tmp_path)
    assert opened.entries["b.w"] == Entry("b.w", (5, 12), dtype, dtype) and opened.config == {}
    for start, stop in ((0, 60), (7, 8), (13, 44)):
        buffer = torch.empty(stop - start, dtype=dtype)
        opened.read("b.w", start, stop, buffer)
        assert torch.equal(buffer, tensor.flatten()[start:stop])
    one = torch.empty(1, dtype=dtype)
    opened.read("a.s", 0, 1, one)
    assert torch.equal(one[0], tensor[0, 3]) and opened.entries["a.s"].shape == ()


def test_finite_bfloat16_is_read_as_float32_at_once(tmp_path):
    x = torch.randn(200_003).bfloat16()
    odd = {"nan": x.clone(), "inf": x.clone()}
    odd["nan"][150_000], odd["inf"][-1] = torch.nan, -torch.inf
    save_file({"w": x, "half": x.half(), **odd}, tmp_path / "model.safetensors")
    opened = Checkpoint.open(tmp_path)
    for start, stop in ((0, 200_003), (3, 131_076), (200_002, 200_003), (5, 5)):
        wide = torch.empty(stop - start)
        assert opened.read_finite("w", start, stop, wide) and torch.equal(wide, x[start:stop].float())
        assert not opened.read_finite("half", start, stop, wide), "left to read"
    wide = torch.empty(150_001)
    assert not opened.read_finite("nan", 0, 150_001, wide) and opened.read_finite("nan", 0, 150_000, wide)
    assert opened.read_finite("inf", 200_000, 200_002, wide) and not opened.read_finite("inf", 200_000, 200_003, wide)
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.truncate((tmp_path / "model.safetensors").stat().st_size // 2)
    wide, (last, _) = torch.empty(200_003), max(opened.places.items(), key=lambda item: item[1])
    assert not opened.read_finite(last, 0, 200_003, wide), "read tells why"


def test_entries_stand_in_the_order_of_the_file(tmp_path):
    save_file(
        {"z": torch.zeros(3, dtype=torch.float64), "a": torch.zeros(2, dtype=torch.uint8)}, tmp_path / "m.safetensors"
    )
    assert list(Checkpoint.open(tmp_path).entries) == ["z", "a"]  # the library puts wide dtypes first


def test_writes_what_the_library_reads(tmp_path):
    tensors = {
        "model.layers.10.w": torch.randn(7, 3),
        "model.layers.2.w": torch.randn(5).bfloat16(),
        "model.ids": torch.arange(3),
        "model.mask": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 4),
    }
    shards = layout([Entry(n, tuple(t.shape), t.dtype, t.dtype) for n, t in tensors.items()], 10**9)
    assert [shard.file for shard in shards] == ["model.safetensors"]
    Writer.create(tmp_path, shards)
    writer = Writer(tmp_path, shards)
    for name, tensor in tensors.items():
        for start in range(0, tensor.numel(), 2):  # pieces, as regions are
            writer.write(name, start, tensor.flatten()[start : start + 2])
    writer.close()
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[n], t) for n, t in tensors.items())
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_have_their_final_names_and_do_not_depend_on_order():
    entries = [Entry(f"model.layers.{n}.w", (100,), torch.float32, torch.float32) for n in range(12)]
    shards = layout(entries, 1200)
    assert [shard.file for shard in shards] == [f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    assert [list(shard.places) for shard in shards][0] == [f"model.layers.{n}.w" for n in (0, 1, 2)]
    assert layout(entries[::-1], 1200) == shards
    assert len(layout(entries, 10)) == 12, "a tensor larger than a shard has one of its own"


def test_checksum_is_of_the_bytes_written(tmp_path):
    import xxhash

    tensor = torch.randn(5000)
    shards = layout([Entry("w", (5000,), torch.float32, torch.float32)], 10**9)
    Writer.create(tmp_path, shards)
    writer = Writer(tmp_path, shards)
    writer.write("w", 0, tensor)
    assert writer.checksum("w", 0, 20000) == xxhash.xxh3_128(tensor.numpy().tobytes()).hexdigest()
    assert writer.checksum("w", 4, 8) == xxhash.xxh3_128(tensor[1:2].numpy().tobytes()).hexdigest()
    writer.close()


def test_sizes_and_names():
    assert [bytes_of(text, "x") for text in ("512MiB", "5GB", "1000", "1.5 kB", 7)] == [2**29, 5 * 10**9, 1000, 1500, 7]
    with pytest.raises(ValueError, match="memory is 'much'; a size like 512MiB"):
        bytes_of("much", "memory")
    assert sorted(["l.10.w", "l.9.w", "l.w"], key=natural) == ["l.9.w", "l.10.w", "l.w"]


def broken(tmp_path, change):
    """A checkpoint whose file was changed."""
    save_file({"w": torch.randn(10, 10)}, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(change(content))
    with pytest.raises(ValueError) as error:
        open_source(tmp_path)
    return str(error.value)


def test_tensors_that_share_bytes_are_refused(tmp_path):
    header = (
        b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]},"b":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}'
    )
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(ValueError, match="model.safetensors is corrupt: the bytes of b overlap those of a"):
        open_source(tmp_path)


def test_damaged_files_are_named(tmp_path):
    assert "model.safetensors is truncated" in broken(tmp_path, lambda content: content[:-5])
    assert "truncated or no safetensors file" in broken(tmp_path, lambda content: content[:20])
    assert "can't be read" in broken(tmp_path, lambda content: content[:8] + b"?" + content[9:])
    shape = broken(tmp_path, lambda content: content.replace(b"[10,10]", b"[10,11]"))
    assert "is corrupt: w (10 x 11, F32) has 400 bytes and needs 440" in shape
    said = "model.safetensors is corrupt: its header says of w: {'dtype'"
    for good, bad in (
        (b'"shape"', b'"shapf"'),
        (b"[10,10]", b"[-1,10]"),
        (b"[0,400]", b"[400,0]"),
        (b"[0,400]", b'["0",4]'),
        (b"[0,400]", b"[   40]"),
    ):
        assert said in broken(tmp_path, lambda content, good=good, bad=bad: content.replace(good, bad)), bad
    assert "is corrupt: it holds a JSON list, not an object" in broken(
        tmp_path, lambda content: (2).to_bytes(8, "little") + b"[]"
    )
    assert "stored as Q9, which can't be read" in broken(tmp_path, lambda c: c.replace(b'"F32"', b'"Q9" '))


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match="there is no directory"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"no \*.safetensors in"):
        open_source(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match="holds only pickled weights .* convert: python -c"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match="pytorch_model.bin; it is a file, give the directory"):
        open_source(tmp_path / "pytorch_model.bin")
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    for index, sentence in (
        ({"weight_map": {"w": "gone.safetensors"}}, "missing: gone.safetensors"),
        ({"weight_map": {"w": "model.safetensors", "v": "model.safetensors"}}, "1 tensors that its files .* like v"),
        ({"weight_map": []}, "index.json is corrupt: its weight_map is no table"),
        ({"weight_map": {"w": 1}}, "index.json is corrupt: its weight_map is no table"),
    ):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ValueError, match=sentence):
            Checkpoint.open(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    for config, sentence in (
        ("[]", "config.json is corrupt: it holds a JSON list"),
        ("{", "config.json can't be read"),
    ):
        (tmp_path / "config.json").write_text(config)
        with pytest.raises(ValueError, match=sentence):
            Checkpoint.open(tmp_path)


def test_weights_that_lie_there_once_more_under_another_name(tmp_path):
    """As Mistral's consolidated.safetensors beside model.safetensors."""
    save_file({"layers.0.w": torch.ones(2)}, tmp_path / "consolidated.safetensors")
    save_file({"model.layers.0.w": torch.ones(2)}, tmp_path / "model.safetensors")
    assert list(Checkpoint.open(tmp_path).entries) == ["model.layers.0.w"]


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    save_file({"w": torch.randn(1000)}, tmp_path / "model.safetensors")
    opened = Checkpoint.open(tmp_path)
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.truncate(struct.calcsize("Q") + 100)
    with pytest.raises(ValueError, match="has become shorter"):
        opened.read("w", 0, 1000, torch.empty(1000))
