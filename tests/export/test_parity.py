"""The compiled program equals gated torch execution, for any SubNet; and the diffusers pipeline, for all gates 1."""

from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import engines
from dipgo.families import GuidedDenoiser, join
from dipgo.gating import gated
from dipgo.models import find_model
from dipgo.sampler import make_scheduler, tabulate
from dipgo.search.task import make_task
from dipgo.trace import trace
from dipgo.trajectory import Trajectory
from export.compiler import prepare, write_bundle
from tests.models import random_subnet, tiny_sdxl, tiny_unet, tiny_vae

STEPS = 5


@pytest.fixture(scope="module")
def task(tiny_dit):
    return make_task(find_model(tiny_dit), STEPS)


@pytest.fixture(scope="module")
def prepared(task):
    return prepare(task.trace, task.pipe)


def reference(task, subnet, classes, seed):
    task.pipe.set_progress_bar_config(disable=True)
    scale = subnet.sampler.guidance_scale
    generator = torch.Generator().manual_seed(seed)
    steps = subnet.sampler.steps
    with gated(task.pipe.transformer, subnet):
        return task.pipe(
            classes, guidance_scale=scale, num_inference_steps=steps, generator=generator, output_type="np"
        ).images


def error(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def compiled(prepared, subnet, sampler, folder, classes, seed):
    write_bundle(prepared, subnet, sampler, folder, force=True)
    with engines.load(folder) as program:
        return program.generate(classes, seed)


@pytest.mark.parametrize("name", ["ddim", "dpm++2m", "pndm", "unipc"])
def test_full_program_equals_the_pipeline(task, prepared, tmp_path, name):
    scheduler = make_scheduler(name, task.pipe.scheduler)
    sampler = tabulate(scheduler, STEPS)
    everything = random_subnet(task.trace, sampler, seed=0, keep=1.0)
    images = compiled(prepared, everything, sampler, tmp_path / "b", [0, 1, 2], 7)
    pipe, kept = task.pipe, task.pipe.scheduler
    pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(7)
    expected = pipe([0, 1, 2], num_inference_steps=STEPS, generator=generator, output_type="np").images
    pipe.scheduler = kept
    assert error(images, expected) <= 1e-4


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    seed=st.integers(0, 2**31),
    keep=st.floats(0, 1),
    backup=st.sampled_from([(1, None), (1, 1), (2, 0), (2, 1), (3, 1)]),
)
def test_any_subnet_equals_gated_torch(task, prepared, tmp_path_factory, seed, keep, backup):
    terms, channels = backup
    subnet = random_subnet(task.trace, task.sampler, seed, keep, terms, channels)
    folder = tmp_path_factory.mktemp("bundles") / "b"
    images = compiled(prepared, subnet, task.sampler, folder, [0, 2], 3)
    assert error(images, reference(task, subnet, [0, 2], 3)) <= 1e-4


@pytest.mark.parametrize(
    ("sites", "guidance", "terms", "channels"),
    [
        ("block", 5.0, 1, None),
        ("block", 1.0, 2, 1),
        ("branch", 5.0, 2, 1),
        ("layer", 5.0, 1, None),
        ("down_blocks.*.resnets.*,up_blocks.*.attentions.*,mid_block", 5.0, 2, 1),
    ],
)
def test_unet_with_tuple_outputs(tmp_path, sites, guidance, terms, channels):
    """A UNet's blocks hand out several tensors; with class conditions replaced by random text embeddings."""
    model = tiny_unet(tmp_path)
    traced = trace(model, sites, guidance)
    sampler = tabulate(DDIMScheduler(clip_sample=False), STEPS)
    prepared = prepare(traced, SimpleNamespace(vae=tiny_vae()))
    denoiser = UNet2DConditionModel.from_pretrained(tmp_path / "unet").eval()
    trajectory = Trajectory(GuidedDenoiser(denoiser, model.family, guidance), traced.sites, sampler)
    rows = 1 if guidance == 1 else 2
    conditions = {"encoder_hidden_states": torch.randn(rows, 77, 24, generator=torch.Generator().manual_seed(0))}
    for seed in range(3):
        subnet = random_subnet(traced, sampler, seed, 0.5, terms, channels)
        write_bundle(prepared, subnet, sampler, tmp_path / "b", force=True)
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed))
        weights = {name: torch.from_numpy(array) for name, array in subnet.weights.items()}
        with torch.no_grad():
            expected = trajectory.gated(noise, conditions, subnet.gates, weights, terms)[-1].numpy()
        with engines.load(tmp_path / "b") as program:
            actual = program.denoise(noise.numpy(), {name: value.numpy() for name, value in conditions.items()})
        assert error(actual, expected) <= 1e-4


