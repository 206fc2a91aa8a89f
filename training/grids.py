"""Pictures side by side in one PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from dipgo.base.files import new_file


def save_grid(images: torch.Tensor, path: Path, columns: int, labels: Sequence[str] = ()) -> None:
    """Write images ``[n, 3, h, w]`` in [-1, 1] row by row, each with its label below where there are labels.

    A label that is too long for its column goes on in a second line, and is cut there.
    """
    count, _, height, width = images.shape
    space, margin = 28 if labels else 0, 24 if labels else 0
    rows = -(-count // columns)
    page = Image.new("RGB", (columns * (width + margin), rows * (height + space)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=9)
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    for index in range(count):
        left, top = index % columns * (width + margin), index // columns * (height + space)
        page.paste(Image.fromarray(pixels[index]), (left + margin // 2, top))
        if labels:
            lines = _wrap(labels[index], font, width + margin - 4)
            for number, line in enumerate(lines[:2]):
                pen.text((left + 2, top + height + 1 + 11 * number), line, fill="black", font=font)
    with new_file(path) as draft:
        page.save(draft, format="PNG")


def _wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
