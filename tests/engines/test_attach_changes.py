"""Whatever changes what a denoiser computes is seen before a bundle takes its place."""

import shutil
from functools import partial

import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPAGPipeline, StableDiffusionPipeline
from diffusers.hooks import PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast
from diffusers.models.attention_processor import AttnProcessor, IPAdapterAttnProcessor2_0
from torch.nn.utils import parametrize

import dipgo
from tests import zoo
from tests.checks import error, misused
from tests.engines.dropin import compiled


@pytest.fixture(scope="module")
def sd():
    return compiled("sd", False)


def pipeline_of(sd):
    return StableDiffusionPipeline.from_pretrained(zoo.pipeline("sd")).to(torch.float32)


def hook(pipe):
    pipe.unet.mid_block.register_forward_hook(lambda module, args, output: output * 1.1)


def patched_forward(pipe):
    forward = pipe.unet.forward
    pipe.unet.forward = partial(forward)


def other_processor(pipe):
    attention = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    attention.set_processor(IPAdapterAttnProcessor2_0(24, 24))


def other_class(pipe):
    """As token merging does it."""
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
    block.__class__ = type("ToMeBlock", (type(block),), {})


def parametrized(pipe):
    parametrize.register_parametrization(pipe.unet.conv_out, "weight", torch.nn.Identity(), unsafe=True)


def broadcast(pipe):
    config = PyramidAttentionBroadcastConfig(cross_attention_block_skip_range=2, current_timestep_callback=lambda: 500)
    apply_pyramid_attention_broadcast(pipe.unet, config)


def scaled_skip(pipe):
    pipe.unet.mid_block.resnets[0].output_scale_factor = 1.3


def other_module(pipe):
    pipe.unet.mid_block.resnets[0].nonlinearity = torch.nn.GELU()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6), r"'up_blocks.0' has b1 = 1.4, as made None"),
        (lambda pipe: pipe.fuse_qkv_projections(), r"to_(qkv|kv)' was added \(Linear\)"),
        (hook, "'mid_block' has a hook"),
        (patched_forward, "it has a 'forward' of its own"),
        (other_processor, r"attn2.processor.* was added"),
        (other_class, "is a ToMeBlock, not a BasicTransformerBlock"),
        (parametrized, r"'conv_out.parametrizations.* was added"),
        (broadcast, "has a hook"),
        (scaled_skip, "has output_scale_factor = 1.3, as made"),
        (other_module, "is a GELU, not a SiLU"),
    ],
)
def test_a_changed_denoiser_is_refused(sd, change, message):
    pipe = pipeline_of(sd)
    change(pipe)
    with misused(rf"the denoiser was changed after it was loaded: .*{message}") as refused:
        dipgo.attach(pipe, sd.folder)
    assert len(str(refused.value)) < 400


def test_what_makes_no_difference_is_taken(sd):
    """Offloading, another way to the same attention, FreeU that was switched off again, a compiled denoiser."""
    expected = sd.expected()
    pipe = pipeline_of(sd)
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    pipe.disable_freeu()
    pipe.unet.set_attn_processor(AttnProcessor())
    pipe.unet = torch.compile(pipe.unet)
    with dipgo.attach(pipe, sd.folder):
        assert error(sd.call(pipe), expected) <= 1e-4


def test_only_pipelines_of_text_to_image_are_attached_to(sd):
    parts = pipeline_of(sd).components
    for kind, message in (
        (StableDiffusionImg2ImgPipeline, "starts from noise alone; export it with --image"),
        (StableDiffusionPAGPipeline, r"makes 3 passes per step; attach\(\) takes one or two"),
        (
            type("Mine", (StableDiffusionPipeline,), {"__call__": lambda self: None}),
            "Mine draws no noise, or calls neither",
        ),
    ):
        with misused(message):
            dipgo.attach(kind(**parts, requires_safety_checker=False), sd.folder)
    mine = type("Mine", (StableDiffusionPipeline,), {})(**parts, requires_safety_checker=False)
    mine.set_progress_bar_config(disable=True)
    with dipgo.attach(mine, sd.folder):
        assert error(sd.call(mine), sd.expected()) <= 1e-4


def test_a_pipeline_is_saved_and_shared_with_its_own_denoiser(sd, tmp_path):
    pipe = pipeline_of(sd)
    own = pipe.unet
    with dipgo.attach(pipe, sd.folder):
        attached = pipe.unet
        pipe.save_pretrained(tmp_path / "saved")
        assert pipe.unet is attached
        assert StableDiffusionImg2ImgPipeline.from_pipe(pipe).unet is own
    again = StableDiffusionPipeline.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), again.unet.parameters(), strict=True))
    shutil.rmtree(tmp_path / "saved")


def test_a_callback_changes_no_guidance(sd):
    def rescale(pipe, step, timestep, tensors):
        pipe._guidance_rescale = 0.7
        return tensors

    pipe, line = pipeline_of(sd), r"guidance_rescale = 0.7, the call began with 0.0; it cannot change"
    with dipgo.attach(pipe, sd.folder), misused(line):
        sd.call(pipe, callback_on_step_end=rescale)
