"""Checkpoints: what headers say is what safetensors itself reads; anything damaged is refused in one line."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from dipgo.base.dtypes import Dtype
from dipgo.base.errors import DipgoError
from dipgo.base.files import sha256_of, sha256_once
from dipgo.base.safetensors_index import read_pieces, safetensors_header, stored_tensors
from dipgo.model.models import find_model
from tests.checks import refused

NAME = "diffusion_pytorch_model"
INDEX = f"{NAME}.safetensors.index.json"


def file_of(path, header, data=b"", length=None):
    """Write a safetensors file with any header, a value or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def same_as_safetensors(files):
    """Compare all bytes with what the library reads."""
    expected = {}
    for file in files:
        expected |= load_file(file)
    checkpoint = stored_tensors(files)
    assert checkpoint.keys() == expected.keys()
    for name, stored in checkpoint.items():
        with stored.file.open("rb") as stream:
            stream.seek(stored.offset)
            found = stream.read(stored.length)
        assert stored.shape == tuple(expected[name].shape)
        assert stored.dtype.torch == expected[name].dtype
        assert found == expected[name].flatten().view(torch.uint8).numpy().tobytes()


def test_every_dtype_lies_where_safetensors_finds_it(tmp_path):
    tensors = {
        kind: torch.arange(6).reshape(2, 3).to(dtype if dtype.is_floating_point else torch.int64).to(dtype)
        for kind, dtype in ((kind.safetensors, kind.torch) for kind in Dtype)
    }
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "a name: \u00e9\n": torch.ones(1)}
    save_file(tensors, tmp_path / "w.safetensors", {"format": "pt", "note": "kept"})
    same_as_safetensors([tmp_path / "w.safetensors"])


def test_a_header_of_ours_is_read_by_safetensors(tmp_path):
    values = {"x": torch.arange(3, dtype=torch.int64), "y": torch.randn(2, 2), "z": torch.ones(5, dtype=torch.bfloat16)}
    kinds = {"x": Dtype.INT64, "y": Dtype.FLOAT32, "z": Dtype.BFLOAT16}
    header = safetensors_header({name: (kinds[name], value.shape) for name, value in values.items()})
    data = b"".join(value.flatten().view(torch.uint8).numpy().tobytes() for value in values.values())
    (tmp_path / "w.safetensors").write_bytes(header + data)
    assert len(header) % 64 == 0
    read = load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(read[name], value) for name, value in values.items())
    same_as_safetensors([tmp_path / "w.safetensors"])


def test_pieces_are_the_whole_tensor(tmp_path):
    values = torch.arange(5 * 2**20, dtype=torch.float32)  # 20 MiB, more than a piece
    save_file({"a": torch.ones(3), "w": values}, tmp_path / "w.safetensors")
    pieces = list(read_pieces(stored_tensors([tmp_path / "w.safetensors"])["w"]))
    assert len(pieces) == 2
    assert torch.equal(torch.cat(pieces), values)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "w.safetensors"
    save_file({"a": torch.randn(3, 2), "b": torch.arange(4), "c": torch.ones(5, dtype=torch.float16)}, path)
    return path.read_bytes()


def entry(start, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        ({"a": entry(0, 8)}, b"\0" * 7, None, "its tensors end at byte .*, the file at"),
        ({"a": entry(0, 8)}, b"\0" * 9, None, "its tensors end at byte .*, the file at"),
        ({"a": entry(0, 8)}, b"\0" * 8, 10**18, "a header of 1000000000000000000 bytes in a file of"),
        (b"", b"", None, "its header is not JSON"),
        (b"{nonsense}", b"", None, "its header is not JSON"),
        (b"\xff\xfe{}", b"", None, "its header is not JSON"),
        (b"[" * 100_000, b"", None, "its header is not"),
        (b"1" * 5000, b"", None, "its header is not JSON"),
        ([1], b"", None, "not a JSON object"),
        ({"__metadata__": 3}, b"", None, "not a JSON object"),
        ({"__metadata__": {"format": 3}}, b"", None, "not a JSON object"),
        ({"a": 3}, b"", None, "'a' has no dtype, shape and offsets"),
        ({"a": {"dtype": "F32", "shape": [2]}}, b"", None, "'a' has no dtype, shape and offsets"),
        ({"a": entry(0, 8, (-2,))}, b"\0" * 8, None, "'a' has no dtype, shape and offsets"),
        ({"a": entry(0, 8, (True, 2))}, b"\0" * 8, None, "'a' has no dtype, shape and offsets"),
        ({"a": entry(0, 8, (2.0,))}, b"\0" * 8, None, "'a' has no dtype, shape and offsets"),
        ({"a": entry(8, 0)}, b"\0" * 8, None, "do not match F32"),
        ({"a": entry(0, 8, (3,))}, b"\0" * 8, None, r"do not match F32 \[3\]"),
        ({"a": entry(0, 8, (10**300,) * 5)}, b"\0" * 8, None, "do not match F32"),
        ({"a": entry(0, 8, (1,) * 5000)}, b"\0" * 8, None, "do not match F32"),
        ({"a": entry(0, 8, dtype="F4")}, b"\0" * 8, None, "type 'F4', which ONNX graphs cannot point to"),
        ({"a": entry(0, 8), "b": entry(4, 12)}, b"\0" * 12, None, "'b' overlaps"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, b"\0" * 8, None, "'b' overlaps"),
        ({"a": entry(0, 8), "b": entry(12, 20)}, b"\0" * 20, None, "'b' leaves a gap"),
        ({"a\nb": entry(4, 12)}, b"\0" * 12, None, "leaves a gap"),
        ({"a": entry(10**15, 10**15 + 8)}, b"\0" * 8, None, "leaves a gap"),
    ],
)
def test_bad_headers_are_refused(tmp_path, header, data, length, message):
    path = file_of(tmp_path / "w.safetensors", header, data, length)
    with refused(f"^{path}.*{message}") as raised:
        stored_tensors([path])
    assert len(str(raised.value)) < 400 + len(str(path))
    with pytest.raises((SafetensorError, ValueError, KeyError, AttributeError)):
        load_file(path)  # nor does safetensors take it


