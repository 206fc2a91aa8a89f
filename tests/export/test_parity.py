"""The compiled program equals gated torch execution, for any SubNet and layout; and diffusers, for all gates 1."""

import os

import numpy as np
import onnx
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import dipgo
from dipgo.eager.trajectory import Trajectory
from dipgo.model.families import GuidedDenoiser, join
from dipgo.model.sampler import make_scheduler, tabulate
from dipgo.schedule.fixed_schedules import extrapolation
from dipgo.schedule.schedule import backup_outputs
from dipgo.schedule.subnet import load_subnet
from export.bundle import open_bundle
from export.compiler import write_bundle
from export.config import ExportConfig
from export.plan.layouts import LAYOUTS
from export.plan.merge import merged
from tests import zoo
from tests.checks import error
from tests.models import random_subnet

STEPS = 5
FUZZ = float(os.environ.get("DIPGO_FUZZ", "0.1"))  # how many times as many random SubNets: make test-all, make fuzz
RANDOM = {
    "seed": st.integers(0, 2**31),
    "keep": st.floats(0, 1),
    "backup": st.sampled_from([(1, None), (1, 1), (2, 0), (2, 1), (2, 2), (3, 2)]),
    "layout": st.sampled_from(sorted(LAYOUTS)),
    "sampler": st.sampled_from(["ddim", "dpm++2m", "unipc", "pndm"]),
}
WITH_HEUN = RANDOM | {"sampler": st.sampled_from(["ddim", "dpm++2m", "unipc", "pndm", "heun"])}


def chosen(last):
    """Run a test on SubNets that between them have every history, kind of weights and layout, and silent steps."""
    cases = [
        (0.6, (1, None), "signature", "pndm"),
        (0.0, (1, None), "segment", "ddim"),
        (0.0, (2, 2), "signature", "dpm++2m"),
        (0.5, (3, 2), "segment", "unipc"),
        (0.7, (1, 1), "signature", "dpm++2m"),
        (0.5, (2, 0), "step", last),
    ]
    names = ("keep", "backup", "layout", "sampler")

    def decorate(test):
        for seed, case in enumerate(cases):
            test = example(seed=seed, **dict(zip(names, case, strict=True)))(test)
        return test

    return decorate


@pytest.fixture(scope="module")
def prepared(task):
    return zoo.converted(task.trace)


class Case:
    """A small model, converted once, and the same model in torch."""

    def __init__(self, traced, denoiser, conditions, scheduler, batch=1):
        self.traced, self.conditions, self.scheduler, self.batch = traced, conditions, scheduler, batch
        self.guided = GuidedDenoiser(denoiser, traced.model.family, traced.guidance_scale)
        self.prepared = zoo.converted(traced, batch, whole=False)

    def error(self, folder, seed, keep, backup, sampler, options):
        """Compile a random SubNet, run it, and return its relative error against gated torch."""
        terms, channels = backup
        table = self.traced.model.family.table(make_scheduler(sampler, self.scheduler), STEPS)
        subnet = random_subnet(self.traced, table, seed, keep, terms, channels)
        record = write_bundle(self.prepared, subnet, table, folder, force=True, config=options)
        noise = torch.randn(self.traced.model.latent_shape(self.batch), generator=torch.Generator().manual_seed(seed))
        with dipgo.load(folder) as program:
            assert program.batch == self.batch
            given = {name: value.numpy() for name, value in self.conditions.items()}
            actual = program.denoise(noise.numpy(), given)
            again = program.denoise(noise.numpy(), given)
        assert np.array_equal(actual, again)
        if options.max_graphs:
            subnet = load_subnet(folder / record.subnet_file)
        backups = subnet.schedule.tensors()
        trajectory = Trajectory(self.guided, self.traced.sites, table)
        with torch.no_grad():
            expected = trajectory.gated(noise, self.conditions, subnet.gates, backups)[-1].numpy()
        return error(actual, expected)


@pytest.fixture(scope="module")
def dit(task):
    conditions = join(*task.model.family.conditions(task.pipe, [1]), True)
    return Case(task.trace, task.pipe.transformer, conditions, task.pipe.scheduler)


@pytest.fixture(scope="module")
def unet():
    traced = zoo.trace("sd", "layer")
    conditions = {"encoder_hidden_states": torch.randn(2, 77, 24, generator=torch.Generator().manual_seed(0))}
    return Case(traced, traced.model.pipeline().unet, conditions, DDIMScheduler(clip_sample=False))


@settings(max_examples=int(150 * FUZZ), deadline=None, suppress_health_check=list(HealthCheck))
@given(**RANDOM)
@chosen("pndm")
def test_any_subnet_equals_gated_torch(dit, tmp_path_factory, seed, keep, backup, layout, sampler):
    folder = tmp_path_factory.getbasetemp() / "any"
    assert dit.error(folder, seed, keep, backup, sampler, ExportConfig(graphs=layout)) <= 1e-4


