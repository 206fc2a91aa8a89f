"""Measure ``digits-flux`` and write its card.

    python -m training.flux_quality build/flux/digits-flux

Does the project's classifier read the digit that was asked for? And do the words for how it is written do what they
say: from the same noise, has a bold digit more ink than a thin one, and does a slanted one lean more to the right than
an upright one? Writes ``quality.json`` and ``README.md`` into the folder.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.bench.digit_classifier import WORDS, digit_of, load_classifier
from dipgo.base.errors import DipgoError
from dipgo.base.files import new_file
from dipgo.base.records import read_json
from dipgo.model.models import find_model
from training.digit_captions import SLANTS, WEIGHTS, ink_and_lean
from training.flux_model import GUIDANCE, STEPS, sample

CARD = Path(__file__).with_name("flux_card.md")
PAIRS = 10  # of each digit


def measure(pipe: Any, prompts: list[str], count: int) -> dict[str, Any]:
    """Return the shares of right digits and of pairs in the right order."""
    asked = [prompts[k % len(prompts)] for k in range(count)]
    with torch.no_grad():
        read = load_classifier()(sample(pipe, asked).mean(1, keepdim=True)).argmax(1).tolist()
    right = [digit == digit_of(prompt) for digit, prompt in zip(read, asked, strict=True)]
    texts = [word for word in WORDS for _ in range(PAIRS)]

    def ahead(place: int, words: tuple[str, str]) -> float:
        less, more = (
            ink_and_lean(sample(pipe, [f"{word} {text}" for text in texts]).mean(1, keepdim=True))[place]
            for word in words
        )
        return float((more > less).double().mean())

    return {
        "count": count,
        "steps": STEPS,
        "guidance_scale": GUIDANCE,
        "class_accuracy": sum(right) / count,
        "pairs": len(texts),
        "bold_has_more_ink": ahead(0, WEIGHTS),
        "slanted_leans_more": ahead(1, SLANTS),
    }


def card(pipe: Any, training: dict[str, Any], quality: dict[str, Any]) -> str:
    """Return the model card."""

    def millions(*parts: Any) -> float:
        return sum(parameter.numel() for part in parts for parameter in part.parameters()) / 1e6

    transformer, text, side = pipe.transformer.config, pipe.text_encoder.config, pipe.vae.config.sample_size
    stages = training["stages"]
    courses = {
        f"{name}_{figure}": value
        for name, stage in stages.items()
        for figure, value in (
            ("iterations", f"{stage['iterations']:,}"),
            ("batch", stage["batch"]),
            ("minutes", stage["seconds"] / 60),
        )
    }
    low, high = stages["guidance"]["guidances"]
    return CARD.read_text().format(
        **courses,
        side=side,
        quarter=side // 4,
        tokens=side**2 // 64,
        length=pipe.tokenizer_2.model_max_length,
        double=transformer.num_layers,
        single=transformer.num_single_layers,
        heads=transformer.num_attention_heads,
        transformer=millions(pipe.transformer),
        text=millions(pipe.text_encoder, pipe.text_encoder_2),
        text_layers=text.num_hidden_layers,
        text_width=text.hidden_size,
        clip_words=len(pipe.tokenizer),
        t5_words=len(pipe.tokenizer_2),
        vae=millions(pipe.vae),
        psnr=stages["vae"]["held_out_psnr_db"],
        note=f" {training['note']}" if "note" in training else "",
        seed=training["seed"],
        device=training["device"],
        low=low,
        high=high,
        accuracy=quality["class_accuracy"],
        count=quality["count"],
        steps=quality["steps"],
        guidance=quality["guidance_scale"],
        pairs=quality["pairs"],
        bolder=quality["bold_has_more_ink"],
        leaning=quality["slanted_leans_more"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=500, help="how many images to judge")
    args = parser.parse_args()
    folder: Path = args.folder
    try:
        training = read_json(folder / "training.json", "record of a training")
        model = find_model(str(folder), pixels=(32, 32))
        pipe = model.pipeline()
        quality = measure(pipe, model.prompts(), args.count)
        for name, text in (
            ("quality.json", json.dumps(quality, indent=2) + "\n"),
            ("README.md", card(pipe, training, quality)),
        ):
            with new_file(folder / name) as draft:
                draft.write_text(text)
    except DipgoError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(json.dumps(quality, indent=2))


if __name__ == "__main__":
    main()