def test_truncated_missing_and_absurd_files(tmp_path, whole):
    path = tmp_path / "w.safetensors"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with refused(r"truncated or damaged .*; download or save it again"):
            stored_tensors([path])
    for missing in (tmp_path / "none", tmp_path):
        with refused(r"no such safetensors file|a folder, not a file"):
            stored_tensors([missing])
    with path.open("wb") as stream:
        stream.write((150_000_000).to_bytes(8, "little"))
        stream.truncate(200_000_000)  # sparse
    with refused("a header of 150000000 bytes, above 25000000"):
        stored_tensors([path])


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    changes=st.lists(
        st.tuples(st.integers(0, 175), st.integers(0, 255) | st.sampled_from(b'0123456789FIUB[]{},:"\\ ')),
        min_size=1,
        max_size=3,
    )
)
def test_what_safetensors_accepts_is_accepted(tmp_path, whole, changes):
    """Bytes of the header changed at random."""
    data = bytearray(whole)
    for place, byte in changes:
        data[place] = byte
    path = tmp_path / "w.safetensors"
    path.write_bytes(data)
    try:
        stored_tensors([path])
    except DipgoError:
        with pytest.raises(SafetensorError):
            load_file(path)
        return
    same_as_safetensors([path])


@pytest.fixture
def sharded(tiny_dit, tmp_path):
    """The tiny pipeline with its denoiser in several shards, saved by diffusers."""
    folder = tmp_path / "sharded"
    shutil.copytree(tiny_dit, folder)
    denoiser = DiTTransformer2DModel.from_pretrained(folder / "transformer")
    (folder / "transformer" / f"{NAME}.safetensors").unlink()
    denoiser.save_pretrained(folder / "transformer", max_shard_size="40KB")
    return folder


def test_shards_are_one_checkpoint(tiny_dit, sharded):
    model = find_model(str(sharded))
    assert len(model.weights_files) > 2
    same_as_safetensors(model.weights_files)
    expected, found = find_model(tiny_dit).pipeline().transformer, model.pipeline().transformer
    assert stored_tensors(model.weights_files).keys() == expected.state_dict().keys()
    for mine, other in zip(expected.parameters(), found.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert model.identity().weights_sha256 != find_model(tiny_dit).identity().weights_sha256


def test_damaged_shards_are_refused(sharded):
    folder = sharded / "transformer"
    first, second, *_ = files = find_model(str(sharded)).weights_files
    index = json.loads((folder / INDEX).read_text())
    places = index["weight_map"]
    name = next(iter(places))
    other = next(file.name for file in files if file.name != places[name])
    changed = {
        "{": "index.json: not a readable index of shards",
        '{"weight_map": [1]}': "index.json: not an index of shards",
        json.dumps(index | {"weight_map": places | {name: other}}): f"index.json: '{name}' is not in",
        json.dumps(index | {"weight_map": places | {"more": first.name}}): "index.json: 'more' is not in",
    }
    for text, message in changed.items():
        (folder / INDEX).write_text(text)
        with refused(message):
            stored_tensors(find_model(str(sharded)).weights_files)
    (folder / INDEX).write_text(json.dumps(index))
    shutil.copy(first, second)
    with refused(f"{second.name}: holds '.*', which {first.name} holds too"):
        stored_tensors(find_model(str(sharded)).weights_files)
    second.unlink()
    with refused(f"index.json: names the shard '{second.name}', which is missing; download or save it again"):
        find_model(str(sharded))


def test_variants_beside_the_plain_files_are_left_out(tiny_dit, sharded, tmp_path):
    single = Path(shutil.copytree(tiny_dit, tmp_path / "single")) / "transformer"
    plain = [single / f"{NAME}.safetensors"]
    half = DiTTransformer2DModel.from_pretrained(single).half()
    half.save_pretrained(single, variant="fp16")
    half.save_pretrained(sharded / "transformer", variant="fp16", max_shard_size="30KB")
    assert (single / f"{NAME}.fp16.safetensors").is_file()
    assert find_model(str(single.parent)).weights_files == plain
    shards = find_model(str(sharded)).weights_files
    assert {stored.dtype for stored in stored_tensors(shards).values()} == {Dtype.FLOAT32}
    assert len(list((sharded / "transformer").glob("*fp16*.safetensors"))) > 2
    plain[0].unlink()
    assert [path.name for path in find_model(str(single.parent)).weights_files] == [f"{NAME}.fp16.safetensors"]


def test_of_a_file_and_shards_those_that_diffusers_reads(tiny_dit, sharded):
    shards = find_model(str(sharded)).weights_files
    single = sharded / "transformer" / f"{NAME}.safetensors"
    shutil.copy(Path(tiny_dit) / "transformer" / single.name, single)
    assert find_model(str(sharded)).weights_files == shards
    (sharded / "transformer" / INDEX).unlink()
    assert find_model(str(sharded)).weights_files == [single]


def test_digests_follow_changes(tmp_path):
    path = tmp_path / "w"
    seen = set()
    for number in range(3):
        path.write_bytes(np.full(1000, number, np.uint8).tobytes())
        os.utime(path, ns=(0, 10**18))  # the same size and time of change
        assert sha256_once(path) == sha256_of(path)
        seen.add(sha256_once(path))
    assert len(seen) == 3
