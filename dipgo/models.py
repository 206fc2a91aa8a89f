"""Models: find and load a diffusers pipeline by built-in name, folder or hub id, and fingerprint it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dipgo.errors import DipgoError
from dipgo.families import FAMILIES, Family
from dipgo.files import sha256_of, sha256_of_json
from dipgo.records import ModelIdentity, read_json

BUILT_IN = Path(__file__).parent / "zoo"


@dataclass(frozen=True)
class Model:
    """A diffusers pipeline folder whose denoiser dipgo knows; nothing heavy is loaded yet.

    Attributes:
        name: as the user gave it.
        folder: where it lies.
        family: how its denoiser is called.
        config: the denoiser's configuration.
    """

    name: str
    folder: Path
    family: Family
    config: dict[str, Any]

    @property
    def weights_files(self) -> list[Path]:
        """The safetensors files of the denoiser, in order of name."""
        return sorted((self.folder / self.family.component).glob("diffusion_pytorch_model*.safetensors"))

    def identity(self) -> ModelIdentity:
        """Return the fingerprints that tie a SubNet or bundle to this model."""
        config = {key: value for key, value in self.config.items() if not key.startswith("_")}
        digests = [sha256_of(path) for path in self.weights_files]
        return ModelIdentity(
            name=self.name,
            class_name=self.family.denoiser_class,
            config_sha256=sha256_of_json(config),
            weights_sha256=digests[0] if len(digests) == 1 else sha256_of_json(digests),
        )

    def latent_shape(self, batch: int) -> tuple[int, int, int, int]:
        """Return ``[batch, channels, height, width]`` of the latent."""
        size = self.config["sample_size"]
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return (batch, self.config["in_channels"], height, width)

    def pipeline(self) -> Any:
        """Load the diffusers pipeline in float32 on the CPU, in evaluation mode, quiet."""
        from diffusers import DiffusionPipeline
        from diffusers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            pipe = DiffusionPipeline.from_pretrained(self.folder, local_files_only=True)
        except Exception as error:  # diffusers and safetensors raise many kinds for a damaged folder
            raise DipgoError(
                f"{self.folder}: cannot load it as a diffusers pipeline ({_one_line(error)}); download or save it again"
            ) from error
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                component.eval().requires_grad_(False)
        return pipe

    def empty_denoiser(self) -> nn.Module:
        """Return the denoiser with its buffers but with weights that were never read or allocated, for tracing."""
        import diffusers
        from accelerate import init_empty_weights

        denoiser_class = getattr(diffusers, self.family.denoiser_class)
        with init_empty_weights(include_buffers=False):
            denoiser = denoiser_class.from_config(self.config)
        for module in denoiser.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                # Pages of a fresh allocation that nobody touches take no memory, and unlike the meta device it does
                # not clash with the buffers that the constructor computes.
                blank = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=False)
                setattr(module, name, blank)
        return denoiser.eval()


def built_in() -> list[str]:
    """Return the names of the models that ship with the package."""
    return sorted(path.parent.name for path in BUILT_IN.glob("*/model_index.json"))


def find_model(name: str) -> Model:
    """Find MODEL: a built-in name, a local diffusers folder, or a hub id (then downloaded through huggingface_hub).

    Raises:
        DipgoError: no such model, a folder that is incomplete, or a denoiser of no supported class.
    """
    folder = _locate(name)
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise DipgoError(f"{folder}: no model_index.json in it; give a folder saved by a pipeline's save_pretrained")
    index = read_json(index_file, "model_index.json")
    for family in FAMILIES:
        if index.get(family.component, [None, None])[1] == family.denoiser_class:
            break
    else:
        known = ", ".join(family.denoiser_class for family in FAMILIES)
        raise DipgoError(f"{index_file}: {index.get('_class_name')} has no denoiser dipgo supports ({known})")
    config = read_json(folder / family.component / "config.json", "model configuration")
    model = Model(name, folder, family, config)
    if not model.weights_files:
        raise DipgoError(f"{folder / family.component}: no safetensors weights in it; download or save it again")
    for path in model.weights_files:
        check_safetensors(path)
    return model


def check_safetensors(path: Path) -> None:
    """Check that a safetensors file is whole: a readable header whose tensors fill the file exactly."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise DipgoError(f"{path}: truncated or damaged ({_one_line(error)}); download or save it again") from error


def _locate(name: str) -> Path:
    if name in built_in():
        return BUILT_IN / name
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise DipgoError(f"no model '{name}': neither built in ({', '.join(built_in())}) nor a folder")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.model", "*.safetensors"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # offline, not found, gated: each has a class of its own
        raise DipgoError(
            f"no model '{name}': not built in ({', '.join(built_in())}), not a folder, and the hub says: "
            f"{_one_line(error)}"
        ) from error


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:160] or type(error).__name__