@settings(max_examples=int(60 * FUZZ), deadline=None, suppress_health_check=list(HealthCheck))
@given(**WITH_HEUN)
@chosen("heun")
def test_any_subnet_of_a_unet_equals_gated_torch(unet, tmp_path_factory, seed, keep, backup, layout, sampler):
    folder = tmp_path_factory.getbasetemp() / "any"
    assert unet.error(folder, seed, keep, backup, sampler, ExportConfig(graphs=layout)) <= 1e-4


def test_the_host_steps_where_graphs_cannot(unet, tmp_path, monkeypatch):
    """As for samplers of a long memory; this one scales the denoiser's input."""
    monkeypatch.setattr("export.assembly.recurrence", lambda sampler, launched: None)
    assert unet.error(tmp_path / "b", 0, 0.5, (2, 1), "euler", ExportConfig()) <= 1e-4
    assert dipgo.load(tmp_path / "b").record.solver.kind == "host"


def test_merged_backups_follow_the_new_histories(dit):
    """Learned weights stay where a backup combines what it did, and give way to extrapolation elsewhere."""
    table = dit.traced.model.family.table(dit.scheduler, 8)
    subnet = random_subnet(dit.traced, table, 0, 0.5, 2, 1)
    new = merged(subnet, dit.traced, 2)
    straight = extrapolation(dit.traced, new.gates).backups
    kept = changed = 0
    for name, site, _ in backup_outputs(dit.traced):
        for step in np.flatnonzero(~new.gates[:, site]):
            before, after = (np.flatnonzero(gates[:step, site])[-2:].tolist() for gates in (subnet.gates, new.gates))
            if before == after:
                kept += 1
                assert np.array_equal(new.schedule.backups[name][step], subnet.schedule.backups[name][step])
            else:
                changed += 1
                assert (new.schedule.backups[name][step] == straight[name][step][:, None]).all()
    assert kept
    assert changed


@pytest.mark.parametrize("graphs", [1, 2, 4])
@pytest.mark.parametrize("backup", [(1, None), (2, 2), (3, 0)])
def test_merged_signatures_equal_their_subnet(unet, tmp_path, graphs, backup):
    for seed in range(2):
        options = ExportConfig(max_graphs=graphs)
        assert unet.error(tmp_path / "b", seed, 0.6, backup, "ddim", options) <= 1e-4
        assert len(dipgo.load(tmp_path / "b").record.graphs) <= graphs


@pytest.mark.parametrize("name", ["ddim", "dpm++2m", "pndm", "unipc"])
def test_full_program_equals_the_pipeline(task, prepared, tmp_path, monkeypatch, name):
    scheduler = make_scheduler(name, task.pipe.scheduler)
    sampler = tabulate(scheduler, STEPS)
    everything = random_subnet(task.trace, sampler, seed=0, keep=1.0)
    write_bundle(prepared, everything, sampler, tmp_path / "b")
    with dipgo.load(tmp_path / "b") as program:
        images = program.generate([0, 1, 2], 7)
    monkeypatch.setattr(task.pipe, "scheduler", scheduler)
    generator = torch.Generator().manual_seed(7)
    expected = task.pipe([0, 1, 2], num_inference_steps=STEPS, generator=generator, output_type="np").images
    assert error(images, expected) <= 1e-4


@pytest.mark.parametrize(
    ("sites", "guidance", "terms", "channels"),
    zoo.some(
        [
            ("block", 4.0, 1, None),
            ("block", 1.0, 2, 1),
            ("branch", 4.0, 2, 1),
            ("down_blocks.*.resnets.*,up_blocks.*.attentions.*,mid_block", 4.0, 2, 1),
        ],
        {("block", 1.0, 2, 1)},
    ),
)
def test_unet_with_tuple_outputs(unet, tmp_path, sites, guidance, terms, channels):
    """A UNet's blocks hand out several tensors."""
    rows = 1 if guidance == 1 else 2
    conditions = {name: value[:rows] for name, value in unet.conditions.items()}
    case = Case(zoo.trace("sd", sites, guidance), unet.guided.denoiser, conditions, unet.scheduler)
    for seed, layout in enumerate(LAYOUTS):
        assert case.error(tmp_path / "b", seed, 0.5, (terms, channels), "ddim", ExportConfig(graphs=layout)) <= 1e-4


FAMILIES = ("sdxl", "pixart", "pixart-512", "pixart-1024", "sana", "unconditional")


