"""The settings of a network's configuration that differ from its class's defaults."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any


def own_settings(kind: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what differs from the class's defaults, as JSON has it: a newer diffusers writes more for the same."""
    options = inspect.signature(kind.__init__).parameters
    defaults = {name: _plain(option.default) for name, option in options.items()}
    return {
        key: value
        for key, value in config.items()
        if not key.startswith("_") and not (key in defaults and defaults[key] == value)
    }


def _plain(value: Any) -> Any:
    """Return a default as JSON would give it back."""
    return list(value) if isinstance(value, tuple) else value
