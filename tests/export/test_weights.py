"""Graphs that point into weights files: real checker, real runtime; casts and copies against independent reads."""

import hashlib
import os

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnxscript import optimizer
from safetensors.torch import load_file, save_file

from dipgo.base.dtypes import PRECISIONS, Dtype
from dipgo.base.safetensors_index import stored_tensors
from dipgo.model.random_weights import draw
from export.onnx.weights import bind, cast, check_in_place, place
from tests.checks import refused, small_disk

NAMES = {"denoiser.w": "w", "denoiser.b": "b", "denoiser.unread": "none"}
X = np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def pipeline(tmp_path):
    """A pipeline folder with a denoiser in two files: w [3, 4], b [4] and a table of whole numbers."""
    folder = tmp_path / "pipeline"
    (folder / "unet").mkdir(parents=True)
    save_file({"w": draw("w", (3, 4)), "table": torch.arange(5)}, folder / "unet" / "a.safetensors")
    save_file({"b": draw("b", (4,))}, folder / "unet" / "b.safetensors")
    return folder


def files_of(folder):
    return sorted((folder / "unet").glob("*.safetensors"))


def graph(dtype=ir.DataType.FLOAT, shape=(3, 4)):
    """Return y = x w + b, with weights that hold nothing, w in a type and shape."""
    x = ir.Value(name="x", shape=ir.Shape([2, 3]), type=ir.TensorType(ir.DataType.FLOAT))
    w = ir.Value(name="denoiser.w", shape=ir.Shape(shape), type=ir.TensorType(dtype))
    b = ir.Value(name="denoiser.b", shape=ir.Shape([4]), type=ir.TensorType(dtype))
    b.const_value = ir.tensor(np.zeros(4, dtype.numpy()), name=b.name)
    nodes = [ir.node("Cast", [value], {"to": ir.DataType.FLOAT}) for value in (w, b)]
    nodes += [ir.node("MatMul", [x, nodes[0].outputs[0]])]
    nodes += [ir.node("Add", [nodes[2].outputs[0], nodes[1].outputs[0]])]
    y = nodes[-1].outputs[0]
    y.name, y.shape, y.dtype = "y", ir.Shape([2, 4]), ir.DataType.FLOAT
    inside = ir.Graph([x], [y], nodes=nodes, initializers=[w, b], opset_imports={"": 23}, name="g")
    return ir.Model(inside, ir_version=10)


def run(path):
    onnx.checker.check_model(str(path), full_check=True)
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": X})[0]


def expected():
    return X @ draw("w", (3, 4)).numpy() + draw("b", (4,)).numpy()


@pytest.fixture
def bound(pipeline):
    """A graph that points into the files of the pipeline folder, saved there."""
    model = graph()
    bind(model, NAMES, stored_tensors(files_of(pipeline)), pipeline)
    ir.save(model, pipeline / "g.onnx")
    return pipeline


def locations(path):
    """Return where the initializers of a saved graph lie."""
    entries = [tensor.external_data for tensor in onnx.load(path, load_external_data=False).graph.initializer]
    return sorted({entry.value for external in entries for entry in external if entry.key == "location"})


def test_graphs_run_on_the_weights_in_the_pipeline_folder(bound, tmp_path):
    link = tmp_path / "link"  # to the folder itself, which is fine
    link.symlink_to(bound)
    assert locations(bound / "g.onnx") == ["unet/a.safetensors", "unet/b.safetensors"]
    assert (bound / "g.onnx").stat().st_size < 1000
    for folder in (bound, link):
        check_in_place(files_of(folder), folder)
        np.testing.assert_allclose(run(folder / "g.onnx"), expected(), rtol=1e-6)


