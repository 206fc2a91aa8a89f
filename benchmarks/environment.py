"""Where a measurement was made."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from dipgo.base.records import Record

ROOT = Path(__file__).parents[1]
PACKAGES = (
    *("dipgo", "torch", "diffusers", "onnx", "onnxruntime", "numpy"),
    *("DeepCache", "onnxruntime-gpu", "onnxruntime-ep-nv-tensorrt-rtx-cu13", "tensorrt", "tensorrt-rtx", "triton"),
)
_GPU_FACTS = "name,driver_version,clocks.sm,clocks.mem,temperature.gpu"


class Environment(Record):
    """The machine and the software.

    Load averages are over 1, 5 and 15 minutes. Clocks are the cores' mean in MHz, None where the system does not tell.
    ``gpu`` is what ``nvidia-smi`` says at the end. ``commit`` is that of the checkout, with ``+`` where files were
    changed since; None for an installed package.
    """

    python: str
    os: str
    cpu: str
    cores: int
    physical_cores: int | None
    memory_bytes: int
    load_at_start: list[float]
    load_at_end: list[float]
    versions: dict[str, str]
    clock_at_start: float | None = None
    clock_at_end: float | None = None
    governor: str | None = None
    gpu: str | None = None
    commit: str | None = None


def load_average() -> list[float]:
    """Return the load averages over 1, 5 and 15 minutes."""
    return [round(value, 2) for value in psutil.getloadavg()]


def clock() -> float | None:
    """Return the mean clock of the cores in MHz."""
    try:
        frequency = psutil.cpu_freq()
    except (OSError, RuntimeError, NotImplementedError):  # by system and container
        return None
    return round(frequency.current, 1) if frequency else None


def environment(load_at_start: list[float], clock_at_start: float | None = None) -> Environment:
    """Describe this machine now, at the end of a measurement."""
    return Environment(
        python=platform.python_version(),
        os=platform.platform(),
        cpu=cpu_model(),
        cores=os.cpu_count() or 1,
        physical_cores=psutil.cpu_count(logical=False),
        memory_bytes=psutil.virtual_memory().total,
        load_at_start=load_at_start,
        load_at_end=load_average(),
        versions=_versions(),
        clock_at_start=clock_at_start,
        clock_at_end=clock(),
        governor=_governor(),
        gpu=_output_of(["nvidia-smi", f"--query-gpu={_GPU_FACTS}", "--format=csv,noheader"]),
        commit=commit(),
    )


def commit() -> str | None:
    """Return the checkout's commit, shortened; ``+`` says that tracked files differ from it."""
    if not (ROOT / ".git").exists():
        return None
    head = _output_of(["git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD"])
    changed = _output_of(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return head and head + ("+" if changed else "")


def _versions() -> dict[str, str]:
    versions = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def _governor() -> str | None:
    file = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    return file.read_text().strip() if file.is_file() else None


def _output_of(command: list[str]) -> str | None:
    """Return what a program prints, None where there is no such program, it fails, or it prints nothing."""
    if shutil.which(command[0]) is None:
        return None
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    return process.stdout.strip() or None if process.returncode == 0 else None


def cpu_model() -> str:
    """Return the name of the processor as the system gives it."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*: *(.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    return model[1].strip() if model else platform.processor() or platform.machine()
