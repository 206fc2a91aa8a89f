"""The machine and its device, as the driver's own tool and torch give them."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.bench.environment import cpu_model, load_average
from benchmarks.gpu.records import Machine, State

PACKAGES = ("torch", "triton", "diffusers", "DeepCache", "onnxruntime-gpu", "onnxruntime", "tensorrt", "tensorrt-rtx")


def machine(cuda: bool) -> Machine:
    """Describe this machine; ``cuda`` says whether a CUDA device is used."""
    driver, power_limit, clock = _query(("driver_version", "power.limit", "clocks.max.sm")) if cuda else [None] * 3
    found = torch.cuda.get_device_properties(0) if cuda else None
    return Machine(
        device=found.name if found else "CPU",
        cuda=cuda,
        driver=driver,
        compute_capability=f"{found.major}.{found.minor}" if found else None,
        memory=found.total_memory if found else None,
        power_limit=_number(power_limit),
        max_sm_clock=_number(clock),
        cpu=cpu_model(),
        cores=os.cpu_count() or 1,
        load_average=load_average()[0],
        python=platform.python_version(),
        versions=versions(),
    )


def versions() -> dict[str, str]:
    """Return the versions of what may take part, and of CUDA and cuDNN as torch was built with them."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    built = {"cuda": torch.version.cuda, "cudnn": str(cudnn) if cudnn else None}
    return found | {name: value for name, value in built.items() if value}


def state(cuda: bool) -> State | None:
    """Return clock, power and temperature of the device now; None without one."""
    if not cuda:
        return None
    clock, power, temperature = _query(("clocks.sm", "power.draw", "temperature.gpu"))
    return State(sm_clock=_number(clock), power=_number(power), temperature=_number(temperature))


def commit() -> str | None:
    """Return the commit of the code, where it lies in a git checkout."""
    folder = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _query(fields: Sequence[str]) -> list[str | None]:
    """Ask nvidia-smi about the first device; None for each field where it does not answer."""
    command = ["nvidia-smi", "--id=0", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return [None] * len(fields)
    values = [value.strip() for value in answer.strip().split(",")]
    return list(values) if len(values) == len(fields) else [None] * len(fields)


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None
