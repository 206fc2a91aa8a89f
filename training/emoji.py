"""The emoji: names, captions and 64x64 pictures out of the npm package ``emoji-datasource-google``.

The package's code and data are MIT (Cal Henderson); its pictures are Google's Noto Emoji, under the Apache License
2.0, and their flags are in the public domain. Nothing of it is kept in the repository: it is fetched for training.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import tarfile
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dipgo.base.errors import DipgoError
from dipgo.base.files import sha256_of

PACKAGE, VERSION = "emoji-datasource-google", "16.0.0"
TARBALL = f"{PACKAGE}-{VERSION}.tgz"
SHA256 = "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
HELD_OUT = 0.05

_STYLES = ("heavy", "black", "white")  # in Unicode's names mostly a style of text, not a colour
_MENDED = {"heart": "red heart"}
_ONE_SIDED = re.compile(r"\b(left|right|east|west|clock|oclock|thirty|backhand|sign|mark|button)\w*\b|\d")


@dataclass(frozen=True)
class Emoji:
    """One emoji of the package.

    Attributes:
        name: in lower case, unique; what a prompt says.
        others: other names that nobody else has.
        category: one of Unicode's nine.
        image: the picture's file name in the package.
        mirrors: whether the mirrored picture has the same name (no flag, symbol, text or direction).
    """

    name: str
    others: tuple[str, ...]
    category: str
    image: str
    mirrors: bool


def fetch(folder: Path) -> Path:
    """Return the package's tarball in ``folder``, fetched through npm where it is not there.

    Raises:
        DipgoError: no npm, npm cannot fetch, or a file that is not this version of the package.
    """
    tarball = folder / TARBALL
    if not tarball.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{PACKAGE}-", dir=folder) as draft:
            command = ["npm", "pack", f"{PACKAGE}@{VERSION}", "--silent", "--pack-destination", draft]
            try:
                process = subprocess.run(command, capture_output=True, text=True, check=False)
            except FileNotFoundError as error:
                raise DipgoError(f"npm not found; install Node.js, or put {TARBALL} into {folder}") from error
            if process.returncode or not Path(draft, TARBALL).exists():
                reason = " ".join(process.stderr.split())[:160]
                raise DipgoError(f"npm cannot fetch {PACKAGE}@{VERSION} ({reason}); or put {TARBALL} into {folder}")
            Path(draft, TARBALL).replace(tarball)
    if sha256_of(tarball) != SHA256:
        raise DipgoError(f"{tarball}: not the {VERSION} that was published; remove it to fetch it again")
    return tarball


def read_emoji(tarball: Path) -> tuple[list[Emoji], torch.Tensor]:
    """Return all emoji but the skin-tone swatches and variants, and their pictures on white.

    Pictures are uint8 ``[n, 3, 64, 64]``.

    Raises:
        DipgoError: a file that is not such a package.
    """
    from PIL import Image

    try:
        with tarfile.open(tarball) as package:
            folder = "package/img/google/64/"
            files = {m.name: m for m in package.getmembers() if m.name.startswith(folder)}
            table = json.load(package.extractfile("package/emoji.json") or io.BytesIO())
            emoji = name_all([entry for entry in table if entry["has_img_google"] and entry["category"] != "Component"])
            pictures = []
            for one in emoji:
                with Image.open(package.extractfile(files[folder + one.image]) or io.BytesIO()) as picture:
                    rgba = picture.convert("RGBA")
                white = Image.new("RGBA", rgba.size, "white")
                pictures.append(np.asarray(Image.alpha_composite(white, rgba).convert("RGB")))
    except (OSError, tarfile.TarError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DipgoError(f"{tarball}: not a readable {PACKAGE} ({reason}); remove it to fetch it again") from error
    return emoji, torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def name_all(entries: Sequence[dict[str, Any]]) -> list[Emoji]:
    """Name the entries of ``emoji.json``: by Unicode's name made natural, by the short name where that is taken."""
    names = [_natural(entry) for entry in entries]
    shared = {name for name, count in Counter(names).items() if count > 1}
    names = [
        _words(entry["short_name"]) if name in shared else name for name, entry in zip(names, entries, strict=True)
    ]
    further = [{_words(short) for short in entry["short_names"]} for entry in entries]
    uses = Counter(names) + Counter(word for words in further for word in words)
    emoji = []
    for name, words, entry in zip(names, further, entries, strict=True):
        others = sorted(w for w in words if w != name and uses[w] == 1 and not re.search(r"\d|^flag", w))
        mirrors = entry["category"] not in ("Flags", "Symbols") and not _ONE_SIDED.search(name)
        emoji.append(Emoji(name, tuple(others), entry["category"], entry["image"], mirrors))
    return emoji


def _natural(entry: dict[str, Any]) -> str:
    if entry["name"].endswith(" Flag"):
        return "flag: " + entry["name"].removesuffix(" Flag").lower()
    short = _words(entry["short_name"])
    words = [word for word in entry["name"].lower().split() if word not in _STYLES or word in short.split()]
    name = " ".join(words) or short
    return _MENDED.get(name, name)


def _words(short_name: str) -> str:
    return " ".join(re.split(r"[_\-]+", short_name.lower())).strip()


def held_out(pictures: torch.Tensor, seed: int = 0) -> np.ndarray:
    """Return the indices of the held-out emoji, sorted: 5 % of all, none of which shares its picture with another."""
    _, group, size = np.unique(pictures.flatten(1).numpy(), axis=0, return_inverse=True, return_counts=True)
    alone = np.flatnonzero(size[group.reshape(-1)] == 1)
    return np.sort(np.random.default_rng(seed).permutation(alone)[: round(HELD_OUT * len(pictures))])


def caption(emoji: Emoji, draw: np.random.Generator) -> str:
    """Return a caption: mostly the name or another name alone, else in a few words more."""
    name = emoji.others[draw.integers(len(emoji.others))] if emoji.others and draw.random() < 0.25 else emoji.name
    kind = draw.random()
    if kind < 0.15:
        return f"an emoji of {name}"
    if kind < 0.3:
        return f"{name}, {emoji.category.lower()}"
    return name


def captions(emoji: Sequence[Emoji]) -> list[str]:
    """Return every caption that :func:`caption` can give, for the tokenizer."""
    return [
        text
        for one in emoji
        for name in (one.name, *one.others)
        for text in (name, f"an emoji of {name}", f"{name}, {one.category.lower()}")
    ]


def to_unit(pictures: torch.Tensor) -> torch.Tensor:
    """Return uint8 pictures as float32 in [-1, 1], as a VAE takes them."""
    return pictures.float() / 127.5 - 1
