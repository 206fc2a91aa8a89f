"""Programs in half precision are as good as torch in the same precision."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

import dipgo
from dipgo.eager.trajectory import Trajectory
from dipgo.graph.exported import in_dtype
from dipgo.model.families import GuidedDenoiser, join
from export.compiler import write_bundle
from export.config import ExportConfig
from export.plan.layouts import LAYOUTS
from tests import zoo
from tests.checks import error
from tests.models import random_subnet


@pytest.mark.parametrize(
    ("kind", "guidance", "batch"),
    zoo.some(
        [(kind, *way) for kind in ("dit", "sd", "sdxl", "pixart") for way in ((4.0, 1), (1.0, 1), (4.0, 2), (1.0, 2))],
        {("dit", 1.0, 2), ("dit", 4.0, 1), ("sd", 4.0, 2)},
    ),
)
def test_float16_is_as_close_to_float32_as_torch(tmp_path, kind, guidance, batch):
    """The program's error is at most twice that of torch in float16, under every layout."""
    given = [1, 2] if kind == "dit" else ["a red fox", "two blue hens"]
    model = zoo.model(kind)
    pipe, family = model.pipeline(), model.family
    denoiser = getattr(pipe, family.component)
    conditions = join(*family.conditions(pipe, given[:batch]), guidance > 1)
    sampler = family.table(DDIMScheduler(clip_sample=False), 5)
    traced = zoo.trace(kind, "branch" if kind == "sdxl" else None, guidance, torch.float16)
    prepared = zoo.converted(traced, batch, whole=False)
    noise = torch.randn(model.latent_shape(batch), generator=torch.Generator().manual_seed(0))
    half = {name: value.half() if value.is_floating_point() else value for name, value in conditions.items()}
    for seed, layout in enumerate(LAYOUTS):
        subnet = random_subnet(traced, sampler, seed, 0.5, 2, 2)

        def run(guided, values, subnet=subnet):
            trajectory = Trajectory(guided, traced.sites, sampler)
            with torch.no_grad():
                return trajectory.gated(noise, values, subnet.gates, subnet.schedule.tensors())[-1].float().numpy()

        exact = run(GuidedDenoiser(denoiser.float(), family, guidance), conditions)
        rounded = run(GuidedDenoiser(denoiser.half(), in_dtype(family, torch.float16), guidance), half)
        record = write_bundle(prepared, subnet, sampler, tmp_path / "b", force=True, config=ExportConfig(graphs=layout))
        assert record.dtype == "float16"
        with dipgo.load(tmp_path / "b") as program:
            actual = program.denoise(noise.numpy(), {name: value.numpy() for name, value in half.items()})
        assert actual.dtype == np.float32
        assert error(actual, exact) <= 2 * error(rounded, exact) + 1e-4


def test_what_is_evaluated_in_float32_leaves_the_graph_in_its_own_types():
    """The tables' part is cut from the graph that others are cut from after it."""
    prepared = zoo.converted(zoo.trace("sd", guidance=4.0, dtype=torch.float16))
    graph = prepared.denoiser.symbolic.graph
    values = [value for node in graph for value in node.outputs] + list(graph.initializers.values())
    before = {value.name: value.dtype for value in values}
    prepared.tables([999.0, 499.0, 7.5])
    assert {value.name: value.dtype for value in values} == before
