"""Bundles for a range of batches and sizes: parity with the gated diffusers pipeline at several; what is refused."""

import numpy as np
import onnx
import pytest
import torch
from diffusers import DDIMScheduler

import dipgo
from dipgo.eager.gating import gated
from export.axes import evaluate, profile_of, shape_at, values_at
from export.compiler import compile_subnet, prepare, write_bundle
from export.config import ExportConfig
from export.plan.layouts import LAYOUTS
from export.records.graphs import AxisRecord, TensorRecord
from export.sizes import Sizes, sizes_for
from tests import zoo
from tests.checks import error, misused, refused
from tests.models import random_subnet

STEPS = 3
PROMPTS = ["a red fox", "two dogs", "a bowl of oranges", "rain"]
CASES = {  # sites, batch, size in pixels, requests as images and size
    "dit": ("layer", "1:4", None, [(1, (16, 16)), (3, (16, 16)), (4, (16, 16)), (6, (16, 16))]),
    "sdxl": ("branch", "1:2", "16:32", [(1, (16, 16)), (2, (24, 16)), (2, (32, 32)), (3, (16, 32))]),
}


class Case:
    """A model converted once for its ranges, and the pipeline."""

    def __init__(self, kind, sites, batch, size):
        self.model = zoo.model(kind)
        self.sizes = sizes_for(self.model, batch, size)
        own = None if size is None else self.sizes.latent_at("opt")[2:]
        self.traced = zoo.trace(kind, sites, 4.0, size=own)
        self.pipe = self.model.pipeline()
        self.pipe.scheduler = DDIMScheduler(clip_sample=False)
        self.pipe.set_progress_bar_config(disable=True)
        self.sampler = self.model.family.table(self.pipe.scheduler, STEPS)
        self.prepared = zoo.converted(self.traced, batch, size)

    def write(self, folder, layout, seed=0):
        subnet = random_subnet(self.traced, self.sampler, seed, 0.5, 2, 2)
        return subnet, write_bundle(self.prepared, subnet, self.sampler, folder, True, ExportConfig(graphs=layout))

    def expected(self, subnet, given, size, seed):
        """Images of the gated pipeline itself."""
        sides = {} if self.model.family.conditioned_by == "class" else dict(zip(("height", "width"), size, strict=True))
        options = {"num_inference_steps": STEPS, "guidance_scale": 4.0, "output_type": "np", **sides}
        with gated(getattr(self.pipe, self.model.family.component), subnet):
            return self.pipe(given, generator=torch.Generator().manual_seed(seed), **options).images


@pytest.fixture(scope="module", params=zoo.some([(name,) for name in CASES], {("dit",)}))
def case(request):
    *arguments, requests = CASES[request.param]
    return Case(request.param, *arguments), requests


