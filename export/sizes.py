"""Which sizes a bundle is made for: the number of images and the latent's sides, each fixed or a range."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dipgo.base.errors import UsageError
from dipgo.graph.exported import size_multiple
from dipgo.model.models import Model
from export.axes import parse_range
from export.components import VAE, class_of, component_config
from export.records.graphs import AxisRecord, Size

Side = int | AxisRecord


@dataclass(frozen=True)
class Sizes:
    """Images per call, and the shape of an image's latent; a range becomes an axis of the graphs.

    Attributes:
        image: channels, height and width in cells; or the shape as the pipeline packs it, which has no ranges.
    """

    batch: Side
    image: tuple[Side, ...]

    @property
    def height(self) -> Side:
        return self.image[-2]

    @property
    def width(self) -> Side:
        return self.image[-1]

    @property
    def axes(self) -> dict[str, AxisRecord]:
        """The sizes that are chosen at run time, by name."""
        return {name: side for name, side in self._named if isinstance(side, AxisRecord)}

    @property
    def latent(self) -> list[Size]:
        """The latent's shape, with the batch first."""
        return [side if isinstance(side, int) else name for name, side in self._named]

    def latent_at(self, which: Literal["min", "opt", "max"]) -> tuple[int, ...]:
        """Return the latent's shape where every axis has this value."""
        return tuple(side if isinstance(side, int) else getattr(side, which) for _, side in self._named)

    @property
    def text(self) -> str:
        """The latent's shape as part of a graph's name: ``1x4x64x64``, ``1-8x4x64-128x64-128``."""
        low, high = self.latent_at("min"), self.latent_at("max")
        return "x".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(low, high, strict=True))

    @property
    def _named(self) -> list[tuple[str, Side]]:
        names = ["batch", *[""] * (len(self.image) - 2), "height", "width"]
        return list(zip(names, (self.batch, *self.image), strict=True))


def sizes_for(model: Model, batch: int | str = 1, size: str | None = None) -> Sizes:
    """Read what the command line gives.

    Args:
        batch: images a call: ``n``, ``min:max`` or ``min:opt:max``. ``opt``, which engines are made fastest at, is the
            largest number if it is not given.
        size: of images in pixels, None for the model's own: one number or range for both sides, or
            ``HEIGHTxWIDTH``, each ``n``, ``min:max`` or ``min:opt:max``. ``opt`` is the model's own size if that lies
            in the range, else the largest.

    Raises:
        UsageError: no such number or range, or sides that the model does not take.
    """
    first, best, last = parse_range(str(batch), "--batch")
    images = first if first == last else AxisRecord(min=first, opt=best or last, max=last)
    image = model.family.latent(model.config)
    if size is None:
        return Sizes(images, image)
    if model.family.pixels:
        raise UsageError(f"--size {size}: {model.name} is searched and exported at one size; give it to the search")
    own = image[1:]
    parts = size.split("x")
    if len(parts) > 2:
        raise UsageError(f"--size {size}: give one number or range, or HEIGHTxWIDTH")
    height, width = (_side(model, part, side) for part, side in zip([parts[0], parts[-1]], own, strict=True))
    return Sizes(images, (*image[:1], height, width))


def pixels_of_cell(model: Model) -> int:
    """Return how many pixels a cell of the latent has a side: 1 for a pipeline without a VAE."""
    if not class_of(model, VAE):
        return 1
    config = component_config(model, VAE)
    levels: Sequence[int] = config.get("block_out_channels") or config.get("encoder_block_out_channels") or [0] * 4
    return int(2 ** (len(levels) - 1))


def _side(model: Model, text: str, own: int) -> Side:
    cell, multiple = pixels_of_cell(model), size_multiple(model.config)
    first, best, last = parse_range(text, "--size")
    if first == last and model.family.uneven:
        multiple = 1
    pixels = [first, last] if best is None else [first, best, last]
    for number in pixels:
        if number % (cell * multiple):
            near = max(round(number / (cell * multiple)), 1) * cell * multiple
            raise UsageError(
                f"--size {text}: {model.name} takes multiples of {cell * multiple} pixels; {near} is near to {number}"
            )
    low, high = first // cell, last // cell
    if low == high:
        return low
    opt = best // cell if best is not None else own if low <= own <= high else high
    return AxisRecord(min=low, opt=opt, max=high, multiple=multiple)
