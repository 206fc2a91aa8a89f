"""Models of the Hugging Face hub: first what says what a model is, then one variant of its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dipgo.base.errors import DipgoError, one_line

_SHARD = re.compile(r"-\d+-of-\d+")
_TEXTS = ["*.json", "*.txt", "*.model"]  # configurations, tokenizers


def is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/"))


def fetch_configurations(name: str) -> Path:
    """Download a model's configurations and tokenizers, a few megabytes, and return their folder.

    Raises:
        DipgoError: what the hub says: offline, not found, gated.
    """
    return _download(name, _TEXTS)


def fetch_weights(name: str, index: Mapping[str, Any], denoiser: str) -> Path:
    """Download the safetensors files that the pipeline loads, one variant of each component, and return the folder.

    Args:
        index: content of ``model_index.json``.
        denoiser: the component that decides on the variant: its plain files, or a variant where there are none.

    Raises:
        DipgoError: what the hub says.
    """
    from huggingface_hub import list_repo_files

    try:
        files = list_repo_files(name)
    except Exception:  # offline: what was downloaded before is all there is
        return _download(name, [*_TEXTS, "*/*.safetensors"])
    components = [component for component, entry in index.items() if isinstance(entry, list) and entry[0]]
    components += sorted({file.split("/")[0] for file in files if re.match(r"controlnet_\d+/", file)})  # of several
    components.sort(key=lambda component: component != denoiser)
    return _download(name, [*_TEXTS, *files_of_one_variant(files, components)])


def files_of_one_variant(files: Sequence[str], components: Sequence[str]) -> list[str]:
    """Return one variant's safetensors files of each component, as :func:`.safetensors_index.checkpoint_files` has it.

    Args:
        files: paths in the repository.
        components: the one that decides on the variant first.
    """
    chosen: list[str] = []
    variant = ""
    for component in components:
        whole: dict[str, list[str]] = {}  # shards by the name that they have together
        for file in files:
            if file.startswith(f"{component}/") and file.count("/") == 1 and file.endswith(".safetensors"):
                whole.setdefault(_SHARD.sub("", file), []).append(file)
        names = sorted(whole, key=lambda name: (_variant(name) != variant, len(name), name))
        if names:
            variant = variant if chosen else _variant(names[0])
            chosen += whole[names[0]]
    return chosen


def _variant(file: str) -> str:
    """Return ``.fp16`` of ``unet/model.fp16.safetensors``; empty where there is none."""
    return "".join(Path(Path(file).stem).suffixes)


def _download(name: str, patterns: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # each reason has a class of its own
        raise DipgoError(
            f"no model '{name}': not built in, not a folder, and the hub says: {one_line(error)}"
        ) from error