def test_graphs_run_on_copies_of_what_a_hub_cache_links_to(pipeline, tmp_path):
    """Links out of the folder: ONNX refuses them in place; here values are read through them, and copied."""
    cache = tmp_path / "cache" / "snapshot"
    (cache / "unet").mkdir(parents=True)
    for file in files_of(pipeline):
        (cache / "unet" / file.name).symlink_to(file)
    model = graph()
    bind(model, NAMES, stored_tensors(files_of(cache)), cache)
    bound = {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}
    np.testing.assert_array_equal(bound["denoiser.w"], draw("w", (3, 4)).numpy())
    optimizer.optimize_ir(model, should_fold=lambda node: False)  # it compares the initializers' bytes
    ir.save(model, cache / "g.onnx")
    with pytest.raises(onnx.checker.ValidationError):
        run(cache / "g.onnx")
    digests = place(files_of(cache), cache, tmp_path / "bundle")
    ir.save(model, tmp_path / "bundle" / "g.onnx")
    np.testing.assert_allclose(run(tmp_path / "bundle" / "g.onnx"), expected(), rtol=1e-6)
    check_in_place(files_of(tmp_path / "bundle"), tmp_path / "bundle")
    assert digests == {
        f"unet/{file.name}": hashlib.sha256(file.read_bytes()).hexdigest() for file in files_of(pipeline)
    }


def test_weights_of_another_model_are_refused(pipeline):
    half = r"'w' is F32 \[3, 4\], the graph wants FLOAT16 .*in the precision of the"
    for model, names, message in (
        (graph(), {"denoiser.w": "other"}, r"unet: holds no tensor 'other'; it belongs to another model"),
        (graph(shape=(4, 3)), NAMES, r"a\.safetensors: 'w' is F32 \[3, 4\], the graph wants FLOAT \[4, 3\]"),
        (graph(ir.DataType.FLOAT16), NAMES, half),
    ):
        with refused(message):
            bind(model, names, stored_tensors(files_of(pipeline)), pipeline)


def test_what_onnx_refuses_in_place_is_refused_before(bound):
    weights, unet = bound / "unet" / "a.safetensors", bound / "unet"

    def linked(path, target):
        path.rename(target)
        path.symlink_to(target)

    for change, mend, message in (
        (lambda: (bound / "second").hardlink_to(weights), (bound / "second").unlink, "a file with several hard links"),
        (lambda: linked(weights, bound / "blob"), lambda: (bound / "blob").replace(weights), "behind a symbolic link"),
        (lambda: linked(unet, bound.parent / "real"), lambda: None, "weights behind a symbolic link"),
    ):
        change()
        with refused(rf"unet.*: ONNX tools refuse .*{message}; .*--weights copy"):
            check_in_place(files_of(bound), bound)
        with pytest.raises(onnx.checker.ValidationError):
            run(bound / "g.onnx")
        mend()
    files, elsewhere = files_of(bound), bound.parent / "elsewhere"
    for call in (
        lambda: bind(graph(), NAMES, stored_tensors(files), elsewhere),
        lambda: place(files, elsewhere, bound.parent / "b"),
        lambda: check_in_place(files, elsewhere),
    ):
        with refused(r"a\.safetensors: lies outside .*elsewhere"):
            call()


def test_copies_are_plain_files_and_known_digests_are_kept(pipeline, tmp_path):
    """They stay when the original changes, also where the file system lets them share blocks."""
    files, contents = files_of(pipeline), [file.read_bytes() for file in files_of(pipeline)]
    made_up = {files[0]: "0" * 64}  # shows that the file is not read for its digest
    digests = place(files, pipeline, tmp_path / "b", made_up)
    second = hashlib.sha256(contents[1]).hexdigest()
    assert digests == {"unet/a.safetensors": "0" * 64, "unet/b.safetensors": second}
    for file, content in zip(files, contents, strict=True):
        with file.open("r+b") as stream:
            stream.seek(-4, os.SEEK_END)
            stream.write(b"\xff" * 4)
        copy = tmp_path / "b" / file.relative_to(pipeline)
        assert copy.read_bytes() == content
        assert (copy.stat().st_nlink, copy.stat().st_mode & 0o777) == (1, 0o644)
        assert copy.stat().st_ino != file.stat().st_ino


