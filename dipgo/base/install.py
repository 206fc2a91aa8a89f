"""What to install for each case, written once: errors and ``dipgo doctor`` say the same."""

from __future__ import annotations

import re
from importlib import metadata

ENVIRONMENT = "give dipgo an environment of its own"


def extra(name: str) -> str:
    """Return the line for one of dipgo's extras (``pyproject.toml``)."""
    return f"run: pip install 'dipgo[{name}]'"


SEARCH = extra("search")
CPU = extra("cpu")
CUDA = "run: pip uninstall onnxruntime; pip install 'dipgo[cuda]' (the two onnxruntime exclude each other)"
PLUGIN = extra("cpu,onnxruntime-tensorrt-rtx") + " (-cu12 of the plugin for a driver of CUDA 12)"
BINDINGS = "run: pip install 'cuda-bindings>=13,<14' (or <13 for a driver of CUDA 12)"
TORCH = "run: pip install torch"
TENSORRT = f"{extra('tensorrt')}, or without a GPU: pip install 'dipgo[tensorrt-rtx]'"
DEBUG = extra("debug")
LOGS = extra("logs")
BASELINES = extra("baselines")
EVALUATE = extra("evaluate")
DIGITS = extra("train")


def missing(error: ImportError) -> str | None:
    """Return one line on a package of an extra that is not installed; None for any other."""
    module = (error.name or "").partition(".")[0]
    name = _extra_of(module)
    return f"{module} is not installed; {extra(name)}" if name else None


def _extra_of(module: str) -> str | None:
    """Return the first of dipgo's extras that brings a module, which goes by its distribution's name."""
    try:
        requirements = metadata.requires("dipgo") or []
    except metadata.PackageNotFoundError:  # a source tree on the path
        return None
    for line in requirements:
        found = re.match(r"([\w.-]+).*\bextra == ['\"]([\w-]+)['\"]", line)
        if found and found[1].lower().replace("-", "_") == module:
            return found[2]
    return None
