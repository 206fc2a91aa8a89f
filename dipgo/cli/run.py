"""From a bundle to images."""

from __future__ import annotations

from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import Field

from dipgo.base.config import Backend, Config, Device, Seed, Threads
from dipgo.base.errors import UsageError
from dipgo.base.pixels import pixels_of
from dipgo.base.progress import bar
from dipgo.cli.options import BundleArgument, ForceOption

if TYPE_CHECKING:
    from engines.pipeline.pipeline import Pipeline
    from engines.program import Program

FORMATS: dict[str, dict[str, Any]] = {
    ".png": {"format": "PNG"},
    ".jpg": {"format": "JPEG", "quality": 95},
    ".jpeg": {"format": "JPEG", "quality": 95},
    ".webp": {"format": "WEBP", "lossless": True},
}
"""By the endings of files; what is no ending of a picture gets .png added."""


class RunConfig(Config):
    """Which images to make, and what with."""

    label: str | None = Field(
        None,
        description="Class to generate: its name or number.",
        json_schema_extra={"flags": ["--class"]},
    )
    prompt: str | None = Field(None, description="What to generate, for a model of prompts.")
    negative: str | None = Field(None, description="A prompt to stay away from.")
    steps: int | None = Field(None, description="Steps, where the bundle holds programs of several numbers of them.")
    budget: float | None = Field(None, description="Share of the MACs, where the bundle holds several budgets.")
    guidance: float | None = Field(None, description="Guidance scale; by default the one of the search.")
    control: str | None = Field(None, description="Picture for the ControlNet, a file; for several, joined by commas.")
    control_scale: float = Field(1.0, description="How strongly ControlNets count.")
    control_end: float = Field(1.0, gt=0, le=1, description="Share of the steps that ControlNets count in.")
    lora: str | None = Field(None, description="LoRAs joined by commas, FILE or FILE:WEIGHT each.")
    seed: Seed = 0
    number: int = Field(1, ge=1, description="How many images.", json_schema_extra={"flags": ["--number", "-n"]})
    size: str | None = Field(None, description="Pixels, N or HEIGHTxWIDTH, where the bundle takes several sizes.")
    image: Path | None = Field(None, description="A picture to start from, where the bundle takes them.")
    mask: Path | None = Field(None, description="A picture that is white where the other is to be made anew.")
    strength: float | None = Field(None, description="Share of the steps that are done from a picture on, up to 1.")
    backend: Backend = "onnxruntime"
    device: Device = None
    threads: Threads = None

    def save(self, bundle: Path, output: Path, force: bool) -> str:
        """Make the images and save them as one picture, in the format of the file's ending; returns a line on it."""
        from dipgo.base.files import new_file, refuse_existing
        from engines.guidance import Guidance
        from engines.pipeline.images import grid
        from engines.pipeline.pipeline import load

        output = _picture(output)
        refuse_existing(output, force)
        size = pixels_of(self.size)
        program = load(bundle, self.threads, self.backend, self.device)
        pictures = self._pictures(program.at(self.steps, self.budget)) | self._control(bundle, program)
        with program:
            self._adapt(program)
            subjects, guidance = self._conditions(bundle, program), Guidance(self.guidance)
            if pictures:
                (pictures["height"], pictures["width"]), pictures["output_type"] = size or program.size, "np"
                pixels = program(subjects, **pictures).images
            else:
                chosen = program.at(self.steps, self.budget)
                pixels = chosen.generate(subjects, self.seed, bar("generate"), self.negative, size, guidance)
        with new_file(output, force) as draft:
            grid(pixels).save(draft, **FORMATS[output.suffix.lower()])
        return f"{self.number} image{'s' * (self.number > 1)}: {output}"

    def _pictures(self, program: Program) -> dict[str, Any]:
        """Return the arguments of a call that starts from a picture; none where it starts from noise."""
        from engines.pipeline.images import read_picture
        from engines.pipeline.pictures import check_pictures

        image = read_picture(self.image, "RGB") if self.image else None
        mask = read_picture(self.mask, "L") if self.mask else None
        check_pictures(program, image, mask, self.strength, None)
        if image is None:
            return {}
        return {"image": image, "mask_image": mask, "strength": self.strength, **self._asked(program)}

    def _asked(self, program: Program) -> dict[str, Any]:
        """Return the arguments of any call of a pipeline."""
        asked: dict[str, Any] = {"negative_prompt": self.negative, "generator": self.seed}
        asked |= {"num_inference_steps": self.steps, "budget": self.budget}
        return asked | {program.record.conditioning.scale: self.guidance}

    def _control(self, bundle: Path, program: Program) -> dict[str, Any]:
        """Return the arguments of a call with ControlNets; none of a bundle that has none."""
        from engines.pipeline.control import nets_of
        from engines.pipeline.images import read_picture

        files, nets = self.control.split(",") if self.control else [], nets_of(program.record)
        if len(files) != nets:
            wanted = "--control FILE" if nets == 1 else f"--control with {nets} files, joined by commas"
            raise UsageError(
                f"{bundle}: has {nets or 'no'} ControlNet{'s' * (nets > 1)}; "
                + (f"give {wanted}" if nets else "leave --control out")
            )
        if not nets:
            return {}
        pictures = [read_picture(Path(file), "RGB") for file in files]
        asked = self._asked(program) | {"output_type": "np"}
        asked |= {"controlnet_conditioning_scale": self.control_scale, "control_guidance_end": self.control_end}
        return asked | {"image": pictures if nets > 1 else pictures[0]}

    def _adapt(self, program: Pipeline) -> None:
        weights = {}
        for name, text in enumerate(self.lora.split(",") if self.lora else ()):
            file, colon, weight = text.rpartition(":")
            try:
                weights[str(name)] = float(weight) if colon else 1.0
            except ValueError:
                raise UsageError(f"--lora {text}: give FILE or FILE:WEIGHT, such as style.safetensors:0.7") from None
            program.load_lora_weights(file if colon else text, str(name))
        if weights:
            program.set_adapters(list(weights), list(weights.values()))

    def _conditions(self, bundle: Path, program: Program) -> list[int] | list[str]:
        kind = program.record.conditioning.kind
        missing = (self.label is None, self.prompt is None)
        if missing != {"class": (False, True), "prompt": (True, False)}.get(kind, (True, True)):
            cure = {"class": "--class alone", "prompt": "--prompt alone"}.get(kind, "neither --class nor --prompt")
            raise UsageError(f"{bundle}: conditioned by {kind}; give {cure}")
        if self.negative is not None and kind != "prompt":
            raise UsageError(f"{bundle}: conditioned by {kind}; --negative is for models of prompts")
        if self.label is not None:
            return [program.class_of(self.label)] * self.number
        return [self.prompt or ""] * self.number


def run(
    bundle: BundleArgument,
    config: RunConfig,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where to write: .png, .jpg or .webp; images.png by default, or numbered."),
    ] = None,
    force: ForceOption = False,
) -> None:
    """Make images with a bundle, without torch.

    Several are set side by side in one picture.
    """
    typer.echo(config.save(bundle, output or _unused("images"), force))


def _picture(path: Path) -> Path:
    if path.name in ("", ".."):
        raise UsageError(f"-o {path}: names no file; give one, such as out.png")
    from PIL import Image

    ending = path.suffix.lower()
    if ending in FORMATS:
        return path
    if ending in Image.registered_extensions():
        raise UsageError(f"-o {path}: {ending} is not written; use {', '.join(FORMATS)}")
    return path.with_name(f"{path.name}.png")


def _unused(name: str) -> Path:
    """Return ``NAME.png``, or the first of ``NAME-2.png``, … that is not there yet."""
    numbered = (Path(f"{name}-{number}.png") for number in count(2))
    return next(path for path in chain([Path(f"{name}.png")], numbered) if not path.exists())
