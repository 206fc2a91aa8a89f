"""The timing cache: how long each kernel took on this GPU, kept for the next build of any bundle.

Only full TensorRT times kernels while it builds; TensorRT-RTX chooses them where the engine runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from filelock import FileLock

from dipgo.base.files import cache_root, new_file
from engines.trt.library import Library


def timing_file(library: Library, target: str) -> Path | None:
    """Return where timings are kept: below ``$XDG_CACHE_HOME/dipgo``, a file a version and GPU; None for none."""
    if library.portable:
        return None
    return cache_root() / "tensorrt" / f"{library.name}-{library.version}.{target}.timing"


def use_timings(config: Any, path: Path, errors: list[str]) -> None:
    """Let a build read the timings in a file. One that TensorRT does not take is kept aside as ``….damaged``."""
    before = len(errors)
    timings = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if timings is None or not config.set_timing_cache(timings, False) or len(errors) > before:
        keep_aside(path)
        config.set_timing_cache(config.create_timing_cache(b""), False)


def add_timings(config: Any, path: Path) -> None:
    """Add a build's timings to the file, to those that other builds have added meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(f"{path.name}.lock")):
        timings = config.get_timing_cache()
        others = config.create_timing_cache(path.read_bytes()) if path.is_file() else None
        if others is not None:
            timings.combine(others, False)
        with new_file(path) as draft:
            draft.write_bytes(timings.serialize())


def keep_aside(path: Path) -> None:
    """Give a damaged file another name, in the place of an older one."""
    if path.exists():
        path.replace(path.with_name(f"{path.name}.damaged"))