@pytest.mark.parametrize("layout", zoo.some([(layout,) for layout in sorted(LAYOUTS)], {("signature",)}))
def test_every_size_equals_the_pipeline(case, tmp_path, layout):
    made, requests = case
    subnet, record = made.write(tmp_path / "b", layout)
    by_class = made.model.family.conditioned_by == "class"
    with dipgo.load(tmp_path / "b") as program:
        for count, size in requests:
            given = [k % 3 for k in range(count)] if by_class else PROMPTS[:count]
            images = program.generate(given, 5, size=size)
            assert images.shape == (count, *size, 3)
            assert error(images, made.expected(subnet, given, size, 5)) <= 1e-4
        launches = sum(len(step.launches) for step in record.steps)
        calls = [-(-count // program.batch) for count, _ in requests]
        assert program.contexts.launches == launches * sum(calls)


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_graphs_are_valid_and_say_their_sizes(case, tmp_path, layout):
    made, _ = case
    _, record = made.write(tmp_path / "b", layout, seed=1)
    largest = values_at(record.axes, "max")
    assert record.slots
    for slot in record.slots:
        assert slot.bytes == np.dtype(slot.dtype).itemsize * np.prod(shape_at(slot.shape, largest))
    for part in [*record.graphs.values(), *record.prologues]:
        path = tmp_path / "b" / part.file
        onnx.checker.check_model(str(path), full_check=True)
        graph = onnx.load(str(path), load_external_data=False).graph
        for value, tensor in zip([*graph.input, *graph.output], [*part.inputs, *part.outputs], strict=True):
            dims = [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim]
            assert (value.name, dims) == (tensor.name, tensor.shape)
        assert not {"SequenceAt", "SplitToSequence"} & {node.op_type for node in graph.node}


def test_macs_are_those_at_opt(case, tmp_path):
    """As many as a bundle has that is made for this size alone."""
    made, _ = case
    _, record = made.write(tmp_path / "b", "signature")
    fixed = Sizes(made.sizes.latent_at("opt")[0], made.sizes.latent_at("opt")[1:])
    alone = prepare(made.traced, whole=False, sizes=fixed)
    subnet = random_subnet(made.traced, made.sampler, 0, 0.5, 2, 2)
    static = write_bundle(alone, subnet, made.sampler, tmp_path / "s")
    assert not static.axes
    assert [graph.macs for graph in record.graphs.values()] == [graph.macs for graph in static.graphs.values()]
    assert record.parts == static.parts
    assert record.macs == static.macs


def test_tensorrt_parses_and_builds(case, tmp_path):
    trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install -e '.[tensorrt-rtx]'")
    made, _ = case
    _, record = made.write(tmp_path / "b", "signature", seed=2)
    logger, built = trt.Logger(trt.Logger.ERROR), 0
    for part in [*record.graphs.values(), *record.prologues]:
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        assert parser.parse_from_file(str(tmp_path / "b" / part.file)), parser.get_error(0).desc()
        graph = onnx.load(str(tmp_path / "b" / part.file), load_external_data=False).graph
        if any(node.op_type == "Attention" for node in graph.node):
            continue  # for float32 attention of dynamic shape TensorRT-RTX 1.7 has no kernel
        profile = builder.create_optimization_profile()
        for tensor in part.inputs:
            profile.set_shape(tensor.name, *profile_of(tensor, record.axes))
        config = builder.create_builder_config()
        config.add_optimization_profile(profile)
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM89, 0)
        assert builder.build_serialized_network(network, config) is not None
        built += 1
    assert built


def test_expressions_are_evaluated_and_nothing_else():
    values = {"batch": 3, "height": 24}
    sizes = {"2*batch": 6, "height//8*5": 15, "(height+1)//2 - batch": 9, "-batch": -3}
    assert {size: evaluate(size, values) for size in sizes} == sizes
    assert evaluate(7, {}) == 7
    for bad in ("width", "2**batch", "batch.real", "print(1)", "1.5", "batch//0", "[1]", "batch if 1 else 2", "", "("):
        with refused("is no size over batch, height"):
            evaluate(bad, values)


def test_profiles():
    axes = {"batch": AxisRecord(min=1, opt=4, max=8), "height": AxisRecord(min=8, opt=8, max=16, multiple=4)}
    tensor = TensorRecord(name="x", dtype="float32", shape=["2*batch", 320, "height//4", 7])
    assert profile_of(tensor, axes) == ((2, 320, 2, 7), (8, 320, 2, 7), (16, 320, 4, 7))


def test_sizes_are_read():
    unconditional = zoo.model("unconditional")
    assert sizes_for(unconditional) == Sizes(1, (3, 8, 8))
    ranged = sizes_for(unconditional, "1:2:4", "6x4:12")
    assert ranged == Sizes(AxisRecord(min=1, opt=2, max=4), (3, 6, AxisRecord(min=4, opt=8, max=12, multiple=2)))
    assert ranged.latent == ["batch", 3, 6, "width"]
    assert ranged.text == "1-4x3x6x4-12"
    assert sizes_for(unconditional, "1:4", "10:12").axes["batch"].opt == 4
    assert sizes_for(unconditional, 1, "10:12").axes["width"].opt == 12  # its own size, 8, lies outside
    for batch, size, message in (
        ("4:1", None, r"--batch 4:1: runs backwards"),
        ("0:4", None, r"--batch 0:4: give a number, min:max or min:opt:max"),
        ("1:2:3:4", None, r"give a number, min:max or min:opt:max"),
        ("²", None, r"give a number"),
        (1, "8x8x8", r"--size 8x8x8: give one number or range, or HEIGHTxWIDTH"),
        (1, "8:13", r"--size 8:13: .* takes multiples of 2 pixels; 12 is near to 13"),
    ):
        with misused(message):
            sizes_for(unconditional, batch, size)


def test_a_table_of_positions_is_for_one_size(tmp_path):
    """Refused in one line, but for the model's own size; nothing is written."""
    model, traced = zoo.model("dit"), zoo.trace("dit")
    subnet = random_subnet(traced, zoo.sampler("dit", STEPS), 0)
    with misused(r"'pos_embed' holds a table of positions for a latent of 8x8"):
        compile_subnet(subnet, model, tmp_path / "b", ExportConfig(size="16:32"))
    assert not (tmp_path / "b").exists()
    config = ExportConfig(batch="1:2", size="16")
    assert compile_subnet(subnet, model, tmp_path / "b", config).axes.keys() == {"batch"}
