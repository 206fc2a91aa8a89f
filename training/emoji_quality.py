"""Measure ``emoji-sd`` and write its card.

    python -m training.emoji_quality build/emoji/emoji-sd

For training names, 50 DDIM steps with guidance: whose picture is nearest to the generated one, among all training
pictures, in the VAE's latent space? Right are a picture of the same category, and the very picture of the name. The
guidance is the best of a few on other names. Writes ``quality.json``, ``held-out.png`` (a grid of names that the
training never saw) and ``README.md`` into the folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dipgo.base.errors import DipgoError
from dipgo.base.files import new_file
from dipgo.base.records import read_json
from training.emoji import PACKAGE, VERSION, Emoji, fetch, read_emoji, to_unit
from training.emoji_model import encode, sample
from training.grids import save_grid

STEPS = 50
SHOWN = 48

CARD = Path(__file__).with_name("emoji_card.md")


def nearest(features: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return for each row of ``features`` ``[n, d]`` the index of the nearest row of ``reference`` ``[m, d]``."""
    return torch.cdist(features.double(), reference.double()).argmin(1)


def judge(
    pipe: Any,
    emoji: Sequence[Emoji],
    latents: torch.Tensor,
    chosen: Sequence[int],
    guidance: float,
    steps: int = STEPS,
    seed: int = 0,
) -> dict[str, float]:
    """Generate ``emoji[k]`` for each k chosen, and look it up among the latents ``[n, d]`` of all of ``emoji``.

    Emoji with the same picture count as one.
    """
    images = sample(pipe, [emoji[index].name for index in chosen], steps, guidance, seed)
    neighbours = nearest(encode(pipe.vae, images.to(pipe.device)).flatten(1).cpu(), latents)
    own = torch.as_tensor(list(chosen))
    exact = (latents[neighbours] == latents[own]).all(1)
    same = [emoji[f].category == emoji[k].category for f, k in zip(neighbours.tolist(), chosen, strict=True)]
    return {
        "count": len(chosen),
        "steps": steps,
        "guidance_scale": guidance,
        "category_accuracy": float(np.mean(same)),
        "exact_accuracy": exact.double().mean().item(),
    }


def measure(
    pipe: Any, emoji: Sequence[Emoji], pictures: torch.Tensor, count: int, guidances: Sequence[float], steps: int
) -> dict[str, Any]:
    """Return the quality over ``count`` of the training emoji at the best guidance, found on 60 others.

    ``pictures`` are uint8 ``[n, 3, 64, 64]``, those of ``emoji``.
    """
    latents = encode(pipe.vae, to_unit(pictures).to(pipe.device)).flatten(1).cpu()
    order = np.random.default_rng(0).permutation(len(emoji)).tolist()
    chosen, others = order[:count], order[count : count + 60] or order[:60]
    trials = []
    if len(guidances) > 1:
        trials = [judge(pipe, emoji, latents, others, guidance, steps, seed=10_000) for guidance in guidances]
    best = max(trials, key=lambda one: (one["category_accuracy"], one["exact_accuracy"]), default=None)
    guidance = best["guidance_scale"] if best else guidances[0]
    shares = np.unique([one.category for one in emoji], return_counts=True)[1] / len(emoji)
    quality = judge(pipe, emoji, latents, chosen, guidance, steps)
    return quality | {"category_accuracy_by_chance": float((shares**2).sum()), "guidances_tried": trials}


def card(pipe: Any, training: dict[str, Any], quality: dict[str, Any], counts: tuple[int, int, int]) -> str:
    """Return the model card; ``counts`` are the names trained on, held out and shown."""
    millions = {
        name: sum(parameter.numel() for parameter in getattr(pipe, part).parameters()) / 1e6
        for name, part in (("unet", "unet"), ("text", "text_encoder"), ("vae", "vae"))
    }
    stages = training["stages"]
    return CARD.read_text().format(
        **millions,
        unet_channels=", ".join(str(width) for width in pipe.unet.config.block_out_channels),
        layers=pipe.unet.config.layers_per_block,
        text_layers=pipe.text_encoder.config.num_hidden_layers,
        text_width=pipe.text_encoder.config.hidden_size,
        vocabulary=f"{len(pipe.tokenizer):,} tokens",
        psnr=stages["vae"]["held_out_psnr_db"],
        trained=f"{counts[0]:,}",
        held=counts[1],
        shown=counts[2],
        last=counts[2] - 1,
        package=PACKAGE,
        version=VERSION,
        seed=training["seed"],
        device=training["device"],
        vae_iterations=f"{stages['vae']['iterations']:,}",
        vae_batch=stages["vae"]["batch"],
        vae_minutes=stages["vae"]["seconds"] / 60,
        unet_iterations=f"{stages['unet']['iterations']:,}",
        unet_batch=stages["unet"]["batch"],
        unet_minutes=stages["unet"]["seconds"] / 60,
        count=quality["count"],
        steps=quality["steps"],
        guidance=quality["guidance_scale"],
        category=quality["category_accuracy"],
        exact=quality["exact_accuracy"],
        chance=quality["category_accuracy_by_chance"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--package", type=Path, help="folder with the package's tarball (default: FOLDER's parent)")
    parser.add_argument("--count", type=int, default=500, help="how many training names to judge")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", default="2,4,7.5", help="one scale, or several to choose from")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    try:
        guidances = [float(scale) for scale in args.guidance.split(",")]
    except ValueError:
        parser.error(f"--guidance {args.guidance}: give numbers, separated by commas")
    try:
        quality = run(args.folder, args.package or args.folder.resolve().parent, args, guidances)
    except DipgoError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps(quality, indent=2))


def run(folder: Path, package: Path, args: argparse.Namespace, guidances: Sequence[float]) -> dict[str, Any]:
    """Measure the model in ``folder`` and write what the card needs."""
    from dipgo.model.models import find_model

    training = read_json(folder / "training.json", "record of a training")
    names = read_json(folder / "held-out.json", "list of held-out names")
    emoji, pictures = read_emoji(fetch(package))
    by_name = {one.name: index for index, one in enumerate(emoji)}
    if by_name.keys() != {*names["training"], *names["held_out"]}:
        raise DipgoError(f"{folder / 'held-out.json'}: other names than the package's; train the model again")
    pipe = find_model(str(folder)).pipeline().to(args.device)
    known = [by_name[name] for name in names["training"]]
    quality = measure(pipe, [emoji[k] for k in known], pictures[known], args.count, guidances, args.steps)
    unseen = [name for name in names["held_out"] if emoji[by_name[name]].category != "Flags"]
    examples = [unseen[k] for k in sorted(np.random.default_rng(0).permutation(len(unseen))[:SHOWN])]
    images = sample(pipe, examples, args.steps, quality["guidance_scale"])
    save_grid(images, folder / "held-out.png", columns=8, labels=examples)
    for name, text in (
        ("quality.json", json.dumps(quality, indent=2) + "\n"),
        ("README.md", card(pipe, training, quality, (len(known), len(names["held_out"]), len(examples)))),
    ):
        with new_file(folder / name) as draft:
            draft.write_text(text)
    return quality


if __name__ == "__main__":
    main()
