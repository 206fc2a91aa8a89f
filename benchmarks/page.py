"""The report as a web page: one file that needs no network and no script."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from benchmarks.baselines import FULL
from benchmarks.heatmap import heatmap
from benchmarks.quality import image_psnr
from benchmarks.report import RECORD_FILE, SUBJECT, ReportRecord, decibels, milliseconds
from dipgo.files import new_folder
from engines.images import to_image

PAGE_FILE = "report.html"
SMALL = 128  # images with shorter sides are shown enlarged, pixel by pixel


@dataclass(frozen=True)
class Pair:
    """An image of the full program and the bundle's from the same noise and class, as PNG data URIs."""

    full: str
    own: str
    caption: str


def write_report(
    report: ReportRecord,
    full: np.ndarray,
    own: np.ndarray,
    captions: Sequence[str],
    folder: Path,
    force: bool = False,
) -> None:
    """Write ``report.json`` and ``report.html`` into ``folder``, whole or not at all.

    Args:
        full, own: images ``[n, height, width, channels]`` in [0, 1] of the full program and of the bundle.
        captions: what each image shows.

    Raises:
        UsageError: the folder exists, without ``force``.
    """
    shown = 16 if min(full.shape[1:3]) < SMALL else 8
    pairs = [
        Pair(_data_uri(a), _data_uri(b), f"{caption} · {decibels(own_psnr)}")
        for a, b, caption, own_psnr in zip(
            full[:shown], own[:shown], captions, image_psnr(own[:shown], full[:shown]), strict=False
        )
    ]
    with new_folder(folder, force) as draft:
        (draft / RECORD_FILE).write_text(report.text())
        (draft / PAGE_FILE).write_text(render(report, pairs, full.shape[1:3]))


def render(report: ReportRecord, pairs: Sequence[Pair], size: Sequence[int]) -> str:
    """Return the page; ``size`` is the height and width of the images."""
    environment = Environment(
        loader=PackageLoader("benchmarks"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"ms": milliseconds, "db": decibels, "size": file_size, "macs": macs}
    scale = max(1, SMALL // min(size)) if min(size) < SMALL else 240 / max(size)
    return environment.get_template("report.html").render(
        report=report,
        full=FULL,
        subject=SUBJECT,
        pairs=pairs,
        height=round(size[0] * scale),
        width=round(size[1] * scale),
        map=Markup(heatmap(report.gates, report.sites, report.sampler.timesteps)),
    )


def file_size(count: int) -> str:
    """Return a number of bytes as text."""
    for unit, divisor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= divisor:
            return f"{count / divisor:.2f} {unit}"
    return f"{count} B"


def macs(count: int) -> str:
    """Return a number of MACs as text."""
    for unit, divisor in (("T", 1e12), ("G", 1e9), ("M", 1e6)):
        if count >= divisor:
            return f"{count / divisor:.2f} {unit}"
    return str(count)


def _data_uri(pixels: np.ndarray) -> str:
    stream = io.BytesIO()
    to_image(pixels).save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
