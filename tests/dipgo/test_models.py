"""The architectures that ship without weights, random weights, and models that are refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from dipgo.model.families import family_of
from dipgo.model.models import architectures, find_model
from dipgo.searching.task import make_task
from export.component_weights import own_weights
from tests import zoo
from tests.checks import misused, refused

# DiP-GO's GMACs, tables 1 to 4 and 8, and millions of parameters. All GMACs but DiT's leave out the products inside
# attention; PixArt's count guidance.
PUBLISHED = {
    "sd-1.5": (338.83, 859.5),
    "sd-2.1": (760.8, 865.9),
    "sdxl": (11950 / 4, 2567.5),
    "dit-xl-2": (118.64, 749.8),
    "pixart-alpha": (85650 / 20 / 2, 611.3),
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_architectures_have_their_true_size(name):
    model, (gmacs, millions) = find_model(name), PUBLISHED[name]
    denoiser = model.empty_denoiser().to("meta")
    assert sum(p.numel() for p in denoiser.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    conditions = {key: value.to("meta") for key, value in model.family.example(model.config, 1).items()}
    latent = torch.empty(model.latent_shape(1), device="meta")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.family.call(denoiser, latent, torch.ones(1, device="meta"), conditions)
    products = {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}
    attention = sum(flops for op, flops in products.items() if "bmm" in op or "attention" in op)
    counted = sum(products.values()) - (0 if name == "dit-xl-2" else attention)
    assert counted / 2e9 == pytest.approx(gmacs, rel=1e-3)


def test_architectures_are_found_but_not_loaded():
    assert architectures() == sorted([*PUBLISHED, "flux.1-dev"])  # whose MACs nobody has published
    for name in architectures():
        model = find_model(name)
        assert model.identity().weights_sha256 is None
        with misused(r"architecture without weights.*--random-weights"):
            model.pipeline()


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A Stable Diffusion folder as the shipped architectures are: configurations alone."""
    folder = tmp_path_factory.mktemp("models") / "bare"
    shutil.copytree(zoo.pipeline("sd"), folder)
    for weights in folder.glob("*/*.safetensors"):
        weights.unlink()
    shutil.rmtree(folder / "text_encoder")
    shutil.rmtree(folder / "tokenizer")
    return str(folder)


def test_random_weights_are_explicit_and_always_the_same(bare):
    with refused("no safetensors weights"):
        find_model(bare)
    state = torch.random.get_rng_state()
    first, second = (find_model(bare, random_weights=True).pipeline() for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state)
    for component in ("unet", "vae"):
        mine, other = (getattr(pipe, component).state_dict() for pipe in (first, second))
        assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert first.text_encoder is None


def test_random_weights_leave_a_checkpoint_unread(tiny_dit):
    real, drawn = find_model(tiny_dit), find_model(tiny_dit, random_weights=True)
    assert real.identity().weights_sha256
    assert drawn.identity().weights_sha256 is None
    mine, other = real.pipeline(), drawn.pipeline()
    assert not torch.equal(mine.transformer.proj_out_2.weight, other.transformer.proj_out_2.weight)
    assert torch.equal(mine.vae.decoder.conv_in.weight, other.vae.decoder.conv_in.weight)


def test_prompts_have_stand_ins_where_no_text_encoder_is(bare):
    task = make_task(find_model(bare, random_weights=True), 3, guidance_scale=4.0)
    null, given = task.model.family.conditions(task.pipe, ["a cat", "a dog"])
    _, again = task.model.family.conditions(task.pipe, ["a dog"])
    embeddings = given["encoder_hidden_states"]
    assert embeddings.shape == (2, 77, 24)
    assert torch.equal(embeddings[1], again["encoder_hidden_states"][0])
    assert not torch.equal(embeddings[0], embeddings[1])
    assert torch.equal(null["encoder_hidden_states"][0], null["encoder_hidden_states"][1])
    batch = task.sampling.draw(2, 0)
    assert torch.isfinite(task.trajectory.full(batch.noise, batch.conditions)[-1]).all()


