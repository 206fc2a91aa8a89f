"""Train ``digits-dit``: classifier, autoencoder, then a class-conditional latent DiT, all on 4,500 MNIST digits.

    python -m training.train_digits_dit -o dipgo/zoo

Writes ``digits-dit/`` (an ordinary diffusers ``DiTPipeline`` folder) and ``digits-classifier.safetensors``, with
``digits-dit/training.json`` (seed, times, losses, measured quality) and ``digits-dit/samples.png``. Each stage is
skipped when its output exists, so a killed run goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from diffusers.utils import make_image_grid
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from benchmarks.bench.digit_classifier import DigitClassifier, load_digits
from dipgo.base.files import new_file, new_folder

GUIDANCE = 4.0
ID2LABEL = {str(digit): str(digit) for digit in range(10)}
NULL_CLASS = 1000  # DiTPipeline hard-codes this label for the unconditional half


def batches(count: int, size: int, steps: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yield ``steps`` index tensors ``[size]``, sweeping shuffled epochs."""
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < size:
            order = torch.cat([order, torch.randperm(count, generator=generator)])
        yield order[:size]
        order = order[size:]


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


def optimise(
    model: nn.Module,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    index_batches: Iterator[torch.Tensor],
    steps: int,
    rate: float,
    label: str,
    averaged: nn.Module | None = None,
) -> float:
    """Run AdamW with warm-up and cosine decay; return the mean loss of the last tenth of the steps."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-4, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda k: min(1, (k + 1) / 200) * 0.5 * (1 + math.cos(math.pi * k / steps))
    )
    losses: list[float] = []
    progress = tqdm(index_batches, total=steps, desc=label, mininterval=5)
    for step, index in enumerate(progress):
        loss = loss_of(index)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        if averaged is not None:
            decay = min(0.999, (1 + step) / (10 + step))
            with torch.no_grad():
                for mean, value in zip(averaged.parameters(), model.parameters(), strict=True):
                    mean.lerp_(value, 1 - decay)
        if step % 50 == 0:
            progress.set_postfix(loss=f"{sum(losses[-50:]) / len(losses[-50:]):.4f}")
    tail = losses[-max(1, steps // 10) :]
    return sum(tail) / len(tail)


def train_classifier(generator: torch.Generator, steps: int) -> tuple[DigitClassifier, dict[str, float]]:
    images, labels = load_digits("train")
    classifier = DigitClassifier()

    def loss_of(index: torch.Tensor) -> torch.Tensor:
        logits = classifier(jitter(images[index], generator, pixels=2, degrees=12))
        return F.cross_entropy(logits, labels[index], label_smoothing=0.05)

    classifier.train()
    loss = optimise(classifier, loss_of, batches(len(labels), 128, steps, generator), steps, 3e-3, "classifier")
    classifier.eval()
    held_out, answers = load_digits("held-out")
    with torch.no_grad():
        accuracy = (classifier(held_out).argmax(1) == answers).float().mean().item()
    return classifier, {"final_loss": loss, "held_out_accuracy": accuracy}


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


def train_vae(generator: torch.Generator, steps: int) -> tuple[AutoencoderKL, dict[str, float]]:
    images, _ = load_digits("train")
    vae = new_vae()

    def loss_of(index: torch.Tensor) -> torch.Tensor:
        picture = jitter(images[index], generator, pixels=2, degrees=5)
        posterior = vae.encode(picture).latent_dist
        decoded = vae.decode(posterior.sample(generator=generator)).sample
        divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        return F.mse_loss(decoded, picture) + 0.1 * F.l1_loss(decoded, picture) + 5e-4 * divergence

    loss = optimise(vae, loss_of, batches(len(images), 64, steps, generator), steps, 2e-3, "autoencoder")
    vae.eval()
    held_out, _ = load_digits("held-out")
    with torch.no_grad():
        latents = vae.encode(held_out).latent_dist.mean
        error = F.mse_loss(vae.decode(latents).sample.clamp(-1, 1), held_out).item()
        train_latents = vae.encode(images).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / train_latents.std().item(), 5))
    return vae, {
        "final_loss": loss,
        "held_out_psnr_db": 10 * math.log10(4 / error),
        "latent_mean": train_latents.mean().item(),
        "latent_std": train_latents.std().item(),
    }


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
    vae: AutoencoderKL, scheduler: DDIMScheduler, generator: torch.Generator, steps: int
) -> tuple[DiTTransformer2DModel, dict[str, float]]:
    images, labels = load_digits("train")
    shifts = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    with torch.no_grad():
        latents = torch.cat(
            [
                vae.encode(part).latent_dist.mean
                for shift in tqdm(shifts, desc="encode")
                for part in torch.roll(images, shift, dims=(2, 3)).split(250)
            ]
        )
    latents *= vae.config.scaling_factor
    labels = labels.repeat(len(shifts))
    transformer = new_transformer().eval()  # eval: diffusers would drop labels in each block apart
    averaged = deepcopy(transformer)

    def loss_of(index: torch.Tensor) -> torch.Tensor:
        clean = latents[index]
        noise = torch.randn(clean.shape, generator=generator)
        timestep = torch.randint(0, scheduler.config.num_train_timesteps, (len(index),), generator=generator)
        dropped = torch.rand(len(index), generator=generator) < 0.1
        label = labels[index].masked_fill(dropped, NULL_CLASS)
        noisy = scheduler.add_noise(clean, noise, timestep)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = transformer(noisy, timestep=timestep, class_labels=label).sample
        return F.mse_loss(predicted.float(), noise)

    loss = optimise(
        transformer, loss_of, batches(len(labels), 128, steps, generator), steps, 1e-3, "transformer", averaged
    )
    return averaged, {"final_loss": loss}


def judge(pipe: DiTPipeline, classifier: DigitClassifier, count: int) -> tuple[dict[str, float], list]:
    """Generate ``count`` digits at 50 DDIM steps with guidance; return their class accuracy and forty of them."""
    from PIL.Image import Image

    pipe.set_progress_bar_config(disable=True)
    right, shown, seen = 0, list[Image](), 0
    for seed, start in enumerate(tqdm(range(0, count, 100), desc="judge")):
        labels = [(start + k) % 10 for k in range(min(100, count - start))]
        generator = torch.Generator().manual_seed(seed)
        images = pipe(labels, guidance_scale=GUIDANCE, generator=generator, num_inference_steps=50, output_type="np")
        pictures = torch.from_numpy(images.images).permute(0, 3, 1, 2) * 2 - 1
        with torch.no_grad():
            right += (classifier(pictures).argmax(1) == torch.tensor(labels)).sum().item()
        seen += len(labels)
        if len(shown) < 40:
            shown += pipe.numpy_to_pil(images.images)[: 40 - len(shown)]
    return {"count": seen, "steps": 50, "guidance_scale": GUIDANCE, "class_accuracy": right / seen}, shown


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
    args = parser.parse_args()
    folder = args.output / "digits-dit"
    folder.mkdir(parents=True, exist_ok=True)
    record_file = folder / "training.json"
    record = json.loads(record_file.read_text()) if record_file.exists() else {"seed": args.seed, "stages": {}}

    def finished(stage: str, figures: dict[str, float], started: float) -> None:
        record["stages"][stage] = {"seconds": round(time.time() - started, 1), **figures}
        with new_file(record_file) as draft:
            draft.write_text(json.dumps(record, indent=2) + "\n")
        print(stage, record["stages"][stage], flush=True)

    def seeded(stage: int) -> torch.Generator:
        torch.manual_seed(args.seed + stage)
        return torch.Generator().manual_seed(args.seed + stage)

    started = time.time()
    classifier_file = args.output / "digits-classifier.safetensors"
    if not classifier_file.exists():
        classifier, figures = train_classifier(seeded(0), args.classifier_steps)
        with new_file(classifier_file) as draft:
            save_file(classifier.state_dict(), draft)
        finished("classifier", {"steps": args.classifier_steps, **figures}, started)

    started = time.time()
    if not (folder / "vae").exists():
        vae, figures = train_vae(seeded(1), args.vae_steps)
        with new_folder(folder / "vae") as draft:
            vae.save_pretrained(draft)
        finished("vae", {"steps": args.vae_steps, **figures}, started)
    vae = AutoencoderKL.from_pretrained(folder / "vae").eval()

    started = time.time()
    scheduler = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    if not (folder / "transformer").exists():
        transformer, figures = train_transformer(vae, scheduler, seeded(2), args.transformer_steps)
        with new_folder(folder / "transformer") as draft:
            transformer.save_pretrained(draft)
        finished("transformer", {"steps": args.transformer_steps, **figures}, started)
    transformer = DiTTransformer2DModel.from_pretrained(folder / "transformer")

    pipe = DiTPipeline(transformer, vae, scheduler, id2label=ID2LABEL)
    save_pipeline(pipe, folder)

    started = time.time()
    classifier = DigitClassifier()
    classifier.load_state_dict(load_file(classifier_file))
    figures, shown = judge(pipe, classifier.eval(), args.judged)
    finished("judge", figures, started)
    make_image_grid(shown, rows=4, cols=10).resize((640, 256)).save(folder / "samples.png")


if __name__ == "__main__":
    main()
