"""Train ``digits-dit``: classifier, autoencoder, then a class-conditional latent DiT, all on 4,500 MNIST digits.

    python -m training.train_digits_dit -o dipgo/zoo

Writes ``digits-dit/`` (an ordinary diffusers ``DiTPipeline`` folder) and ``digits-classifier.safetensors``, with
``digits-dit/training.json`` (seed, times, losses, measured quality) and ``digits-dit/samples.png``. A stage is skipped
where its output exists, and ``--work`` keeps checkpoints: a killed training goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.utils import make_image_grid
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.bench.digit_classifier import DigitClassifier, load_digits
from dipgo.base.files import new_file, new_folder
from dipgo.base.progress import Progress
from dipgo.searching.run_folder import Run, open_run
from training.emoji_model import decode, encode
from training.loop import Course, Draw, batch_of, train

GUIDANCE = 4.0
ID2LABEL = {str(digit): str(digit) for digit in range(10)}
NULL_CLASS = 1000  # DiTPipeline hard-codes this label for the unconditional half


def jitter(images: torch.Tensor, generator: torch.Generator, pixels: float, degrees: float) -> torch.Tensor:
    """Shift, rotate and scale each image a little; the background stays black (-1)."""
    count = len(images)
    angle = (torch.rand(count, generator=generator) * 2 - 1) * math.radians(degrees)
    scale = 1 + (torch.rand(count, generator=generator) * 2 - 1) * degrees / 100
    shift = (torch.rand(count, 2, generator=generator) * 2 - 1) * pixels * 2 / images.shape[-1]
    rows = torch.stack([scale * angle.cos(), -scale * angle.sin(), shift[:, 0]], dim=1)
    cols = torch.stack([scale * angle.sin(), scale * angle.cos(), shift[:, 1]], dim=1)
    grid = F.affine_grid(torch.stack([rows, cols], dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def train_classifier(run: Run, seed: int, steps: int) -> tuple[DigitClassifier, dict[str, Any]]:
    images, labels = load_digits("train")
    torch.manual_seed(seed)
    classifier = DigitClassifier()

    def loss_at(iteration: int) -> torch.Tensor:
        index = batch_of(len(labels), 128, iteration, seed)
        logits = classifier(jitter(images[index], Draw(seed, iteration).generator, pixels=2, degrees=12))
        return F.cross_entropy(logits, labels[index], label_smoothing=0.05)

    # Not the average: its normalisations have no statistics.
    _, figures = train(classifier, loss_at, Course("classifier", steps, 128, 3e-3), run)
    held_out, answers = load_digits("held-out")
    with torch.no_grad():
        accuracy = (classifier.eval()(held_out).argmax(1) == answers).float().mean().item()
    return classifier, figures | {"held_out_accuracy": accuracy}


def shortened(values: torch.Tensor) -> torch.Tensor:
    """Round float32 to 12 bits of mantissa: such files compress to two thirds, and no digit's label changes."""
    if values.dtype != torch.float32:
        return values
    return (((values.contiguous().view(torch.int32) + 0x400) >> 11) << 11).view(torch.float32).clone()


def new_vae() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )


def train_vae(run: Run, seed: int, steps: int) -> tuple[AutoencoderKL, dict[str, Any]]:
    images, _ = load_digits("train")
    torch.manual_seed(seed)
    vae = new_vae()

    def loss_at(iteration: int) -> torch.Tensor:
        generator = Draw(seed, iteration).generator
        picture = jitter(images[batch_of(len(images), 64, iteration, seed)], generator, pixels=2, degrees=5)
        posterior = vae.encode(picture).latent_dist
        decoded = vae.decode(posterior.sample(generator=generator)).sample
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        return F.mse_loss(decoded, picture) + 0.1 * F.l1_loss(decoded, picture) + 5e-4 * divergence

    average, figures = train(vae, loss_at, Course("autoencoder", steps, 64, 2e-3), run)
    held_out, _ = load_digits("held-out")
    error = F.mse_loss(decode(average, encode(average, held_out)), held_out).item()
    latents = encode(average, images)
    average.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    spread = {"latent_mean": latents.mean().item(), "latent_std": latents.std().item()}
    return average.eval(), figures | {"held_out_psnr_db": 10 * math.log10(4 / error), **spread}


def new_transformer() -> DiTTransformer2DModel:
    transformer = DiTTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=32,
        in_channels=4,
        out_channels=4,
        num_layers=8,
        sample_size=8,
        patch_size=1,
        num_embeds_ada_norm=NULL_CLASS,
    )
    # adaLN-zero (DiT, section 3.2): each block starts as the identity; diffusers leaves its linears at random.
    for block in transformer.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
        table = block.norm1.emb.class_embedder.embedding_table.weight
        nn.init.normal_(table, std=0.02)
        with torch.no_grad():
            table[10:NULL_CLASS] = 0  # labels that the digits never use
    for layer in (transformer.proj_out_1, transformer.proj_out_2):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return transformer


