"""Models: find and load a diffusers pipeline by built-in name, folder or hub id, and fingerprint it.

Two kinds ship with the package: small trained models (``zoo``), and public architectures at their true sizes without
weights (``architectures``), for counting, for importing what others publish, and, with random weights, for speed.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dipgo.base.errors import DipgoError, UsageError
from dipgo.base.files import sha256_of_json, sha256_once
from dipgo.base.records import ModelIdentity, read_json, read_object
from dipgo.model.families import COMPONENTS, Family, family_for, latent_size
from dipgo.model.prompts import read_prompts
from dipgo.model.random_weights import randomise
from dipgo.model.safetensors_index import Stored, checkpoint_files, stored_tensors, variant_of

BUILT_IN = Path(__file__).parents[1] / "zoo"
ARCHITECTURES = Path(__file__).parents[1] / "architectures"
_LORA = "pytorch_lora_weights.safetensors"  # as save_lora_weights names it
_ADD_ONS = {"controlnet": "ControlNet", "adapter": "T2I-Adapter", "motion_adapter": "motion adapter"}


@dataclass(frozen=True)
class Model:
    """A diffusers pipeline folder whose denoiser dipgo knows; nothing heavy is loaded yet.

    Attributes:
        name: as the user gave it.
        folder: where it lies.
        family: how its denoiser is called.
        config: the denoiser's configuration.
        random_weights: draw the denoiser's weights, always the same, instead of reading them. For structure and speed:
            images are meaningless.
    """

    name: str
    folder: Path
    family: Family
    config: dict[str, Any]
    random_weights: bool = False

    @property
    def weights_files(self) -> list[Path]:
        """The safetensors files of the denoiser, in order of name; none for an architecture and random weights.

        One file, or the shards where diffusers would read these: an index stands beside them. Variants (``.fp16.``)
        beside the plain files are left out; a variant counts where there is nothing plain.
        """
        if self.random_weights:
            return []
        return checkpoint_files(self.folder / self.family.component, "diffusion_pytorch_model")

    @property
    def variant(self) -> str | None:
        """The variant that the denoiser's files are, such as ``fp16``; that of other components comes first then."""
        return variant_of(self.weights_files)

    def identity(self) -> ModelIdentity:
        """Return the fingerprints that tie a SubNet or bundle to this model.

        The configuration's is over what differs from the class's defaults: a newer diffusers writes more keys for the
        same model.
        """
        defaults = {name: option.default for name, option in self._options().items()}
        config = {
            key: value
            for key, value in self.config.items()
            if not key.startswith("_") and not (key in defaults and _plain(defaults[key]) == value)
        }
        digests = [sha256_once(path) for path in self.weights_files]
        weights = (digests[0] if len(digests) == 1 else sha256_of_json(digests)) if digests else None
        return ModelIdentity(
            name=self.name,
            class_name=self.family.denoiser_class,
            config_sha256=sha256_of_json(config),
            weights_sha256=weights,
        )

    def _options(self) -> Mapping[str, inspect.Parameter]:
        import diffusers

        return inspect.signature(getattr(diffusers, self.family.denoiser_class).__init__).parameters

    def labels(self) -> dict[str, int]:
        """Return the classes by name, where classes condition."""
        return self.family.labels(read_json(self.folder / "model_index.json", "model_index.json"), self.config)

    def prompts(self) -> list[str]:
        """Return the prompts of ``prompts.txt``, what the model was made for; none without that file.

        Searches draw from them where nobody gives others, and reports show images of some.
        """
        file = self.folder / "prompts.txt"
        return read_prompts(file) if self.family.conditioned_by == "prompt" and file.is_file() else []

    def latent_shape(self, batch: int) -> tuple[int, int, int, int]:
        """Return ``[batch, channels, height, width]`` of the latent."""
        return (batch, self.config["in_channels"], *latent_size(self.config))

    def require_weights(self) -> None:
        """Refuse an architecture without weights where random ones were not asked for."""
        if not self.weights_files and not self.random_weights:
            raise UsageError(
                f"'{self.name}' is an architecture without weights; give a folder or hub id that has them, or "
                "--random-weights where images do not matter"
            )

    def pipeline(self) -> Any:
        """Load the diffusers pipeline in float32 on the CPU, in evaluation mode, quiet.

        With random weights, what the folder does not hold is drawn (VAE) or left out (tokenizer, text encoder; see
        :meth:`dipgo.model.families.Family.conditions`).

        Raises:
            UsageError: an architecture without weights, and random ones were not asked for.
            DipgoError: a folder that diffusers cannot load.
        """
        from diffusers import DiffusionPipeline
        from diffusers.utils import logging

        self.require_weights()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        drawn = self._drawn_components() if self.random_weights else {}
        options = {"dtype": torch.float32, "variant": self.variant, "use_safetensors": True}
        try:
            pipe = DiffusionPipeline.from_pretrained(self.folder, local_files_only=True, **options, **drawn)
        except Exception as error:  # diffusers and safetensors raise many kinds for a damaged folder
            raise DipgoError(
                f"{self.folder}: cannot load it as a diffusers pipeline ({_one_line(error)}); download or save it again"
            ) from error
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                component.eval().requires_grad_(False)
        return pipe

    def _drawn_components(self) -> dict[str, nn.Module | None]:
        """Return the denoiser and the VAE with random weights, and None for each component that is not there."""
        import diffusers
        from accelerate import init_empty_weights

        index = read_json(self.folder / "model_index.json", "model_index.json")
        entries = {name: entry for name, entry in index.items() if isinstance(entry, list) and entry[1]}
        components: dict[str, nn.Module | None] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # for buffers that a constructor draws
            for name, (_, class_name) in sorted(entries.items()):
                part = self.folder / name
                if name == self.family.component or (name == "vae" and not list(part.glob("*.safetensors"))):
                    config = self.config if name == self.family.component else read_json(part / "config.json", name)
                    with init_empty_weights(include_buffers=False):
                        component = getattr(diffusers, class_name).from_config(config)
                    randomise(component)
                    components[name] = component
                elif not part.is_dir():
                    components[name] = None
        return components

    def empty_denoiser(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """Return the denoiser with its buffers but with weights that were never read or allocated, for tracing.

        Floating weights and buffers are in ``dtype``, as ``pipe.to(dtype)`` leaves them.
        """
        import diffusers
        from accelerate import init_empty_weights

        denoiser_class = getattr(diffusers, self.family.denoiser_class)
        with init_empty_weights(include_buffers=False):
            denoiser = denoiser_class.from_config(self.config)
        for module in denoiser.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                # Pages of a fresh allocation that nobody touches take no memory, and unlike the meta device it does
                # not clash with the buffers that the constructor computes.
                held = dtype if parameter.is_floating_point() else parameter.dtype
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=held), requires_grad=False))
            for name, buffer in list(module.named_buffers(recurse=False)):
                if buffer.is_floating_point() and dtype != torch.float32:
                    module._buffers[name] = buffer.to(dtype)
        return denoiser.eval()


