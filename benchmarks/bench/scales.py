"""Quality at other guidance scales than the search's: backups were learned at that one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.bench.quality import image_psnr, latents_as_images
from benchmarks.bench.subjects import IMAGE_SEED, ProgramSpec, ProgramSubject
from dipgo.base.progress import Report, silent
from dipgo.base.records import Record
from export.bundle import open_bundle

FACTORS = (0.5, 1.0, 1.5)  # of the SubNet's own scale


class ScaleQuality(Record):
    """The mean PSNR of images to those of the full program at the same guidance scale, from the same noise."""

    guidance_scale: float
    images: int
    image_psnr_db: float


def scales_of(folder: str | Path) -> list[float]:
    """Return the scales to look at; none where a bundle's is compiled in."""
    record = open_bundle(Path(folder), check_files=False).record
    own = record.sampler.guidance_scale
    return [round(factor * own, 2) for factor in FACTORS] if record.conditioning.guidance else []


def quality_at_scales(
    own: ProgramSpec, full: ProgramSpec, count: int, progress: Report = silent
) -> Iterator[ScaleQuality]:
    """Make ``count`` images at each scale by both programs, and compare them."""
    scales = scales_of(own.folder) if count and scales_of(full.folder) else []
    for number, scale in enumerate(scales):
        progress("guidance scales", number, len(scales), f"{scale:g}")
        mine, theirs = (_images(spec.model_copy(update={"guidance": scale}), count) for spec in (own, full))
        yield ScaleQuality(guidance_scale=scale, images=count, image_psnr_db=float(np.mean(image_psnr(mine, theirs))))
    if scales:
        progress("guidance scales", len(scales), len(scales), "")


def _images(spec: ProgramSpec, count: int) -> np.ndarray:
    subject = ProgramSubject(spec)
    try:
        made = [subject.generate(start, count, IMAGE_SEED) for start in range(0, count, subject.batch)]
    finally:
        subject.close()
    return np.concatenate([latents_as_images(latents) if images is None else images for latents, images in made])
