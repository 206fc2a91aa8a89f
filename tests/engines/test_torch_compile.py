"""torch.compile and AOTInductor with the real compiler, on a program of one graph."""

import shutil
import zipfile

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from safetensors.numpy import load_file

import dipgo
from dipgo.graph.trace import trace
from dipgo.model.models import find_model
from dipgo.model.sampler import tabulate
from engines.torchrt import aot
from engines.torchrt.aot import build, sizes_built
from export.bundle import open_bundle
from export.compiler import prepare, write_bundle
from export.records.graphs import AxisRecord
from export.sizes import Sizes
from tests.checks import error, refused
from tests.models import random_subnet

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def _compilers_cache(tmp_path_factory):
    """Both tests compile; what the compiler keeps (its headers, mostly) serves the second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A UNet of one level: every step computes everything, nothing conditions it, no decoder."""
    folder = tmp_path_factory.mktemp("compile")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "mid_block_type": None}
    unet = UNet2DModel(sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, **blocks)
    DDIMPipeline(unet, DDIMScheduler(clip_sample=False)).save_pretrained(folder / "model")
    model = find_model(str(folder / "model"))
    traced = trace(model, "down_blocks.*,up_blocks.*", 1.0)
    sampler = tabulate(DDIMScheduler(clip_sample=False), 3)
    subnet = random_subnet(traced, sampler, 0, keep=1.0)
    for name, batch in (("b", 1), ("ranges", AxisRecord(min=1, opt=3, max=3))):
        write_bundle(prepare(traced, whole=False, sizes=Sizes(batch, (4, 8, 8))), subnet, sampler, folder / name)
    return folder


@pytest.fixture(scope="module")
def bundle(made):
    return made / "b"


def latent(bundle, backend, images=1):
    with dipgo.load(bundle, backend=backend) as program:
        first = program.denoise(program.noise(images, 0), {})
        assert np.array_equal(first, program.denoise(program.noise(images, 0), {}))
        return first


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/engines/test_torch_cuda.py")
def test_compiled_agrees(bundle):
    assert error(latent(bundle, "torch-compile"), latent(bundle, "onnxruntime")) <= 1e-4


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/engines/test_torch_cuda.py")
def test_packages_are_built_once_and_hold_no_weights(bundle, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with refused(r"no AOTInductor package for .*; run: dipgo build .*/b --backend torch-aot$"):
        latent(bundle, "torch-aot")
    opened = open_bundle(bundle)
    packages = build(opened, CPU)
    graphs = [graph.file for graph in opened.record.graphs.values()] + [part.file for part in opened.record.prologues]
    assert [package.name.rsplit("-", 1)[0] for package in packages] == [file.removesuffix(".onnx") for file in graphs]
    assert all(package.is_relative_to(tmp_path / "cache" / "dipgo") for package in packages)
    assert error(latent(bundle, "torch-aot"), latent(bundle, "onnxruntime")) <= 1e-4

    made = [package.stat().st_mtime_ns for package in packages]
    assert build(opened, CPU) == packages
    assert [package.stat().st_mtime_ns for package in packages] == made
    weights = load_file(next(bundle.glob("unet/*.safetensors")))
    largest = max(weights.values(), key=lambda values: values.size).tobytes()
    for package in packages:
        with zipfile.ZipFile(package) as archive:
            assert not any(largest in archive.read(name) for name in archive.namelist())

    packages[0].write_bytes(packages[0].read_bytes()[:1000])
    with refused(r"the package cannot be loaded .*; run: dipgo build .* --force$"):
        latent(bundle, "torch-aot")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the packages would be for it")
def test_packages_are_built_for_the_ends_of_a_range(made, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = made / "ranges"
    with refused(r"no AOTInductor package for .*; run: dipgo build .*ranges --backend torch-aot$"):
        latent(folder, "torch-aot")
    opened = open_bundle(folder)
    packages = build(opened, CPU)
    assert len(packages) == len(set(packages))
    for images in (1, 3):
        assert error(latent(folder, "torch-aot", images), latent(folder, "onnxruntime", images)) <= 1e-4
    with refused(r"built for batch 1; batch 3 alone: ask for one .* --backend torch-compile$"):
        latent(folder, "torch-aot", 2)
    monkeypatch.setattr(aot, "RECIPE", aot.RECIPE + 1)
    with refused(r"no AOTInductor package for .*; run: dipgo build"):
        latent(folder, "torch-aot")


def test_every_end_of_the_sides_has_every_end_of_the_batch():
    side = AxisRecord(min=4, opt=8, max=12)
    assert sizes_built({}) == [{}]
    assert sizes_built({"height": side, "width": side}) == [{"height": size, "width": size} for size in (4, 8, 12)]
    both = sizes_built({"batch": AxisRecord(min=1, opt=4, max=4), "height": side})
    assert both == [{"height": size, "batch": images} for images in (1, 4) for size in (4, 8, 12)]