def _plain(value: Any) -> Any:
    """Return a default as JSON would give it back."""
    return list(value) if isinstance(value, tuple) else value


def built_in() -> list[str]:
    """Return the names of the models that ship with the package."""
    return sorted(path.parent.name for path in BUILT_IN.glob("*/model_index.json"))


def architectures() -> list[str]:
    """Return the names of the architectures that ship with the package, without weights."""
    return sorted(path.parent.name for path in ARCHITECTURES.glob("*/model_index.json"))


def find_model(name: str, random_weights: bool = False) -> Model:
    """Find MODEL: a built-in name, a local diffusers folder, or a hub id (then downloaded through huggingface_hub).

    An architecture is found too: all works on it that needs no weights; with ``random_weights`` the rest as well.
    A checkpoint may lie in shards; of variants beside each other (``.fp16.``) the one without a suffix is taken (see
    :attr:`Model.weights_files`).

    Raises:
        DipgoError: no such model, or a folder that is incomplete or damaged.
        UsageError: a denoiser that takes more than a latent and conditions, or conditions that cannot be guessed; an
            add-on (ControlNet, IP-Adapter, LoRA that is not fused).
    """
    folder = _locate(name)
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise DipgoError(f"{folder}: no model_index.json in it; give a folder saved by a pipeline's save_pretrained")
    index = read_object(index_file, "model_index.json")
    component = next((name for name in COMPONENTS if component_class(index, name)[0] == "diffusers"), None)
    if component is None:
        raise DipgoError(f"{index_file}: {index.get('_class_name')} has no {' or '.join(COMPONENTS)} of diffusers")
    config_file, class_name = folder / component / "config.json", component_class(index, component)[1]
    config = read_object(config_file, "model configuration")
    _check_add_ons(index_file, index, config)
    try:
        family = family_for(class_name, component, config, str(index.get("_class_name")))
        _check_latent(index_file, config)
        family.example(config, 1)  # refuses what cannot be conditioned
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise DipgoError(
            f"{config_file}: not a configuration of {class_name} ({type(error).__name__}: {_one_line(error)}); "
            "download or save the pipeline again"
        ) from error
    model = Model(name, folder, family, config, random_weights)
    if not model.weights_files and not random_weights and folder.parent != ARCHITECTURES:
        raise DipgoError(f"{folder / family.component}: no safetensors weights in it; download or save it again")
    _check_lora(folder, stored_tensors(model.weights_files))
    return model


