"""What calls of diffusers' pipelines choose beside a prompt: the same images, and never a picture of no numbers."""

import shutil
import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import dipgo
from dipgo.base.errors import DipgoError, DipgoWarning, UsageError
from dipgo.base.files import sha256_of
from export.bundle import open_bundle
from export.records.bundle import FileRecord
from tests import command, zoo
from tests.checks import error
from tests.engines.dropin import STEPS, compiled
from tests.models import random_subnet


def opened(compiled_pipeline):
    pipe = dipgo.load(compiled_pipeline.folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def sd():
    made = compiled("sd")
    encoder = made.pipe.text_encoder
    if not hasattr(encoder, "text_model"):  # where diffusers looks for it, and older transformers have it
        object.__setattr__(encoder, "text_model", encoder)
    return made


@pytest.fixture(scope="module")
def sdxl():
    return compiled("sdxl")


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt_2": ["a wolf", "two cats", "a town"]},
        {
            "prompt_2": ["a wolf", "two cats", "a town"],
            "negative_prompt": ["blue"] * 3,
            "negative_prompt_2": ["green"] * 3,
        },
        {"negative_prompt_2": ["green"] * 3},
        {"negative_prompt": ["blue"] * 3, "negative_prompt_2": ["green"] * 3},
        {"clip_skip": 1, "negative_prompt": ["blue"] * 3},
        {"original_size": (8, 24), "crops_coords_top_left": (2, 3), "target_size": (32, 12)},
        {"negative_original_size": (8, 24), "negative_target_size": (32, 12)},
        {"negative_original_size": (8, 24), "negative_crops_coords_top_left": (1, 2), "negative_target_size": (9, 9)},
        {"negative_original_size": (8, 24)},
        {"num_images_per_prompt": 2, "negative_original_size": (8, 24), "negative_target_size": (32, 12)},
    ],
    ids="+".join,
)
def test_sdxl_takes_what_its_pipeline_takes(sdxl, changes):
    count = {"num_images_per_prompt": changes.get("num_images_per_prompt", 1)}
    images, plain = sdxl.expected(**changes), sdxl.expected(**count)
    with opened(sdxl) as pipe:
        assert error(sdxl.call(pipe, **changes), images) <= 1e-4
    ignored = set(changes) in ({"negative_prompt_2"}, {"negative_original_size"})  # by diffusers too
    assert (error(images, plain) < 1e-6) == ignored


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_clip_skip_is_the_pipeline_s(sd, skip):
    with opened(sd) as pipe:
        images = sd.call(pipe, clip_skip=skip, negative_prompt=["blue"] * 3)
        assert error(images, sd.expected(clip_skip=skip, negative_prompt=["blue"] * 3)) <= 1e-4
        assert (error(images, sd.call(pipe, negative_prompt="blue")) > 1e-3) == bool(skip)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": None, "prompt_2": "a"}, "prompt_2 is given without prompt"),
        ({"prompt_2": ["a", "b"]}, "2 of prompt_2 for 3 of prompt; give as many"),
        ({"original_size": 8}, "original_size = 8; give two numbers"),
        ({"clip_skip": 2}, "clip_skip = 2, the bundle was compiled for 0 to 1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_makes_no_sense_is_refused(sdxl, changes, message):
    with opened(sdxl) as pipe, pytest.raises(UsageError, match=message):
        sdxl.call(pipe, **changes)


@pytest.mark.parametrize("batch", ["2", "2:4"])
@pytest.mark.parametrize("rows", [1, 2, 3, 5])
def test_any_number_of_embeddings_and_negative_prompts_goes_into_any_batch(sd, batch, rows):
    traced = zoo.trace("sd")
    subnet = random_subnet(traced, zoo.sampler("sd", STEPS, None), seed=0)
    folder = zoo.bundle(traced, zoo.sampler("sd", STEPS, None), subnet, batch=batch)
    prompts = ["a red fox", "two dogs", "a harbour", "b", "c"][:rows]
    conditional, unconditional = sd.pipe.encode_prompt(prompts, "cpu", 1, True, negative_prompt=["blue"] * rows)
    with dipgo.load(folder) as pipe:
        pipe.set_progress_bar_config(disable=True)
        embedded = pipe(prompt_embeds=conditional, negative_prompt_embeds=unconditional, generator=3, output_type="np")
        written = pipe(prompts, negative_prompt=["blue"] * rows, generator=3, output_type="np")
        assert len(embedded.images) == rows
        assert error(embedded.images, written.images) <= 1e-4


def test_what_a_callback_sets_is_checked_like_the_argument(sd):
    """diffusers' own callbacks set guidance on the way, which a bundle holds in its graphs."""

    def sets(name, value):
        def callback(pipe, step, timestep, tensors):
            setattr(pipe, name, value)
            return tensors

        return callback

    with opened(sd) as pipe:
        for name, value in (
            ("_guidance_scale", 3.0),
            ("_guidance_rescale", 0.7),
            ("_cross_attention_kwargs", {"a": 1}),
        ):
            with pytest.raises(UsageError, match=rf"{name[1:]} = .*(it cannot change|the bundle was compiled for)"):
                sd.call(pipe, callback_on_step_end=sets(name, value))
        images = sd.call(pipe, callback_on_step_end=sets("_guidance_scale", 4.0))
        assert error(images, sd.call(pipe)) <= 1e-6
        with pytest.raises(UsageError, match="vae is compiled into the bundle and cannot be set"):
            pipe.vae = None


def scaled(folder, copy, part, names, factor):
    """Copy a bundle with the weights of a part that have ``names`` in theirs multiplied, and seal it again."""
    shutil.copytree(folder, copy)
    record = open_bundle(copy).record
    files = dict(record.files)
    for file in sorted((copy / part).glob("*.safetensors")):
        factors = {name: np.float32(factor if names in name else 1) for name in load_file(file)}
        tensors = {name: value * factors[name] for name, value in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
        files[f"{part}/{file.name}"] = FileRecord(bytes=file.stat().st_size, sha256=sha256_of(file))
    (copy / "bundle.json").write_text(record.model_copy(update={"files": files}).sealed().text())
    return copy


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("part", "factor", "message"),
    [
        ("unet", ("", 1e30), r"ε of step 1 of \d+ is not finite \(\d+ of 256 values are infinite or NaN in float32\)"),
        ("text_encoder", ("final_layer_norm", 3e38), "'encoder_hidden_states' of the prompt is not finite"),
        ("vae", ("", 1e30), "the image that the VAE decodes is not finite"),
    ],
)
def test_values_that_stop_being_finite_are_said_with_the_step(sd, tmp_path, part, factor, message):
    folder = scaled(sd.folder, tmp_path / "bundle", part, *factor)
    with opened(sd.__class__(sd.pipe, sd.component, sd.subnet, folder, sd.arguments)) as pipe:
        with pytest.raises(DipgoError, match=message):
            sd.call(pipe)
        with pytest.raises(DipgoError, match=message):
            pipe.generate(["a red fox"], 3)
    result = command.dipgo("run", str(folder), "--prompt", "a fox", "-o", str(tmp_path / "x.png"))
    assert result.code == 1
    assert not (tmp_path / "x.png").exists()
    if part == "unet":
        with dipgo.load(folder) as program:
            conditions = program.conditions(["a fox"])
            with pytest.raises(DipgoError, match=message):
                program.denoise(program.noise(1, 0), conditions)


def test_a_prompt_that_is_cut_is_said_once(sd):
    prompt = "fox " * 20 + "and a hen at the end of the lane in the rain"
    with opened(sd) as pipe:
        with pytest.warns(DipgoWarning, match=r"the prompt is cut at 77 tokens; not read: '.*in the rain'"):
            images = sd.call(pipe, prompt=[prompt] * 3)
        assert error(images, sd.expected(prompt=[prompt] * 3)) <= 1e-4
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sd.call(pipe)