def folder_of(tmp_path, pipeline, component, denoiser, **config):
    (tmp_path / component).mkdir()
    index = {"_class_name": pipeline, component: ["diffusers", denoiser]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / component / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


@pytest.mark.parametrize(
    ("pipeline", "component", "denoiser", "config", "message"),
    [
        ("StableDiffusionPipeline", "unet", "UNet2DConditionModel", {"in_channels": 9}, "takes 9 channels"),
        ("StableDiffusionInpaintPipeline", "unet", "UNet2DConditionModel", {}, "no such scheduler configuration"),
        ("StableDiffusionXLImg2ImgPipeline", "unet", "UNet2DConditionModel", {}, "starts from pictures"),
        ("StableDiffusionImageVariationPipeline", "unet", "UNet2DConditionModel", {}, "no such scheduler config"),
        ("MyPipeline", "unet", "UNet2DConditionModel", {}, "has no MyPipeline"),
        ("MyPipeline", "unet", "UNet2DModel", {}, "has no MyPipeline"),
        ("DDPMPipeline", "unet", "UNet2DModel", {"quantization_config": {"load_in_8bit": True}}, "is quantised"),
        ("StableDiffusionPipeline", "unet", "UNet2DConditionModel", {"time_cond_proj_dim": 256}, "LCM"),
        (
            "StableDiffusionPipeline",
            "unet",
            "UNet2DConditionModel",
            {"addition_embed_type": "image"},
            "'image' embeddings",
        ),
        ("DDPMPipeline", "unet", "UNet2DModel", {}, "scheduler_config.json: no such scheduler configuration"),
        ("DDPMPipeline", "unet", "UNet9DModel", {}, "a UNet9DModel, which the installed diffusers does not have"),
        ("WuerstchenPriorPipeline", "prior", "PriorTransformer", {}, "no transformer or unet"),
    ],
)
def test_what_cannot_be_called_is_refused(tmp_path, pipeline, component, denoiser, config, message):
    usual = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 8}
    if "encoder_hidden_states" in message:
        del usual["cross_attention_dim"]
    with refused(message):
        find_model(folder_of(tmp_path, pipeline, component, denoiser, **usual | config), random_weights=True)


def test_a_scheduler_whose_package_is_missing_hinders_no_other(tmp_path):
    """As DPMSolverSDEScheduler, which needs torchsde: diffusers loads no folder of it."""
    folder = tmp_path / "sd"
    shutil.copytree(zoo.pipeline("sd"), folder)
    for file in ("model_index.json", "scheduler/scheduler_config.json"):
        (folder / file).write_text((folder / file).read_text().replace("PNDMScheduler", "DPMSolverSDEScheduler"))
    task = make_task(find_model(str(folder)), 4, "ddim")
    assert task.pipe("a red fox", num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 3)
    with misused("torchsde"):
        make_task(find_model(str(folder)), 4)
    shutil.rmtree(folder / "scheduler")
    with refused("no scheduler/scheduler_config.json in it; download or save the pipeline again"):
        find_model(str(folder))


def test_a_damaged_folder_is_one_line(tmp_path, bare):
    for file, content, message in (
        ("model_index.json", "[]", "model_index.json: not a readable model_index.json"),
        ("model_index.json", '{"unet": 5}', "has no transformer or unet of diffusers"),
        ("model_index.json", '{"unet": ["diffusers"]}', "has no transformer or unet of diffusers"),
        ("unet/config.json", "[]", "config.json: not a readable model configuration"),
        ("unet/config.json", '{"sample_size": "a", "in_channels": "b"}', "not a configuration of UNet2DCondition"),
    ):
        folder = shutil.copytree(bare, tmp_path / "model")
        (folder / file).write_text(content)
        with refused(message):
            find_model(str(folder), random_weights=True)
        shutil.rmtree(folder)


def test_a_pipeline_without_a_denoiser_has_no_family(bare):
    pipe = find_model(bare, random_weights=True).pipeline()
    assert family_of(pipe).denoiser_class == "UNet2DConditionModel"
    pipe.unet = None
    with misused("holds no denoiser"):
        family_of(pipe)


def test_fingerprint_is_of_the_model_not_of_the_version_that_saved_it(tmp_path):
    """A folder saved by diffusers itself lists every option; the shipped architecture only what matters."""
    from diffusers import UNet2DConditionModel

    shipped = find_model("sd-1.5")
    with torch.device("meta"):
        config = UNet2DConditionModel.from_config(shipped.config).config
    full = replace(shipped, config=json.loads(json.dumps(dict(config))))
    assert len(full.config) > len(shipped.config)
    assert full.identity() == shipped.identity()
    other = replace(full, config={**full.config, "layers_per_block": 3})
    assert other.identity().config_sha256 != shipped.identity().config_sha256