def component_class(index: Mapping[str, Any], name: str) -> tuple[str, str]:
    """Return the library and the class of a component as ``model_index.json`` has them; empty where there is none."""
    entry = index.get(name)
    if isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry):
        return entry[0], entry[1]
    return "", ""


def _check_add_ons(index_file: Path, index: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Refuse what changes a denoiser from outside: a trace would leave it out without a word."""
    for entry, what in _ADD_ONS.items():
        if component_class(index, entry)[0]:
            raise UsageError(f"{index_file}: has a {what}, which is not supported; save the pipeline without it")
    if config.get("encoder_hid_dim_type") == "ip_image_proj":
        raise UsageError(f"{index_file}: has an IP-Adapter, which is not supported; unload it and save again")


def _check_lora(folder: Path, tensors: Mapping[str, Stored]) -> None:
    """Refuse a LoRA that is not fused: among the weights, or in diffusers' file for it, which no pipeline loads."""
    beside = folder / _LORA
    if beside.is_file():
        raise UsageError(
            f"{beside}: a LoRA that is not fused; call load_lora_weights() and fuse_lora() on the pipeline and save it "
            "elsewhere, or move the file away"
        )
    adapted = next((name for name in tensors if "lora_" in name or ".base_layer." in name), None)
    if adapted:
        raise UsageError(
            f"{tensors[adapted].file}: holds LoRA weights that are not fused ('{adapted[:60]}'); call fuse_lora() and "
            "unload_lora_weights() on the pipeline and save again"
        )


def _check_latent(index_file: Path, config: dict[str, Any]) -> None:
    """Refuse a denoiser that is not a map from a latent ``[B, C, H, W]`` of known size to ε of the same size."""
    given, made = config.get("in_channels"), config.get("out_channels")
    if config.get("sample_size") is None or given is None:
        raise UsageError(
            f"{index_file}: the denoiser's configuration gives no sample_size or in_channels; not supported"
        )
    if made is not None and made < given:
        raise UsageError(
            f"{index_file}: the denoiser takes {given} channels and makes {made} (inpainting, depth, upscaling); only "
            "text, class and unconditional generation are supported"
        )


def _locate(name: str) -> Path:
    if name in built_in():
        return BUILT_IN / name
    if name in architectures():
        return ARCHITECTURES / name
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise DipgoError(f"no model '{name}': neither built in ({_shipped()}) nor a folder")
    from huggingface_hub import snapshot_download

    # Single-file checkpoints at the top hold the same weights again.
    patterns = ["*.json", "*.txt", "*.model", "*/*.safetensors", _LORA]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=["*.non_ema*"]))
    except Exception as error:  # offline, not found, gated: each has a class of its own
        raise DipgoError(
            f"no model '{name}': not built in ({_shipped()}), not a folder, and the hub says: {_one_line(error)}"
        ) from error


def _shipped() -> str:
    return ", ".join([*built_in(), *architectures()])


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:160] or type(error).__name__
