"""A diffusers pipeline in a folder: its identity, its components, and its denoiser without weights."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from torch import nn

from dipgo.base.errors import DipgoError, UsageError, one_line
from dipgo.base.files import sha256_of_json, sha256_once
from dipgo.base.records import ModelIdentity, read_json, read_object
from dipgo.base.safetensors_index import Stored, checkpoint_files, stored_tensors, variant_of
from dipgo.model.checks import component_class, refuse_pickled
from dipgo.model.empty import empty_module
from dipgo.model.families import Family, remember
from dipgo.model.families.controlnet import NETS, folders_of_nets, with_nets
from dipgo.model.prompts import read_prompts
from dipgo.model.random_weights import randomise
from dipgo.model.sampler import SchedulerConfig, make_scheduler
from dipgo.model.settings import own_settings


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
        return [file for files in self._parts.values() for file in files]

    @property
    def tensors(self) -> dict[str, Stored]:
        """Where the denoiser's tensors lie, by their names in it; those of ControlNets among them."""
        parts = self._parts.items()
        return {prefix + name: each for prefix, files in parts for name, each in stored_tensors(files).items()}

    @property
    def _parts(self) -> dict[str, list[Path]]:
        """The denoiser's files, and those of ControlNets, by what stands before the names in them."""
        if self.random_weights:
            return {}
        stem = "diffusion_pytorch_model"
        own = checkpoint_files(self.folder / self.family.component, stem)
        nets = folders_of_nets(len(self.config.get(NETS, ())))
        variant = variant_of(own)
        return {"": own} | {each: checkpoint_files(self.folder / name, stem, variant) for each, name in nets.items()}

    @property
    def variant(self) -> str | None:
        """The variant that the denoiser's files are, such as ``fp16``; that of other components comes first then."""
        return variant_of(self.weights_files)

    def identity(self) -> ModelIdentity:
        """Return the fingerprints that tie a SubNet or bundle to this model."""
        import diffusers

        digests = [sha256_once(path) for path in self.weights_files]
        weights = (digests[0] if len(digests) == 1 else sha256_of_json(digests)) if digests else None
        return ModelIdentity(
            name=self.name,
            class_name=self.family.denoiser_class,
            config_sha256=config_sha256(getattr(diffusers, self.family.denoiser_class), self.config),
            weights_sha256=weights,
        )

    @property
    def scheduler(self) -> SchedulerConfig:
        """The pipeline's own scheduler."""
        index = read_json(self.folder / "model_index.json", "model_index.json")
        config = read_object(self.folder / "scheduler" / "scheduler_config.json", "scheduler configuration")
        return SchedulerConfig(component_class(index, "scheduler")[1] or str(config.get("_class_name")), config)

    @property
    def default_guidance(self) -> float:
        """The guidance scale of the pipeline where its call names none; 1, no guidance, where it has none."""
        import diffusers

        if self.family.scale is not None:
            return self.family.scale
        index = read_json(self.folder / "model_index.json", "model_index.json")
        pipeline = getattr(diffusers, str(index.get("_class_name")), None)
        option = inspect.signature(pipeline.__call__).parameters.get("guidance_scale") if pipeline else None
        return float(option.default) if option else 1.0

    def labels(self) -> dict[str, int]:
        """Return the classes by name, where classes condition."""
        return self.family.labels(read_json(self.folder / "model_index.json", "model_index.json"), self.config)

    def prompts(self) -> list[str]:
        """Return the prompts of ``prompts.txt``, what the model was made for; none without that file.

        Searches draw from them where nobody gives others, and reports show images of some.
        """
        file = self.folder / "prompts.txt"
        return read_prompts(file) if self.family.conditioned_by == "prompt" and file.is_file() else []

    def latent_shape(self, batch: int) -> tuple[int, ...]:
        """Return the latent's shape: ``[batch, channels, height, width]``, or as the pipeline packs it."""
        return (batch, *self.family.latent(self.config))

    def at(self, guidance: float, pixels: tuple[int, int] | None = None) -> Model:
        """Return the model as its pipeline uses it at a guidance scale and a size of images in pixels."""
        return replace(self, family=self.family.at(guidance, pixels))

    def require_weights(self) -> None:
        """Refuse an architecture without weights where random ones were not asked for."""
        if not self.weights_files and not self.random_weights:
            raise UsageError(
                f"'{self.name}' is an architecture without weights; give a folder or hub id that has them, or "
                "--random-weights where images do not matter"
            )

    def pipeline(self, denoiser: nn.Module | None = None) -> Any:
        """Load the diffusers pipeline in float32 on the CPU, in evaluation mode, quiet.

        With random weights, what the folder does not hold is drawn (VAE) or left out (tokenizer, text encoder; see
        :meth:`dipgo.model.families.Family.conditions`). ``denoiser`` takes the place of the folder's own.

        Raises:
            UsageError: an architecture without weights, and random ones were not asked for.
            DipgoError: a folder that diffusers cannot load.
        """
        from diffusers import DiffusionPipeline
        from diffusers.utils import logging
        from transformers.utils import logging as transformers_logging

        self.require_weights()
        scheduler = self._scheduler()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()
        own: dict[str, Any] = {"scheduler": scheduler}
        if self.random_weights:
            own |= self._drawn_components()
        else:
            refuse_pickled(self.folder)
        if denoiser is not None:
            own[self.family.component] = denoiser
        options = {"dtype": torch.float32, "variant": self.variant, "use_safetensors": True}
        try:
            with self._of_its_class(scheduler):
                pipe = DiffusionPipeline.from_pretrained(self.folder, local_files_only=True, **options, **own)
        except Exception as error:  # diffusers and safetensors raise many kinds for a damaged folder
            raise DipgoError(
                f"{self.folder}: cannot load it as a diffusers pipeline ({one_line(error)}); download or save it again"
            ) from error
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                component.eval().requires_grad_(False)
        remember(pipe, self.family)
        return pipe

    def _scheduler(self) -> Any:
        """Return the pipeline's scheduler; where a package for it is missing DDIM, in whose place another is set."""
        try:
            return make_scheduler(None, self.scheduler)
        except UsageError:
            return make_scheduler("ddim", self.scheduler)

    def _of_its_class(self, scheduler: Any) -> AbstractContextManager[Any]:
        """Return a context in which diffusers takes a scheduler for one of the folder's class, if that needs a package.

        It looks at classes, and what stands for one whose package is missing is none.
        """
        import diffusers

        name = self.scheduler.class_name
        if type(scheduler).__name__ == name or not hasattr(diffusers, name):
            return nullcontext()
        return mock.patch.object(diffusers, name, type(scheduler))

    def _drawn_components(self) -> dict[str, nn.Module | None]:
        """Return the networks that the folder has no weights of with random ones, and None for what is not there.

        Text encoders draw their own, and are small: those of an architecture have its widths alone.
        """
        import diffusers
        import transformers
        from accelerate import init_empty_weights

        index = read_json(self.folder / "model_index.json", "model_index.json")
        entries = {name: entry for name, entry in index.items() if isinstance(entry, list) and entry[1]}
        components: dict[str, nn.Module | None] = {}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # for buffers that a constructor draws
            for name, (library, class_name) in sorted(entries.items()):
                part = self.folder / name
                encodes = library == "transformers" and (part / "config.json").is_file()
                if encodes and not list(part.glob("*.safetensors")):
                    kind = getattr(transformers, class_name)
                    components[name] = kind(kind.config_class.from_pretrained(part, local_files_only=True))
                elif name == self.family.component or (name == "vae" and not list(part.glob("*.safetensors"))):
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

        config, nets = {name: value for name, value in self.config.items() if name != NETS}, self.config.get(NETS, ())
        denoiser = empty_module(getattr(diffusers, self.family.denoiser_class), config, lambda name: dtype)
        if nets:
            made = [empty_module(diffusers.ControlNetModel, each, lambda name: dtype) for each in nets]
            denoiser = with_nets(denoiser, made[0] if len(made) == 1 else diffusers.MultiControlNetModel(made).eval())
        for module in denoiser.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                if buffer.is_floating_point() and dtype != torch.float32:
                    module._buffers[name] = buffer.to(dtype)
        return cast(nn.Module, denoiser)


def config_sha256(denoiser_class: Any, config: Mapping[str, Any]) -> str:
    """Return the fingerprint of a denoiser's configuration as JSON has it, of what is not the class's default."""
    return sha256_of_json(own_settings(denoiser_class, config))