def test_add_ons_are_refused_by_name(tiny_dit, tmp_path):
    """What changes a denoiser from outside would be missing from a trace."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_dit, folder)
    index_file, config_file = folder / "model_index.json", folder / "transformer" / "config.json"
    index, config = json.loads(index_file.read_text()), json.loads(config_file.read_text())
    index_file.write_text(json.dumps(index | {"controlnet": ["diffusers", "ControlNetModel"]}))
    with misused("has a ControlNet, which is not supported"):
        find_model(str(folder))
    index_file.write_text(json.dumps(index | {"controlnet": [None, None]}))
    find_model(str(folder))
    config_file.write_text(json.dumps(config | {"encoder_hid_dim_type": "ip_image_proj", "encoder_hid_dim": 24}))
    with misused("has an IP-Adapter"):
        find_model(str(folder))
    config_file.write_text(json.dumps(config))
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file(tensors | {"transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(1, 1)}, weights)
    with misused(r"LoRA weights that are not fused .*; call fuse_lora\(\)"):
        find_model(str(folder))
    save_file(tensors, weights)
    save_file({"lora": torch.zeros(1)}, folder / "pytorch_lora_weights.safetensors")
    with misused(r"pytorch_lora_weights\.safetensors: a LoRA that is not fused"):
        find_model(str(folder))


def test_variants_alone_are_loaded_and_pickles_are_not(tmp_path):
    """Of all components or of one; weights that only ``torch.load`` could read are refused."""
    plain = zoo.model("sd").pipeline()
    for name, changed in (("all", ("unet", "vae", "text_encoder")), ("one", ("unet",))):
        folder = shutil.copytree(zoo.pipeline("sd"), tmp_path / name)
        for component in changed:
            for file in (folder / component).glob("*.safetensors"):
                file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
        loaded = find_model(str(folder)).pipeline()
        for component in ("unet", "vae", "text_encoder"):
            first, second = (getattr(pipe, component).state_dict() for pipe in (plain, loaded))
            assert all(torch.equal(first[key], second[key]) for key in first)
    folder = shutil.copytree(zoo.pipeline("sd"), tmp_path / "pickled")
    (file,) = (folder / "vae").glob("*.safetensors")
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    with refused(r"vae.*\.bin: pickled weights, which are not read"):
        find_model(str(folder)).pipeline()


def test_where_the_denoiser_is_a_variant_the_others_of_it_come_first(tmp_path):
    """As diffusers reads them, so that an exported program has the text encoder that the pipeline has."""
    folder = shutil.copytree(zoo.pipeline("sd"), tmp_path / "sd")
    for component in ("unet", "text_encoder"):
        (file,) = (folder / component).glob("*.safetensors")
        variant = file.with_name(file.name.replace(".safetensors", ".fp16.safetensors"))
        save_file({name: tensor * 0 for name, tensor in load_file(file).items()}, variant, {"format": "pt"})
        if component == "unet":
            file.unlink()
    model = find_model(str(folder))
    assert model.variant == "fp16"
    assert not any(value.any() for value in model.pipeline().text_encoder.parameters())
    stored = own_weights(model, "text_encoder").tensors
    assert {one.file.name for one in stored.values()} == {"model.fp16.safetensors"}
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").rename(
        folder / "unet" / "diffusion_pytorch_model.safetensors"
    )
    stored = own_weights(find_model(str(folder)), "text_encoder").tensors
    assert {one.file.name for one in stored.values()} == {"model.safetensors"}


def test_half_precision_files_load_in_float32(tmp_path):
    """All components alike: transformers takes a file's own dtype, diffusers float32."""
    pipe = StableDiffusionPipeline.from_pretrained(zoo.pipeline("sd"), dtype=torch.float16)
    pipe.save_pretrained(tmp_path / "half")
    loaded = find_model(str(tmp_path / "half")).pipeline()
    dtypes = {part.dtype for part in loaded.components.values() if isinstance(part, torch.nn.Module)}
    assert dtypes == {torch.float32}
