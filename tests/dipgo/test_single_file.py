"""Checkpoints in one file: the pipeline that comes of one is the pipeline that was put into it."""

import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from dipgo.base.errors import UsageError
from dipgo.model.models import find_model
from dipgo.model.single_file import ENCODERS, import_checkpoint
from tests import command, zoo

LAYERS = 1  # of a level of the tiny UNet, for which see tests/models.py
LEVELS = 2  # of its VAE
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
VAE = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "downsamplers.0.conv": "downsample.conv",
    "upsamplers.0.conv": "upsample.conv",
    "conv_norm_out": "norm_out",
    "conv_shortcut": "nin_shortcut",
}


def replaced(name, table):
    for mine, theirs in table.items():
        name = re.sub(rf"(^|\.){re.escape(mine)}(\.|$)", rf"\g<1>{theirs}\g<2>", name)
    return name


def unet_name(name, attended):
    """Return the name that a tensor of the UNet has in a checkpoint; ``attended`` are the up blocks with attention."""
    if match := re.match(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", name):
        way, level, part, number, rest = match.groups()
        level, number = int(level), int(number)
        if way == "down":
            place = 1 + level * (LAYERS + 1) + (number if part != "downsamplers" else LAYERS)
            slot = {"resnets": "0", "attentions": "1", "downsamplers": "0"}[part]
        else:
            place = level * (LAYERS + 1) + (number if part != "upsamplers" else LAYERS)
            slot = {"resnets": "0", "attentions": "1", "upsamplers": "2" if level in attended else "1"}[part]
        rest = replaced(rest, RESNET) if part == "resnets" else rest
        rest = rest.replace("conv.", "op.") if part == "downsamplers" else rest
        return f"{'input' if way == 'down' else 'output'}_blocks.{place}.{slot}.{rest}"
    name = replaced(name, UNET)
    return replaced(name, RESNET) if name.startswith(("middle_block.0", "middle_block.2")) else name


def vae_name(name):
    name = re.sub(r"down_blocks\.(\d)\.resnets\.", r"down.\1.block.", name)
    name = re.sub(r"up_blocks\.(\d)\.", lambda match: f"up.{LEVELS - 1 - int(match[1])}.", name)
    name = re.sub(r"down_blocks\.", "down.", name).replace(".resnets.", ".block.") if "mid" not in name else name
    return replaced(name, VAE)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The tiny Stable Diffusion's weights as its first authors' code names them, in half precision."""
    pipe = zoo.model("sd").pipeline()
    unet = pipe.unet.state_dict()
    attended = {int(name.split(".")[1]) for name in unet if name.startswith("up_blocks.") and ".attentions." in name}
    tensors = {f"model.diffusion_model.{unet_name(name, attended)}": value for name, value in unet.items()}
    for name, value in pipe.vae.state_dict().items():
        projection = "mid_block.attentions" in name and value.ndim == 2
        tensors[f"first_stage_model.{vae_name(name)}"] = value[..., None, None] if projection else value
    for name, value in pipe.text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    file = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    save_file({name: value.half().contiguous() for name, value in tensors.items()}, file)
    return file


def test_the_pipeline_is_the_one_in_the_file(checkpoint, tmp_path):
    folder = tmp_path / "model"
    result = command.dipgo("import-checkpoint", checkpoint, "--like", zoo.pipeline("sd"), "-o", folder)
    assert (result.code, result.out) == (0, f"model: {folder}, like {zoo.pipeline('sd')}\n"), result.err
    original, model = zoo.model("sd").pipeline(), find_model(str(folder))
    assert {stored.dtype.value for stored in model_tensors(model)} == {"float16"}
    pipe = model.pipeline()
    for component in ("unet", "vae", "text_encoder"):
        theirs = getattr(original, component).state_dict()
        for name, value in getattr(pipe, component).state_dict().items():
            assert torch.equal(value, theirs[name].half().float()), name
    images = [
        each("a fox", num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images
        for each in (original, pipe)
    ]
    assert np.abs(images[0] - images[1]).max() < 1e-2


def model_tensors(model):
    from dipgo.base.safetensors_index import stored_tensors

    return stored_tensors(model.weights_files).values()


def test_what_is_no_such_checkpoint_is_refused(checkpoint, tmp_path):
    key = "model.diffusion_model.input_blocks.0.0.weight"
    attention = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    files = {
        "lora": {"lora_unet.down.weight": torch.zeros(1)},
        "inpainting": {key: torch.zeros(1, 9, 1, 1)},
        "other": {key: torch.zeros(1, 4, 1, 1), attention: torch.zeros(1, 24)},
        "empty": {key: torch.zeros(1, 4, 1, 1), attention: torch.zeros(1, 768)},
    }
    for name, tensors in files.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    (tmp_path / "old.ckpt").write_bytes(b"pickled")
    for name, message in (
        ("lora.safetensors", "holds no checkpoint of Stable Diffusion 1, 2 or SDXL"),
        ("inpainting.safetensors", r"its UNet takes 9 channels \(inpainting"),
        ("other.safetensors", "its UNet reads prompts of width 24: none of sd-1.5, sd-2.1, sdxl"),
        ("old.ckpt", "not a .safetensors file, and nothing else is read"),
    ):
        with pytest.raises(UsageError, match=message):
            import_checkpoint(tmp_path / name, tmp_path / "out")
    for arguments, message in (
        (["--like", zoo.pipeline("sd")], f"not a checkpoint like {zoo.pipeline('sd')}"),
        (
            ["--tokenizer", f"{zoo.pipeline('sd')}/tokenizer"],
            r"the tokenizer is not to be had from .*54 tokens, not 49408",
        ),
    ):
        result = command.dipgo("import-checkpoint", tmp_path / "empty.safetensors", *arguments, "-o", tmp_path / "out")
        assert result.code in (1, 2)
        assert re.search(message, result.err)
        assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match=r"the tokenizer is not to be had from .*; give --tokenizer FOLDER"):
        import_checkpoint(tmp_path / "empty.safetensors", tmp_path / "out", tokenizer=str(tmp_path))
    with pytest.raises(Exception, match="a file; make a pipeline of a checkpoint first: dipgo import-checkpoint"):
        find_model(str(checkpoint))


@pytest.mark.parametrize(
    ("name", "encoder", "millions"),
    [
        ("sd-1.5", "text_encoder", 123.06),
        ("sd-2.1", "text_encoder", 340.39),
        ("sdxl", "text_encoder", 123.06),
        ("sdxl", "text_encoder_2", 694.66),
    ],
)
def test_text_encoders_have_their_true_size(name, encoder, millions):
    kind = CLIPTextModelWithProjection if encoder == "text_encoder_2" else CLIPTextModel
    with torch.device("meta"):
        model = kind(kind.config_class(**ENCODERS[name][encoder]))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.01)