def test_sdxl_with_all_its_conditions(tmp_path):
    task = make_task(find_model(tiny_sdxl(tmp_path / "model")), STEPS, sites="branch", guidance_scale=4.0)
    family, terms = task.model.family, 2
    prepared = prepare(task.trace, SimpleNamespace(vae=tiny_vae()))
    conditions = join(*family.conditions(task.pipe, ["a red fox"]), True)
    for seed in range(2):
        subnet = random_subnet(task.trace, task.sampler, seed, 0.5, terms, 1)
        write_bundle(prepared, subnet, task.sampler, tmp_path / "b", force=True)
        noise = torch.randn(task.model.latent_shape(1), generator=torch.Generator().manual_seed(seed))
        weights = {name: torch.from_numpy(array) for name, array in subnet.weights.items()}
        with torch.no_grad():
            expected = task.trajectory.gated(noise, conditions, subnet.gates, weights, terms)[-1].numpy()
        with engines.load(tmp_path / "b") as program:
            actual = program.denoise(noise.numpy(), {name: value.numpy() for name, value in conditions.items()})
        assert error(actual, expected) <= 1e-4


def test_a_step_that_computes_nothing_launches_nothing(tmp_path):
    """In a UNet, ε of an empty step is the last ε; the program skips the call and the result stays the same."""
    model = tiny_unet(tmp_path)
    traced = trace(model, "block", 1.0)
    sampler = tabulate(DDIMScheduler(clip_sample=False), 8)
    subnet = random_subnet(traced, sampler, 0, keep=1.0)
    subnet.gates[[2, 3, 6]] = False
    write_bundle(prepare(traced, SimpleNamespace(vae=tiny_vae())), subnet, sampler, tmp_path / "b")
    with engines.load(tmp_path / "b") as program:
        embeddings = np.ones((1, 77, 24), np.float32)
        program.denoise(program.noise(1, 0), {"encoder_hidden_states": embeddings})
        assert [step.graph is None for step in program.record.steps] == [not row.any() for row in subnet.gates]
        assert program.launches == 5
        assert len(program.record.graphs) == 1
    assert program.record.macs == 5 * traced.full_macs


def test_graphs_are_valid_and_hold_no_weights(task, prepared, tmp_path):
    subnet = random_subnet(task.trace, task.sampler, seed=1, terms=2, channels=1)
    write_bundle(prepared, subnet, task.sampler, tmp_path / "b")
    graphs = sorted((tmp_path / "b").glob("tiny-dit-*.onnx"))
    assert len(graphs) == len(np.unique(subnet.gates, axis=0)) + 1  # and what is computed before the loop
    weights = (tmp_path / "b" / "weights.safetensors").stat().st_size
    parameters = 4 * sum(parameter.numel() for parameter in task.pipe.transformer.parameters())
    assert abs(weights - parameters) <= 0.02 * parameters
    for path in graphs:
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(str(path), load_external_data=False)
        external = [tensor for tensor in model.graph.initializer if tensor.data_location == 1]
        if not external:
            continue  # a step served at the output reads no weight
        assert {entry.value for tensor in external for entry in tensor.external_data if entry.key == "location"} == {
            "weights.safetensors"
        }
        inline = sum(len(tensor.raw_data) for tensor in model.graph.initializer if tensor.data_location == 0)
        assert inline < 40_000  # the position embedding, which is no parameter, and shape constants
        text = path.read_bytes()
        assert b"site-packages" not in text
        assert b"stack_trace" not in text
        operators = [node.op_type for node in model.graph.node]
        assert "SequenceAt" not in operators


def test_bundles_are_reproducible(task, prepared, tmp_path):
    subnet = random_subnet(task.trace, task.sampler, seed=1)
    write_bundle(prepared, subnet, task.sampler, tmp_path / "a")
    write_bundle(prepared, subnet, task.sampler, tmp_path / "b")
    assert (tmp_path / "a" / "bundle.json").read_bytes() == (tmp_path / "b" / "bundle.json").read_bytes()
