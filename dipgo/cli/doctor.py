"""What this machine can run, and one line on each thing that it cannot."""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module, metadata, util
from typing import Annotated, Any

import typer

from dipgo.base import install
from dipgo.base.errors import DipgoError
from dipgo.base.files import cache_root
from dipgo.base.own_packages import PACKAGES, strangers
from dipgo.base.units import size

DISTRIBUTIONS = (
    *("torch", "diffusers", "transformers", "onnx", "onnxruntime", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx"),
    *("polygraphy", "cuda-bindings", "tritonclient"),
)
OK = "usable"
SEARCHING = ("torch", "diffusers", "transformers", "onnx", "onnxscript")
NO_DEVICE = "needs a CUDA device, there is none"


def doctor(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Say what can run here, and what to install for the rest."""
    findings = examine()
    findings["verdict"] = verdict(findings)
    typer.echo(json.dumps(findings, indent=2) if as_json else text_of(findings))


def examine() -> dict[str, Any]:
    """Return all that there is, as JSON has it; nothing is changed, and nothing that is missing is an error."""
    providers = _providers()
    devices = _devices()
    server, without = _triton()
    return {
        "python": {"version": platform.python_version(), "executable": sys.executable, "system": platform.platform()},
        "packages": {name: _version(name) for name in ("dipgo", *DISTRIBUTIONS)},
        "onnxruntime_providers": providers,
        "cuda_devices": devices,
        "triton": server,
        "triton_missing": without,
        "backends": _backends(providers, devices),
        "search": OK if all(map(util.find_spec, SEARCHING)) else install.SEARCH,
        "debug": OK if util.find_spec("polygraphy") else install.DEBUG,
        "import_clashes": clashes(),
        "cache": _cache(),
    }


def text_of(findings: dict[str, Any]) -> str:
    """Return :func:`examine`'s findings as lines of text."""
    clashing = [f"{name}: {cure}" for name, cure in findings["import_clashes"].items()]
    python, cache = findings["python"], findings["cache"]
    sections = {
        "python": [f"{python['version']}, {python['executable']}", python["system"]],
        "packages": _aligned({name: version or "not installed" for name, version in findings["packages"].items()}),
        "ONNX Runtime providers": [", ".join(findings["onnxruntime_providers"]) or "none"],
        "CUDA devices": findings["cuda_devices"] or ["none"],
        "Triton server": [findings["triton"] or findings["triton_missing"]],
        "backends": _aligned(findings["backends"]),
        "search, export, bench": [findings["search"]],
        "verify --debug": [findings["debug"]],
        "import names": clashing or [f"{', '.join(PACKAGES)}: dipgo's own"],
        "cache": [f"{cache['folder']}, {size(cache['bytes'])}"],
        "verdict": findings["verdict"],
    }
    return "\n".join(f"{title}:\n" + "\n".join(f"  {line}" for line in lines) for title, lines in sections.items())


def verdict(findings: dict[str, Any]) -> list[str]:
    """Return what it all comes to: whether bundles run, on a GPU too, and whether there can be new ones."""
    if findings["import_clashes"]:
        return [f"nothing can be relied on: {install.ENVIRONMENT}"]
    from engines.backends import BACKENDS

    usable = [name for name, state in findings["backends"].items() if state == OK]
    on = {kind: ", ".join(name for name in usable if kind in BACKENDS[name].kinds) for kind in ("cpu", "cuda")}
    lines = [f"bundles run on the CPU by {on['cpu']}" if on["cpu"] else f"no bundle can run on the CPU; {install.CPU}"]
    lines.append(f"on the GPU by {on['cuda']}" if findings["cuda_devices"] and on["cuda"] else "no GPU can be used")
    if findings["packages"]["onnxruntime"] and findings["packages"]["onnxruntime-gpu"]:
        lines.append(f"onnxruntime and onnxruntime-gpu hide each other; {install.CUDA}")
    searching = findings["search"]
    lines.append("models can be searched and exported" if searching == OK else f"to search and export, {searching}")
    return lines


def clashes() -> dict[str, str]:
    """Return the import names that another package has taken or shares, with a cure."""
    owners = metadata.packages_distributions()
    shared = {}
    for name in PACKAGES:
        others = sorted({owner for owner in owners.get(name, ()) if owner != "dipgo"})
        if others:
            shared[name] = f"{', '.join(others)} installs it too; {install.ENVIRONMENT}"
    return shared | {
        name: f"{place} is imported, not dipgo's; {install.ENVIRONMENT}" for name, place in strangers().items()
    }


def _aligned(pairs: dict[str, str]) -> list[str]:
    width = max(map(len, pairs))
    return [f"{name:{width}}  {value}" for name, value in pairs.items()]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _providers() -> list[str]:
    try:
        import onnxruntime
    except ImportError:
        return []
    return list(onnxruntime.get_available_providers())


def _devices() -> list[str]:
    """Return name, compute capability, memory and driver of each GPU, as nvidia-smi has them, else torch."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20)
        return [f"{line.strip()}" for line in answer.stdout.splitlines() if line.strip()]
    except (OSError, subprocess.SubprocessError):
        pass
    try:
        import torch
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return []
    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{card.name}, {card.major}.{card.minor}, {card.total_memory // 2**20} MiB" for card in cards]


def _backends(providers: list[str], devices: list[str]) -> dict[str, str]:
    """Return for each backend ``usable``, or what to do for it."""
    try:
        from engines.backends import BACKENDS
    except ImportError:  # another package has the name
        return {"none": "dipgo's engines cannot be imported; see the import names"}

    def provider(name: str) -> Callable[[], str]:
        def check() -> str:
            if f"{name}ExecutionProvider" not in providers:
                return install.CUDA
            return _card(devices)

        return check

    def plugin() -> str:
        missing = not util.find_spec("onnxruntime_ep_nv_tensorrt_rtx")
        return install.PLUGIN if missing else _card(devices)

    def tensorrt() -> str:
        if not any(util.find_spec(name) for name in ("tensorrt", "tensorrt_rtx")):
            return install.TENSORRT
        card = _card(devices)
        portable = card == NO_DEVICE and util.find_spec("tensorrt_rtx")  # the only one that builds without a device
        return f"engines can be built; running them {NO_DEVICE}" if portable else card

    def compiler() -> str:
        if not util.find_spec("torch"):
            return install.TORCH
        return OK if devices or shutil.which("g++") or shutil.which("clang++") else "needs a C++ compiler; install g++"

    checks: dict[str, Callable[[], str]] = {
        "onnxruntime": lambda: OK if providers else install.CPU,
        "onnxruntime-cuda": provider("CUDA"),
        "onnxruntime-tensorrt": provider("Tensorrt"),
        "onnxruntime-tensorrt-rtx": plugin,
        "tensorrt": tensorrt,
        "torch-compile": compiler,
        "torch-aot": compiler,
    }
    return {name: checks[name]() if name in checks else _imports(entry.module) for name, entry in BACKENDS.items()}


def _card(devices: list[str]) -> str:
    """Return whether engines find a GPU by ``cuda-bindings``, as those of ONNX Runtime and TensorRT do, or why not."""
    try:
        from engines.cuda.runtime import find_device, open_device

        if find_device() is None and not devices:
            return NO_DEVICE
        open_device()
    except Exception as error:  # as a rule the bindings are not installed; damaged ones may raise anything
        return " ".join(str(error).split())[:200] or type(error).__name__
    return OK


def _triton() -> tuple[str | None, str | None]:
    """Return the Triton server that ``serve`` would take, or what to do for one."""
    try:
        from engines.serving.install import find_server

        return str(find_server().binary), None
    except ImportError:  # another package has the name
        return None, "dipgo's engines cannot be imported; see the import names"
    except DipgoError as error:
        return None, str(error)


def _imports(module: str) -> str:
    """Return whether a backend's module can be imported, or its own line that says what it lacks."""
    try:
        import_module(module)
    except Exception as error:  # a damaged installation may raise anything
        return " ".join(str(error).split())[:200] or type(error).__name__
    return OK


def _cache() -> dict[str, Any]:
    folder = cache_root()
    sizes = [path.lstat().st_size for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    return {"folder": str(folder), "bytes": sum(sizes)}
