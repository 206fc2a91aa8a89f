"""What does a denoiser's attention: diffusers' processors, which some pipelines replace while they run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any


def processors_of(denoiser: Any) -> dict[str, Any]:
    """Return what does a denoiser's attention, by module."""
    return {name: module.processor for name, module in denoiser.named_modules() if hasattr(module, "processor")}


@contextmanager
def attention_by(denoiser: Any, processors: Mapping[str, Any]) -> Iterator[None]:
    """Let others do the attention of some of a denoiser's modules within the context."""
    own = {name: denoiser.get_submodule(name).processor for name in processors}
    for name, each in processors.items():
        denoiser.get_submodule(name).processor = each
    try:
        yield
    finally:
        for name, each in own.items():
            denoiser.get_submodule(name).processor = each
