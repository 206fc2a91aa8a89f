"""Train ``emoji-sd``: autoencoder, tokenizer, then text encoder and UNet together, on the emoji of Noto.

    python -m training.train_emoji_sd -o build/emoji --device cuda
    python -m training.train_emoji_sd -o build/emoji --small --threads 2

Writes ``emoji-sd/`` (an ordinary diffusers ``StableDiffusionPipeline`` folder in the format of Stable Diffusion 1.5, in
half precision) with ``training.json``, ``held-out.json``, ``prompts.txt`` and ``samples.png``; then
``training.emoji_quality`` measures it and writes its card. Beside it ``work/`` keeps checkpoints, so that the same
command goes on after a kill, and ``progress/`` grids of samples along the way. The pictures are fetched through npm,
see :mod:`training.emoji`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import CLIPTokenizer

from dipgo.base.errors import DipgoError
from dipgo.base.files import Kind, files_below, new_file, new_folder
from dipgo.base.progress import Progress
from dipgo.searching.run_folder import Run, open_run
from training.emoji import Emoji, caption, captions, fetch, held_out, read_emoji, to_unit
from training.emoji_model import (
    FULL,
    NOISE,
    SMALL,
    TRIAL,
    Denoising,
    Reconstruction,
    Size,
    TextToImage,
    assemble,
    decode,
    encode,
    new_text_encoder,
    new_unet,
    new_vae,
    reconstruction_loss,
    sample,
    token_ids,
)
from training.emoji_tokenizer import learn_tokenizer, save_tokenizer
from training.grids import save_grid
from training.loop import Course, Draw, batch_of, on_graph, record_stage, train

DROPPED = 0.1  # captions left out, for guidance
SNR_CAP = 5.0  # Hang et al. 2023: no timestep weighs more than its signal allows


@dataclass(frozen=True)
class Workshop:
    """What all stages need: where to write, on what, and the data."""

    output: Path
    size: Size
    seed: int
    device: str
    emoji: list[Emoji]
    pictures: torch.Tensor
    held_out: np.ndarray
    run: Run

    @property
    def work(self) -> Path:
        return self.output / "work"

    @property
    def trained(self) -> np.ndarray:
        return np.setdiff1d(np.arange(len(self.emoji)), self.held_out)

    def finished(self, stage: str, figures: dict[str, Any]) -> None:
        begun = {"seed": self.seed, "size": asdict(self.size)}
        record_stage(self.work / "training.json", begun, self.device, stage, figures)


def train_vae(shop: Workshop) -> AutoencoderKL:
    """Train the autoencoder on mirrored and plain pictures, or load it where it is finished."""
    folder = shop.work / "vae"
    if not folder.exists():
        torch.manual_seed(shop.seed)
        vae = new_vae(shop.size).to(shop.device, memory_format=torch.channels_last)
        course = Course("vae", *shop.size.vae_course)
        pictures = shop.pictures[shop.trained].to(shop.device)
        unseen = to_unit(shop.pictures[shop.held_out]).to(shop.device)
        example = to_unit(pictures[: course.batch])
        reconstruct = on_graph(Reconstruction(vae, halved=True), example, encode(vae, example))

        def loss_at(iteration: int) -> torch.Tensor:
            draw = Draw(shop.seed, iteration, shop.device)
            picture = to_unit(pictures[batch_of(len(pictures), course.batch, iteration, shop.seed)])
            mirror = torch.from_numpy(draw.numpy.random(len(picture)) < 0.5).to(shop.device)
            picture = torch.where(mirror[:, None, None, None], picture.flip(3), picture)
            decoded, mean, log = reconstruct(picture, draw.noise(len(picture), 4, 16, 16))
            return reconstruction_loss(picture, decoded, mean, log)

        def watch(updates: int, average: AutoencoderKL) -> None:
            rows = [unseen[:10], decode(average, encode(average, unseen[:10]))]
            save_grid(torch.cat(rows), shop.output / "progress" / f"vae-{updates:06}.png", columns=10)

        vae, figures = train(vae, loss_at, course, shop.run, watch)
        latents = encode(vae, to_unit(pictures))
        vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
        error = F.mse_loss(decode(vae, encode(vae, unseen)), unseen).item()
        with new_folder(folder) as draft:
            vae.half().save_pretrained(draft)
        spread = {"latent_mean": latents.mean().item(), "latent_std": latents.std().item()}
        shop.finished("vae", figures | {"held_out_psnr_db": 10 * math.log10(4 / error), **spread})
    return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).to(shop.device).eval()


def make_tokenizer(shop: Workshop) -> CLIPTokenizer:
    folder = shop.work / "tokenizer"
    if not folder.exists():
        known = [shop.emoji[index] for index in shop.trained]
        with new_folder(folder) as draft:
            save_tokenizer(learn_tokenizer(captions(known), shop.size.words), draft)
    return CLIPTokenizer.from_pretrained(folder)


def make_latents(shop: Workshop, vae: AutoencoderKL) -> torch.Tensor:
    """Return the scaled latents of the training pictures and of their mirrored ones ``[2, n, 4, 16, 16]``."""
    path = shop.work / "latents.safetensors"
    if not path.exists():
        images = to_unit(shop.pictures[shop.trained]).to(shop.device)
        latents = torch.stack([encode(vae, images), encode(vae, images.flip(3))]) * vae.config.scaling_factor
        with new_file(path) as draft:
            save_file({"latents": latents.cpu().contiguous()}, draft)
    return load_file(path)["latents"].to(shop.device)


def train_unet(shop: Workshop, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> TextToImage:
    """Train text encoder and UNet together; return their moving averages."""
    torch.manual_seed(shop.seed)
    text = new_text_encoder(shop.size.text_width, shop.size.text_layers, tokenizer)
    model = TextToImage(text, new_unet(shop.size)).to(shop.device)
    course = Course("unet", *shop.size.unet_course)
    latents, known = make_latents(shop, vae), [shop.emoji[index] for index in shop.trained]
    mirrors = np.array([one.mirrors for one in known])
    texts = ["", *dict.fromkeys(captions(known))]
    rows, ids = {text: row for row, text in enumerate(texts)}, token_ids(tokenizer, texts).to(shop.device)
    signals = DDIMScheduler(**NOISE).alphas_cumprod.to(shop.device)
    some = torch.arange(course.batch, device=shop.device)
    # On CPUs half precision gains nothing here.
    denoise = on_graph(
        Denoising(model, halved=shop.device == "cuda"), torch.zeros_like(latents[0, some]), some, ids[some]
    )

    def loss_at(iteration: int) -> torch.Tensor:
        draw = Draw(shop.seed, iteration, shop.device)
        chosen = batch_of(len(known), course.batch, iteration, shop.seed)
        mirrored = mirrors[chosen] & (draw.numpy.random(len(chosen)) < 0.5) & shop.size.mirrored
        prompts = [caption(known[index], draw.numpy) for index in chosen]
        prompts = ["" if draw.numpy.random() < DROPPED else text for text in prompts]
        # Timesteps are spread over the batch: one in each of its equal parts.
        spread = (np.arange(len(chosen)) + draw.numpy.random(len(chosen))) / len(chosen)
        timestep = torch.from_numpy((spread * len(signals)).astype(np.int64)).to(shop.device)
        clean = latents[torch.from_numpy(mirrored.astype(np.int64)), torch.from_numpy(chosen)]
        noise, signal = draw.noise(*clean.shape), signals[timestep][:, None, None, None]
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        predicted = denoise(noisy, timestep, ids[[rows[text] for text in prompts]])
        ratio = signal / (1 - signal)
        return (ratio.clamp(max=SNR_CAP) / ratio * (predicted - noise).square()).mean()

    shown = [*shop.trained[:: max(1, len(shop.trained) // 15)][:15], *shop.held_out[:5]]
    names = [shop.emoji[index].name for index in shown]

    def watch(updates: int, average: TextToImage) -> None:
        images = sample(assemble(average, vae, tokenizer), names, shop.size.steps, guidance=4.0)
        save_grid(images, shop.output / "progress" / f"unet-{updates:06}.png", columns=10)

    average, figures = train(model, loss_at, course, shop.run, watch)
    shop.finished("unet", figures)
    return average


def write_model(shop: Workshop, model: TextToImage, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> Path:
    """Write the pipeline's folder in half precision, whole or not at all."""
    folder = shop.output / "emoji-sd"
    sampled = np.random.default_rng(shop.seed).permutation(shop.trained)[:40]
    pipe = assemble(model, vae, tokenizer)
    images = sample(pipe, [shop.emoji[index].name for index in sampled], 2 * shop.size.steps, guidance=4.0)
    with new_folder(folder, force=True, kind=Kind("model_index.json", files_below)) as draft:
        for part in (vae, model.text, model.unet):
            part.half()
        pipe.save_pretrained(draft)
        for part, changes in (
            ("text_encoder", {"dtype": "float32"}),  # of all parts, transformers alone would load it in half
            ("vae", {"_name_or_path": ""}),  # where it was trained
        ):
            config = draft / part / "config.json"
            config.write_text(json.dumps(json.loads(config.read_text()) | changes, indent=2) + "\n")
        save_tokenizer(tokenizer, draft / "tokenizer")
        names = {
            "held_out": [shop.emoji[index].name for index in shop.held_out],
            "training": [shop.emoji[index].name for index in shop.trained],
        }
        (draft / "held-out.json").write_text(json.dumps(names, indent=0, ensure_ascii=False) + "\n")
        (draft / "prompts.txt").write_text("\n".join(names["training"]) + "\n")
        (draft / "training.json").write_text((shop.work / "training.json").read_text())
        save_grid(images, draft / "samples.png", columns=10)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU (default: as torch chooses)")
    parser.add_argument("--package", type=Path, help="folder that holds or shall hold the tarball (default: OUTPUT)")
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--small", action="store_true", help="what two CPU cores can train in two hours")
    sizes.add_argument("--trial", action="store_true", help="a toy, to see in a minute that all stages run")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU; leave it out, and give --small")
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        emoji, pictures = read_emoji(fetch(args.package or args.output))
        size = TRIAL if args.trial else SMALL if args.small else FULL
        settings = {"seed": args.seed, "size": asdict(size)}
        with Progress().phases() as report:
            run = open_run(args.output / "work", settings, resume=True, report=report)
            shop = Workshop(args.output, size, args.seed, args.device, emoji, pictures, held_out(pictures), run)
            vae, tokenizer = train_vae(shop), make_tokenizer(shop)
            model = train_unet(shop, vae, tokenizer)
        print(write_model(shop, model, vae, tokenizer))
    except DipgoError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