@pytest.mark.parametrize("dtype", PRECISIONS.values())
def test_casts_round_as_torch_does(tmp_path, dtype):
    tensors = {
        "large": draw("large", (5, 2**20)),  # 20 MiB, more than is read at a time
        "half": draw("half", (30, 7)).half(),
        "brain": draw("brain", (3,)).bfloat16(),
        "double": draw("double", (9, 9)).double(),
        "eighth": draw("eighth", (4, 4)).to(torch.float8_e5m2),
        "edge": torch.tensor([65504.0, -65504, 65519, 1e-8, 2.0**-25, 2049, 2051, torch.inf, -torch.inf, torch.nan]),
        "whole": torch.arange(7),
        "byte": torch.arange(3, dtype=torch.uint8),
        "scalar": torch.tensor(1 / 3),
        "left": torch.ones(3),
    }
    save_file(tensors, tmp_path / "w.safetensors")
    names = [name for name in tensors if name != "left"]
    found = cast(stored_tensors([tmp_path / "w.safetensors"]), names, dtype, tmp_path / "b", "unet")
    file = found["large"].file
    assert file.parent == tmp_path / "b" / "unet"
    assert file.name.startswith(f"{dtype.safetensors}-")
    read = load_file(file)
    assert found == stored_tensors([file])
    assert read.keys() == set(names)
    for name in names:
        wanted = tensors[name].to(dtype.torch) if tensors[name].is_floating_point() else tensors[name]
        assert read[name].dtype == wanted.dtype
        assert read[name].shape == wanted.shape
        torch.testing.assert_close(read[name], wanted, rtol=0, atol=0, equal_nan=True)
        assert found[name].offset % wanted.itemsize == 0
    assert min(stored.offset for stored in found.values()) % 64 == 0


def test_a_cast_is_used_again_while_it_is_whole_and_of_the_same_weights(pipeline, tmp_path):
    found = cast(stored_tensors(files_of(pipeline)), ["w", "b"], Dtype.FLOAT16, tmp_path / "a", "unet")
    model = graph(ir.DataType.FLOAT16)
    bind(model, NAMES, found, tmp_path / "a")
    ir.save(model, tmp_path / "a" / "g.onnx")
    rounded = [draw(name, shape).half().float().numpy() for name, shape in (("w", (3, 4)), ("b", (4,)))]
    np.testing.assert_allclose(run(tmp_path / "a" / "g.onnx"), X @ rounded[0] + rounded[1], rtol=1e-6)

    def once(dtype=Dtype.FLOAT16, names=("w", "b")):
        return cast(stored_tensors(files_of(pipeline)), names, dtype, tmp_path / "b", "unet")["b"].file

    first = once()
    made, content = first.stat(), first.read_bytes()
    assert once(names=("b", "w")) == first
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == (made.st_ino, made.st_mtime_ns)
    assert len({first, once(Dtype.BFLOAT16), once(names=("b",))}) == 3
    first.write_bytes(content[:-1])
    assert once() == first
    assert first.read_bytes() == content
    save_file({"b": draw("b", (4,)) * 2}, pipeline / "unet" / "b.safetensors")
    second = once()
    assert second != first
    assert torch.equal(load_file(second)["b"], (draw("b", (4,)) * 2).half())


@pytest.mark.parametrize(
    ("dtype", "value", "cure"), [(Dtype.FLOAT16, 65520.0, "bf16 or fp32"), (Dtype.BFLOAT16, 3.4e38, "fp32")]
)
def test_values_that_would_become_infinite_are_refused(tmp_path, dtype, value, cure):
    tensors = {"fine": torch.ones(3), "too.large": torch.tensor([1.0, -value, torch.inf])}
    save_file(tensors, tmp_path / "w.safetensors")
    checkpoint = stored_tensors([tmp_path / "w.safetensors"])
    with refused(rf"w\.safetensors: 'too\.large' holds values too large for {dtype.safetensors}; export in {cure}$"):
        cast(checkpoint, list(tensors), dtype, tmp_path / "b", "unet")
    assert list((tmp_path / "b" / "unet").iterdir()) == []
    with refused(r"w\.safetensors: holds no tensor 'other'"):
        cast(checkpoint, ["other"], dtype, tmp_path / "b", "unet")


def test_a_full_disk_leaves_nothing(tmp_path):
    file = tmp_path / "unet" / "w.safetensors"
    file.parent.mkdir()
    save_file({"w": draw("w", (100, 100))}, file)
    for write in (
        lambda: place([file], tmp_path, tmp_path / "b"),
        lambda: place([file], tmp_path, tmp_path / "b", {file: "0" * 64}),  # its digest is known
        lambda: cast(stored_tensors([file]), ["w"], Dtype.FLOAT16, tmp_path / "b", "unet"),
    ):
        with small_disk(), refused(r"b/unet/.*: the disk is full; .*free some space"):
            write()
        assert list((tmp_path / "b" / "unet").iterdir()) == []
