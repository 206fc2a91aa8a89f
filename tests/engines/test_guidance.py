"""Guidance that a request chooses: the images of the gated diffusers pipeline at every scale."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import dipgo
from benchmarks.bench import parity
from dipgo.base.guidance import GuidanceScale
from engines.serving.limits import Limits
from engines.serving.requests import Row, read_rows, render
from export.compiler import compile_subnet
from export.config import ExportConfig
from tests import command, models, zoo
from tests.checks import error, misused
from tests.engines.dropin import compiled

KINDS = ["sd", "dit", "sdxl", "pixart", "flux", "sd3", "cogview4"]
WHOLE = ("sd", "dit", "pixart", "flux", "sd3")
SCALES = (1.5, 12.0)


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_those_of_the_gated_pipeline_at_every_scale(kind):
    made = compiled(kind, kind in WHOLE)
    usual = made.expected()
    with dipgo.attach(made.pipe, made.folder) as pipe:
        attached = [made.call(pipe, guidance_scale=scale) for scale in SCALES]
        assert error(made.call(pipe), usual) <= 1e-4
    for scale, images in zip(SCALES, attached, strict=True):
        expected = made.expected(guidance_scale=scale)
        assert error(expected, usual) > 1e-3
        assert error(images, expected) <= 1e-4
        if kind in WHOLE:
            with dipgo.load(made.folder) as pipe:
                assert error(made.call(pipe, guidance_scale=scale), expected) <= 1e-4


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_no_guidance_is_the_conditional_pass(scale):
    """diffusers makes one pass then, and ignores the negative prompt."""
    made = compiled("dit")
    expected = made.expected(guidance_scale=scale)
    with dipgo.load(made.folder) as pipe:
        assert error(made.call(pipe, guidance_scale=scale), expected) <= 1e-4
    with dipgo.attach(made.pipe, made.folder) as pipe:
        assert error(made.call(pipe, guidance_scale=scale), expected) <= 1e-4


@pytest.mark.parametrize(
    "kind", ["sd", "dit", *(pytest.param(each, marks=pytest.mark.slow) for each in ("sd3", "qwen"))]
)
def test_no_guidance_takes_one_pass_where_there_is_a_program_of_it(kind, tmp_path):
    made = replace(compiled(kind), folder=tmp_path / "b")
    config = ExportConfig(unguided=True, lora_rank=2 if kind == "sd" else 0)
    record = compile_subnet(made.subnet, zoo.model(kind), made.folder, config)
    off = {record.conditioning.scale: 1.0, **({} if kind == "dit" else {"negative_prompt": "a harbour"})}
    usual, expected = made.expected(), made.expected(guided=False, **off)
    with dipgo.load(made.folder) as pipe:
        assert error(made.call(pipe, **off), expected) <= 1e-4
        assert pipe.contexts.launches == 0 < pipe.unguided.contexts.launches
        assert error(made.call(pipe), usual) <= 1e-4
        assert (pipe.adapted is None) == (kind != "sd")
    with dipgo.attach(made.pipe, made.folder) as pipe:
        assert error(made.call(pipe, **off), expected) <= 1e-4
        assert error(made.call(pipe), usual) <= 1e-4
    assert parity.verify(made.folder).passed


def test_a_program_of_one_pass_is_refused_where_it_would_be_the_same(tmp_path):
    made = compiled("flux")
    with misused("makes no fewer passes at guidance 1 than at 4; leave it out"):
        compile_subnet(made.subnet, zoo.model("flux"), tmp_path / "b", ExportConfig(unguided=True))
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("whole", [True, False])
def test_parity_without_guidance_is_by_the_backups_of_the_conditional_pass(whole):
    assert parity.verify(compiled("sd", whole).folder, guidance=1.0).passed


@pytest.mark.slow
def test_a_rescale_is_chosen_where_the_search_had_one(tmp_path):
    task = zoo.task("sd", 4, guidance=GuidanceScale(5.5, 0.5))
    subnet = models.random_subnet(task.trace, task.sampler, seed=1, terms=2, channels=1)
    compile_subnet(subnet, task.model, tmp_path / "b")
    made = replace(compiled("sd"), pipe=task.pipe, subnet=subnet, folder=tmp_path / "b")
    with dipgo.load(made.folder) as pipe:
        for rescale in (0.0, 0.5, 1.0):
            asked = {"guidance_scale": 9.0, "guidance_rescale": rescale}
            assert error(made.call(pipe, **asked), made.expected(**asked)) <= 1e-4
        usual = made.expected(guidance_rescale=0.5)
        assert error(made.call(pipe), usual) <= 1e-4
        with misused("guidance_rescale = 1.5; give a number from 0 to 1"):
            made.call(pipe, guidance_rescale=1.5)


def test_images_of_several_scales_share_a_batch():
    made = compiled("sd")
    with dipgo.load(made.folder) as program:
        given = {"prompt": np.array([[b"a red fox"]] * 3, object), "seed": np.array([[1], [1], [2]])}
        rows = read_rows(program, given | {"guidance_scale": np.array([[1.0], [4.0], [9.0]], np.float32)}, Limits())
        images = render(rows)
        alone = [
            render([Row(program, "a red fox", None, seed, 1, scale)])[0] for seed, scale in ((1, 1), (1, 4), (2, 9))
        ]
        assert all(np.array_equal(one, other) for one, other in zip(images, alone, strict=True))
        assert not np.array_equal(images[0], images[1])
        with misused("guidance_scale = nan; give a finite number"):
            read_rows(program, given | {"guidance_scale": np.full((3, 1), np.nan, np.float32)}, Limits())


def test_what_is_compiled_in_is_said():
    plain = models.random_subnet(zoo.trace("sd", guidance=1.0), zoo.sampler("sd", 4), seed=0)
    folder = zoo.bundle(zoo.trace("sd", guidance=1.0), zoo.sampler("sd", 4), plain)
    with misused("guidance_scale = 5, the bundle was compiled for 1 alone, with one pass per step; ask for that"):
        dipgo.load(folder)("a red fox", guidance_scale=5.0)
    with misused("2 guidance scales for 1 images; give one, or one for each"):
        dipgo.load(compiled("sd").folder)("a red fox", guidance_scale=[3.0, 7.0])
    with misused("guidance_rescale = much; give a number from 0 to 1"):
        dipgo.load(compiled("sd").folder)("a red fox", guidance_rescale="much")
    with misused("guidance_scale = inf; give a finite number"):
        dipgo.load(compiled("sd").folder)("a red fox", guidance_scale=float("inf"))


def test_the_command_line_takes_a_scale(tmp_path):
    made, target = compiled("sd"), tmp_path / "a.png"
    asked = ("--prompt", "a red fox", "--guidance", 9, "--seed", 3, "-o", target)
    assert command.dipgo("run", made.folder, *asked).code == 0
    with dipgo.load(made.folder) as pipe:
        image = pipe("a red fox", guidance_scale=9.0, generator=3).images[0]
    assert np.array_equal(np.asarray(image), np.asarray(Image.open(target)))
    assert "parity holds" in command.dipgo("verify", made.folder, "--guidance", 2).out