@pytest.mark.parametrize(
    ("kind", "guidance", "batch"),
    zoo.some(
        [
            (kind, *way)
            for kind in FAMILIES
            for way in ((4.0, 1), (1.0, 1), (4.0, 2), (1.0, 2))
            if (kind, way[0]) != ("unconditional", 4.0)  # there is nothing to be guided by
        ],
        {("sdxl", 4.0, 1), ("pixart-1024", 4.0, 1), ("pixart", 1.0, 2), ("sana", 4.0, 2)},
    ),
)
def test_every_family(tmp_path, kind, guidance, batch):
    model, sites = zoo.model(kind), "branch" if kind == "sdxl" else None
    pipe = model.pipeline()
    conditions = join(*model.family.conditions(pipe, ["a red fox", "two blue hens"][:batch]), guidance > 1)
    scheduler = DDIMScheduler(clip_sample=False)
    denoiser = getattr(pipe, model.family.component)
    case = Case(zoo.trace(kind, sites, guidance), denoiser, conditions, scheduler, batch)
    for seed, layout in enumerate(LAYOUTS):
        assert case.error(tmp_path / "b", seed, 0.5, (2, 1), "ddim", ExportConfig(graphs=layout)) <= 1e-4


def test_a_step_that_computes_nothing_launches_nothing(tmp_path):
    """In a UNet, ε of an empty step is the last ε; the program skips the call and the result stays the same."""
    traced = zoo.trace("sd", "block", 1.0)
    sampler = tabulate(DDIMScheduler(clip_sample=False), 8)
    subnet = random_subnet(traced, sampler, 0, keep=1.0)
    subnet.gates[[2, 3, 6]] = False
    write_bundle(zoo.converted(traced, whole=False), subnet, sampler, tmp_path / "b")
    with dipgo.load(tmp_path / "b") as program:
        embeddings = np.ones((1, 77, 24), np.float32)
        program.denoise(program.noise(1, 0), {"encoder_hidden_states": embeddings})
        assert [not step.launches for step in program.record.steps] == [not row.any() for row in subnet.gates]
        assert program.contexts.launches == 5
        assert len(program.record.graphs) == 1
    assert program.record.macs == 5 * traced.macs.full


SHAPES = [("dit", layout, torch.float32) for layout in sorted(LAYOUTS)] + [("dit", "signature", torch.bfloat16)]
SHAPES += [("sdxl", "step", torch.bfloat16), *((kind, "segment", torch.float16) for kind in zoo.PIPELINES)]


@pytest.mark.parametrize(("kind", "layout", "dtype"), zoo.some(SHAPES, SHAPES[:4]))
def test_graphs_are_valid_and_hold_no_weights(kind, layout, dtype):
    traced, sampler = zoo.trace(kind, dtype=dtype), zoo.sampler(kind, STEPS)
    subnet = random_subnet(traced, sampler, seed=1, terms=2, channels=1)
    folder = zoo.bundle(traced, sampler, subnet, layout, whole=False)
    record = open_bundle(folder).record
    signatures = len(np.unique(subnet.gates, axis=0))
    assert len(record.graphs) == {"signature": signatures, "step": STEPS}.get(layout, len(record.graphs))
    files = [part.file for part in [*record.graphs.values(), *record.prologues]]
    assert sorted(files) == sorted(path.name for path in folder.glob("*.onnx"))
    held = []
    for file in files:
        onnx.checker.check_model(str(folder / file), full_check=True)
        graph = onnx.load(str(folder / file), load_external_data=False).graph
        external = [tensor for tensor in graph.initializer if tensor.data_location == 1]
        places = {entry.value for tensor in external for entry in tensor.external_data if entry.key == "location"}
        assert places <= {*record.files, "constants.safetensors"}
        assert sum(len(tensor.raw_data) for tensor in graph.initializer if tensor.data_location == 0) < 4096
        text = (folder / file).read_bytes()
        assert b"site-packages" not in text
        assert b"stack_trace" not in text
        assert "SequenceAt" not in [node.op_type for node in graph.node]
        if file in [part.file for part in record.graphs.values()]:
            held += [tensor.name for tensor in external if "weight" in tensor.name]
    assert held
    assert layout != "segment" or len(held) == len(set(held))


def test_what_leaves_the_loop(task, prepared, tmp_path):
    """The parts' parameters are the denoiser's, and the loop's graphs hold those of the loop alone."""
    subnet = random_subnet(task.trace, task.sampler, seed=1, keep=1.0)
    record = write_bundle(prepared, subnet, task.sampler, tmp_path / "b")
    parts = {part.part: part for part in record.parts}
    total = sum(parameter.numel() for parameter in task.pipe.transformer.parameters())
    assert sum(part.parameters for part in record.parts) == total
    assert parts["table"].parameters > 0
    assert parts["steps"].parameters > 0
    (graph,) = record.graphs.values()
    assert graph.parameters == parts["loop"].parameters
    assert {prologue.kind: prologue.parameters for prologue in record.prologues}["steps"] == parts["steps"].parameters
    assert parts["loop"].macs == graph.macs * STEPS


def test_bundles_are_reproducible(task, prepared, tmp_path):
    subnet = random_subnet(task.trace, task.sampler, seed=1)
    write_bundle(prepared, subnet, task.sampler, tmp_path / "a")
    write_bundle(prepared, subnet, task.sampler, tmp_path / "b")
    assert (tmp_path / "a" / "bundle.json").read_bytes() == (tmp_path / "b" / "bundle.json").read_bytes()
