"""Every family against the real diffusers pipeline; and classes that no family names."""

import json
import shutil

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler

from dipgo.eager.gating import gated
from dipgo.graph.trace import trace
from dipgo.model.families import join
from dipgo.model.models import find_model
from dipgo.model.sampler import make_scheduler
from dipgo.searching.search import search
from dipgo.searching.task import make_task
from engines.pipeline.formats import draw_noise
from tests import models, zoo
from tests.checks import misused, refused
from tests.models import random_subnet

STEPS = 4
PROMPTS = ["a cat", "two dogs in the rain"]
KINDS = [
    "sd",
    "sd-v",
    "sd-pag",
    pytest.param("lcm", marks=pytest.mark.slow),
    "sdxl",
    "pixart",
    "pixart-1024",
    "pixart-sigma",
    "sana",
    "unconditional",
    "flux",
    "flux-schnell",
    "sd3",
]


def run_pipeline(task, seed):
    """Return the final latents of the pipeline itself."""
    pipe = task.pipe
    given = {"generator": torch.Generator().manual_seed(seed), "num_inference_steps": STEPS}
    if task.model.family.conditioned_by == "nothing":
        images = pipe(batch_size=2, output_type="pt", **given).images
        return images * 2 - 1
    if task.model.family.pixels and task.model.folder.name.startswith("tiny-flux"):
        given |= dict(zip(("height", "width"), task.model.family.pixels, strict=True))
    return pipe(PROMPTS, guidance_scale=task.guidance_scale, output_type="latent", **given).images


def run_trajectory(task, seed, subnet=None):
    family, generator = task.model.family, torch.Generator().manual_seed(seed)
    shape = (2, *task.model.latent_shape(1)[1:])
    noise = torch.from_numpy(draw_noise(shape, generator, family.noise, task.sampler.draws))
    conditions = join(*family.conditions(task.pipe, PROMPTS), task.trace.rows > 1)
    with torch.no_grad():
        if subnet is None:
            return task.trajectory.full(noise, conditions)[-1]
        return task.trajectory.gated(noise, conditions, subnet.gates, subnet.schedule.tensors())[-1]


def same(actual, expected, images=False):
    if images:  # where there is no latent, what is compared are pixels, which the pipeline clamps
        actual = actual.clamp(-1, 1)
    return torch.linalg.norm(actual - expected) <= 1e-4 * torch.linalg.norm(expected)


@pytest.mark.parametrize("name", KINDS)
def test_trajectory_equals_the_pipeline(name):
    """Prompts encoded by real text encoders, real schedulers; full, then under random gates."""
    images = name == "unconditional"
    task = zoo.task(name, STEPS)
    assert same(run_trajectory(task, 3), run_pipeline(task, 3), images)
    subnet = random_subnet(task.trace, task.sampler, seed=1)
    with gated(getattr(task.pipe, task.model.family.component), subnet):
        expected = run_pipeline(task, 4)
    assert same(run_trajectory(task, 4, subnet), expected, images)


def test_a_pipeline_whose_sampler_draws_noise(tmp_path):
    """By itself, in a search, and under another sampler."""
    folder = models.tiny_unconditional(tmp_path / "ddpm", DDPMPipeline, DDPMScheduler)
    own = make_task(find_model(folder), STEPS, None, zoo.SITES["unconditional"], guidance_scale=1.0)
    own.pipe.set_progress_bar_config(disable=True)
    assert own.sampler.draws == STEPS - 1
    assert same(run_trajectory(own, 3), run_pipeline(own, 3), images=True)
    found = search(own, zoo.search_config(STEPS, 0.6, **zoo.LEAST))
    assert found.cost.ratio <= 0.6
    assert found.search.psnr_db == max(found.search.held_out_psnr_db.values())
    with gated(own.pipe.unet, found):
        expected = run_pipeline(own, 4)
    assert same(run_trajectory(own, 4, found), expected, images=True)
    alike = [task.draw(2, 7) for task in (own, own.with_sampler(make_scheduler("ddim", own.pipe.scheduler), STEPS))]
    assert torch.equal(alike[0].noise[:, 0], alike[1].noise)  # the initial noise does not depend on the sampler
    folders = [zoo.pipeline("unconditional"), folder]
    tasks = [make_task(find_model(folder), STEPS, "ddim", "mid_block", guidance_scale=1.0) for folder in folders]
    assert type(tasks[1].pipe).__name__ == "DDPMPipeline"
    assert same(run_trajectory(tasks[1], 5), run_pipeline(tasks[0], 5), images=True)
    assert isinstance(tasks[1].pipe.scheduler, DDPMScheduler)


def test_a_pipeline_that_clips_is_checked_without_and_runs_under_another_sampler(tmp_path):
    folder = tmp_path / "clips"
    models.tiny_unconditional(folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"clip_sample": True}))
    with misused("DDIMScheduler is not linear as configured: it clips"):
        make_task(find_model(str(folder)), STEPS, None, "mid_block", guidance_scale=1.0)
    task = make_task(find_model(str(folder)), STEPS, "dpm++2m", "mid_block", guidance_scale=1.0)
    task.pipe.scheduler = make_scheduler("dpm++2m", task.pipe.scheduler)
    assert torch.isfinite(run_trajectory(task, 5)).all()


def test_a_folder_without_its_scheduler_is_refused(tmp_path):
    folder = shutil.copytree(zoo.pipeline("unconditional"), tmp_path / "model")
    (folder / "scheduler" / "scheduler_config.json").write_text("[]")
    with refused("no JSON object"):
        make_task(find_model(str(folder)), STEPS, "ddim", "mid_block", guidance_scale=1.0)
    shutil.rmtree(folder / "scheduler")
    with refused("no scheduler/scheduler_config.json in it; download or save the pipeline again"):
        find_model(str(folder))


def test_examples_have_the_form_of_conditions():
    for name in ("sdxl", "pixart-1024", "pixart-sigma", "sana"):
        model = zoo.model(name)
        made, example = join(*model.family.conditions(model.pipeline(), PROMPTS), True), model.family.example
        forms = [
            {key: (value.shape, value.dtype) for key, value in each.items()}
            for each in (made, example(model.config, 4))
        ]
        assert forms[0] == forms[1]


def test_classes_without_an_entry_have_their_lists_of_modules_for_sites():
    model = zoo.model("unconditional")
    names = [site.name for site in trace(model, None, 1.0).sites]
    assert names == [f"{way}_blocks.{number}" for way in ("down", "up") for number in (0, 1)]
    with misused("'layer' matches no module of UNet2DModel; use one of block, or module names such as"):
        trace(model, "layer", 1.0)


def test_prompts_of_another_length_are_refused():
    model = zoo.model("sana")
    pipe = model.pipeline()
    encode = pipe.encode_prompt
    pipe.encode_prompt = lambda *args, **kwargs: encode(*args, **kwargs | {"max_sequence_length": 20})
    with misused(r"makes 'encoder_hidden_states' \[4, 20, 12\] of these prompts, not \[4, 300, 12\]"):
        model.family.conditions(pipe, PROMPTS)