def train_transformer(
    vae: AutoencoderKL, scheduler: DDIMScheduler, run: Run, seed: int, steps: int
) -> tuple[DiTTransformer2DModel, dict[str, Any]]:
    images, labels = load_digits("train")
    shifts = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    pictures = torch.cat([torch.roll(images, shift, dims=(2, 3)) for shift in shifts])
    latents, labels = encode(vae, pictures) * vae.config.scaling_factor, labels.repeat(len(shifts))
    torch.manual_seed(seed)
    transformer = new_transformer().eval()  # eval: diffusers would drop labels in each block apart

    def loss_at(iteration: int) -> torch.Tensor:
        generator, index = Draw(seed, iteration).generator, batch_of(len(labels), 128, iteration, seed)
        clean = latents[index]
        noise = torch.randn(clean.shape, generator=generator)
        timestep = torch.randint(0, scheduler.config.num_train_timesteps, (len(index),), generator=generator)
        dropped = torch.rand(len(index), generator=generator) < 0.1
        label = labels[index].masked_fill(dropped, NULL_CLASS)
        noisy = scheduler.add_noise(clean, noise, timestep)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = transformer(noisy, timestep=timestep, class_labels=label).sample
        return F.mse_loss(predicted.float(), noise)

    return train(transformer, loss_at, Course("transformer", steps, 128, 1e-3), run)


def judge(pipe: DiTPipeline, classifier: DigitClassifier, count: int) -> tuple[dict[str, float], list]:
    """Generate ``count`` digits at 50 DDIM steps with guidance; return their class accuracy and forty of them."""
    from PIL.Image import Image

    pipe.set_progress_bar_config(disable=True)
    right, samples, total = 0, list[Image](), 0
    for seed, start in enumerate(tqdm(range(0, count, 100), desc="judge")):
        labels = [(start + k) % 10 for k in range(min(100, count - start))]
        generator = torch.Generator().manual_seed(seed)
        images = pipe(labels, guidance_scale=GUIDANCE, generator=generator, num_inference_steps=50, output_type="np")
        pictures = torch.from_numpy(images.images).permute(0, 3, 1, 2) * 2 - 1
        with torch.no_grad():
            right += (classifier(pictures).argmax(1) == torch.tensor(labels)).sum().item()
        total += len(labels)
        if len(samples) < 40:
            samples += pipe.numpy_to_pil(images.images)[: 40 - len(samples)]
    return {"count": total, "steps": 50, "guidance_scale": GUIDANCE, "class_accuracy": right / total}, samples


def save_pipeline(pipe: DiTPipeline, folder: Path) -> None:
    """Save the pipeline with the names of its classes, which ``save_pretrained`` leaves out; DiT-XL/2 has them here."""
    pipe.save_pretrained(folder)
    index_file = folder / "model_index.json"
    index = json.loads(index_file.read_text()) | {"id2label": ID2LABEL}
    with new_file(index_file) as draft:
        draft.write_text(json.dumps(index, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--classifier-steps", type=int, default=1200)
    parser.add_argument("--vae-steps", type=int, default=2500)
    parser.add_argument("--transformer-steps", type=int, default=5000)
    parser.add_argument("--judged", type=int, default=1000, help="how many generated digits to classify")
    parser.add_argument("--work", type=Path, default=Path("build/digits-dit"), help="folder of checkpoints")
    args = parser.parse_args()
    folder = args.output / "digits-dit"
    folder.mkdir(parents=True, exist_ok=True)
    record_file = folder / "training.json"
    record = json.loads(record_file.read_text()) if record_file.exists() else {"seed": args.seed, "stages": {}}

    def finish(stage: str, figures: dict[str, Any]) -> None:
        record["stages"][stage] = figures
        with new_file(record_file) as draft:
            draft.write_text(json.dumps(record, indent=2) + "\n")
        print(stage, {name: value for name, value in figures.items() if name != "losses"}, flush=True)

    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    classifier_file = args.output / "digits-classifier.safetensors"
    with Progress().phases() as report:
        steps = {"classifier": args.classifier_steps, "vae": args.vae_steps, "transformer": args.transformer_steps}
        run = open_run(args.work, {"seed": args.seed, "steps": steps}, resume=True, report=report)
        if not classifier_file.exists():
            classifier, figures = train_classifier(run, args.seed, args.classifier_steps)
            with new_file(classifier_file) as draft:
                save_file({name: shortened(value) for name, value in classifier.state_dict().items()}, draft)
            finish("classifier", figures)
        if not (folder / "vae").exists():
            vae, figures = train_vae(run, args.seed + 1, args.vae_steps)
            with new_folder(folder / "vae") as draft:
                vae.save_pretrained(draft)
            finish("vae", figures)
        vae = AutoencoderKL.from_pretrained(folder / "vae").eval()
        if not (folder / "transformer").exists():
            transformer, figures = train_transformer(vae, scheduler, run, args.seed + 2, args.transformer_steps)
            with new_folder(folder / "transformer") as draft:
                transformer.save_pretrained(draft)
            finish("transformer", figures)
    transformer = DiTTransformer2DModel.from_pretrained(folder / "transformer")
    pipe = DiTPipeline(transformer, vae, scheduler, id2label=ID2LABEL)
    save_pipeline(pipe, folder)

    classifier = DigitClassifier()
    classifier.load_state_dict(load_file(classifier_file))
    figures, samples = judge(pipe, classifier.eval(), args.judged)
    finish("judge", figures)
    make_image_grid(samples, rows=4, cols=10).resize((640, 256)).save(folder / "samples.png")


if __name__ == "__main__":
    main()
