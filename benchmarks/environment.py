"""Where a measurement was made."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path

import psutil

from dipgo.records import Record

PACKAGES = ("dipgo", "torch", "diffusers", "onnx", "onnxruntime", "numpy")


class Environment(Record):
    """The machine and the software; load averages are over 1, 5 and 15 minutes."""

    python: str
    os: str
    cpu: str
    cores: int
    physical_cores: int | None
    memory_bytes: int
    load_at_start: list[float]
    load_at_end: list[float]
    versions: dict[str, str]


def load_average() -> list[float]:
    """Return the load averages over 1, 5 and 15 minutes."""
    return [round(value, 2) for value in psutil.getloadavg()]


def environment(load_at_start: list[float]) -> Environment:
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
        versions={name: version(name) for name in PACKAGES},
    )


def cpu_model() -> str:
    """Return the name of the processor as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()
