"""A bundle as a drop-in for the diffusers pipeline that it came from. Free of torch, unless the caller brings it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from dipgo.base.errors import UsageError
from engines.backends import DEFAULT, runner_for
from engines.finite import check_input
from engines.guidance import Guidance
from engines.hub import found
from engines.later import LaterWalk, Origin
from engines.pipeline.adapters import AdapterMethods
from engines.pipeline.arguments import CHECKS, check_arguments
from engines.pipeline.callback import TENSORS, Callback, StepCallback
from engines.pipeline.conditions import EMBEDDINGS, conditions_of, for_each, guidance_of, without_negative
from engines.pipeline.control import control_conditions, nets_of, size_of
from engines.pipeline.formats import FORMATS, Output, as_format, draw_noise, is_torch, source_of, to_array, to_tensor
from engines.pipeline.interrupt import Calls
from engines.pipeline.likeness import COMPONENTS
from engines.pipeline.pictures import (
    check_pictures,
    mask_of_pictures,
    origin_of,
    pixels_of_pictures,
    size_for,
    strength_of,
)
from engines.program import Program
from engines.sizes import batches_of, latent_shape_of
from engines.steps import Steps, Walk, rows_of
from export.bundle import open_bundle
from export.records.bundle import BundleRecord

_ARGUMENTS = {*CHECKS, "image", *(argument for pair in EMBEDDINGS.values() for argument in pair)}


class Pipeline(AdapterMethods):
    """A program that is called like a diffusers pipeline.

    The engines are opened by the first call, or on entering the pipeline as a context. Several threads may call one
    pipeline. ``_interrupt = True`` ends a call after its step, as in diffusers (see :mod:`engines.pipeline.interrupt`).
    """

    _callback_tensor_inputs = TENSORS

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self._bar: dict[str, Any] = {}
        self._call = threading.local()  # the guidance of the call under way in this thread
        self._calls = Calls()
        self._lock = threading.Lock()
        self._is_open = False

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; a call's own of diffusers (``_guidance_scale``, …) as the argument, components not at all.

        Raises:
            UsageError: a bundle's cannot change.
        """
        if name in COMPONENTS:
            raise UsageError(f"{name} is compiled into the bundle and cannot be set; export a bundle of the new one")
        if name in ("_guidance_scale", "_guidance_rescale"):
            self._check_unchanged(name[1:], value)
        elif name.startswith("_"):
            check_arguments(self.record, {name[1:]: value})
        super().__setattr__(name, value)

    def __enter__(self) -> Pipeline:
        with self._lock:
            if not self._is_open:
                super().__enter__()
                self._is_open = True
        return self

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._is_open = False
            super().__exit__()

    def __call__(  # noqa: PLR0913 - as diffusers' pipelines are called
        self,
        prompt: Any = None,
        *,
        class_labels: Any = None,
        prompt_2: Any = None,
        negative_prompt_2: Any = None,
        prompt_3: Any = None,
        negative_prompt_3: Any = None,
        image: Any = None,
        mask_image: Any = None,
        strength: float | None = None,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 1,
        num_images_per_prompt: int = 1,
        num_inference_steps: int | None = None,
        budget: float | None = None,
        generator: Any = None,
        latents: Any = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = TENSORS,
        **arguments: Any,
    ) -> Any:
        """Generate images: those of the diffusers pipeline under the bundle's gates, from the same generator.

        Latents that are handed out are torch tensors where ``generator`` or ``latents`` is torch's, else arrays.

        Args:
            prompt: one or a list, for a bundle of prompts; else classes, as the pipelines' first argument is.
            class_labels: one or a list of numbers.
            prompt_2, negative_prompt_2: for the second text encoder, where there is one; None is the same as the first.
            prompt_3, negative_prompt_3: for the third.
            image: the picture that images start from, one or a list, for all in turn; with a ControlNet its own.
            mask_image: white where the picture is to be made anew.
            strength: the share of the steps that are done; None is the diffusers pipeline's own. With 1 the picture
                counts by its colours alone, or, with a mask, outside of it.
            height, width: of the images in pixels; None is :attr:`size`, or the picture's, as in diffusers.
            batch_size: how many images, where nothing conditions.
            num_images_per_prompt: images of each prompt, class or embedding.
            num_inference_steps, budget: which of the bundle's programs, see :meth:`~engines.program.Program.at`.
            generator: a seed, a ``torch.Generator``, or a list of either, one an image; None for a random seed.
            latents: initial noise ``[n, C, H, W]`` in the generator's place.
            output_type: ``pil``, ``np``, ``pt`` or ``latent``.
            return_dict: whether to return :class:`Output`, or a tuple.
            callback_on_step_end: called with the pipeline, the step, its timestep and ``{"latents": …}`` after every
                step. It may stop the call, but not change it: a program's solver is compiled too.
            callback_on_step_end_tensor_inputs: ``latents`` or nothing.
            **arguments: of other diffusers pipelines. Guidance, embeddings, ``clip_skip``, SDXL's sizes and crops, and
                what a ControlNet is given count; all others must be the bundle's own.

        Raises:
            UsageError: another step count, budget, size, … than the bundle's, naming both; or bad input.
            TypeError: an argument that no diffusers pipeline of this kind takes.
        """
        program = self.at(num_inference_steps, budget)
        controlled = nets_of(program.record) > 0
        if controlled:  # the picture is the ControlNet's
            arguments["image"], image = image, None
        self._check(program.record, arguments, output_type)
        check_pictures(program, image, mask_image, strength, latents)
        if prompt is not None and class_labels is not None:
            raise UsageError("both prompt and class_labels are given; give one of them")
        convert = to_tensor if is_torch(generator) or is_torch(latents) else np.asarray
        callback = None
        if callback_on_step_end:
            tensors = getattr(callback_on_step_end, "tensor_inputs", None) or callback_on_step_end_tensor_inputs
            callback = StepCallback(callback_on_step_end, self, tensors, convert)
        subjects = for_each(self, prompt, (prompt_2, prompt_3), "prompt") if class_labels is None else class_labels
        negative = arguments.get("negative_prompt")
        arguments["negative_prompt"] = for_each(
            self, negative, (negative_prompt_2, negative_prompt_3), "negative_prompt"
        )
        guidance = guidance_of(program.record, arguments)
        if program.under(guidance) is not program:
            program, arguments = program.under(guidance), without_negative(arguments)
        with self._calls.one() as call, self._asked(guidance):
            if controlled:
                size = size_of(program, arguments, height, width)
            else:
                size = size_for(program, image, mask_image, height, width)
            self.latent_shape(1, size)  # refuses others
            pictures = None if image is None else 2 * pixels_of_pictures(image, size) - 1
            masks = None if mask_image is None else mask_of_pictures(mask_image, size)
            self.__enter__()
            repeats = num_images_per_prompt
            images = repeats, batch_size
            count, conditions = conditions_of(program, subjects, images, size, arguments, guidance)
            conditions |= control_conditions(program, arguments, count // repeats, repeats, size)
            begin: np.ndarray | Origin
            if pictures is None:
                begin = _noise(program, self.latent_shape(count, size), generator, latents)
            else:
                draw, apart = source_of(generator, count), isinstance(generator, list | tuple) and len(generator) > 1
                chosen = strength_of(program, mask_image, strength)
                begin = origin_of(program, draw, pictures, masks, count, chosen, apart)

            def observe(walk: Walk | LaterWalk) -> bool:
                if callback:
                    callback(walk)
                return not call.interrupted

            final = self._integrate(program, begin, count, conditions, observe, together=callback is not None)
            made = convert(final) if output_type == "latent" else as_format(self._pixels(final), output_type)
        return Output(made) if return_dict else (made,)

    def set_progress_bar_config(self, **options: Any) -> None:
        """Set tqdm's options for the bar over steps: ``disable=True`` for none."""
        self._bar = options

    def close(self) -> None:
        """Drop the engines; the next call opens them again."""
        self.__exit__()

    @property
    def guidance_scale(self) -> float:
        """Of the call under way, else what calls get by default."""
        return self._guidance("guidance_scale")

    @contextmanager
    def _asked(self, guidance: Guidance) -> Iterator[None]:
        self._call.guidance = guidance
        try:
            yield
        finally:
            self._call.guidance = Guidance()

    def _guidance(self, name: str) -> float:
        asked = getattr(getattr(self._call, "guidance", Guidance()), name.removeprefix("guidance_"))
        own: float = getattr(self.record.sampler, name)
        return own if asked is None else asked

    def _check_unchanged(self, name: str, value: float) -> None:
        """Refuse what diffusers' own callbacks do: to change guidance while a call is under way."""
        mine = self._guidance(name)
        if not abs(value - mine) <= 1e-6:
            raise UsageError(f"{name} = {value}, the call began with {mine}; it cannot change on the way")

    @property
    def _interrupt(self) -> bool:
        return self._calls.interrupted

    @_interrupt.setter
    def _interrupt(self, value: bool) -> None:
        self._calls.interrupt(value)

    def _check(self, record: BundleRecord, arguments: Mapping[str, Any], output_type: str) -> None:
        unknown = next((name for name in arguments if name not in _ARGUMENTS), None)
        if unknown:
            raise TypeError(f"Pipeline.__call__() got an unexpected keyword argument '{unknown}'")
        check_arguments(record, arguments)
        if output_type not in FORMATS:
            raise UsageError(f"unknown output_type '{output_type}'; use {', '.join(FORMATS)}")
        if output_type != "latent" and self.record.decoder is None and not self.makes_pixels:
            raise UsageError(f"{self.bundle.folder}: holds no VAE decoder; ask for output_type='latent'")

    def _integrate(
        self,
        program: Program,
        begin: np.ndarray | Origin,
        count: int,
        conditions: Mapping[str, np.ndarray],
        observe: Callable[[Walk | LaterWalk], bool],
        together: bool,
    ) -> np.ndarray:
        """Run the trajectories of all images, batch by batch or ``together``, until ``observe`` says to stop.

        They begin with noise, or where an origin says.
        """
        size = count if together else self.batch
        calls, parts, going = len(program.record.steps), [], True
        first = begin.step if isinstance(begin, Origin) else 0
        with tqdm(total=(calls - first) * -(-count // size), **self._bar) as bar:
            for start in range(0, count, size):
                images = np.arange(start, min(start + size, count))
                rows = rows_of(conditions, images, count)
                own = begin.of(images) if isinstance(begin, Origin) else begin[images]
                shape = own.latent.shape if isinstance(own, Origin) else latent_shape_of(program.record, own.shape)
                with Steps(program.contexts, shape, rows) as steps:
                    walk = LaterWalk(steps, own) if isinstance(own, Origin) else Walk(steps, own)
                    if isinstance(walk, Walk) and steps.can_replay and not together and going:
                        walk.finish()
                        bar.update(calls)
                        going = observe(walk)
                    while going and walk.step < calls:
                        walk.advance()
                        bar.update()
                        going = observe(walk)
                    parts.append(walk.latent)
        return np.concatenate(parts)

    def _pixels(self, latent: np.ndarray) -> np.ndarray:
        """Return pixels ``[n, channels, height, width]`` in [0, 1] of latents."""
        batches = batches_of(self.record, len(latent))
        return np.concatenate([self.decode(latent[rows]) for rows in batches])[: len(latent)]


def _noise(program: Program, shape: tuple[int, ...], generator: Any, latents: Any) -> np.ndarray:
    if latents is not None:
        latents = check_input(to_array(latents), "latents").astype(np.float32, copy=False)
        if latents.shape != shape:
            raise UsageError(f"latents are {list(latents.shape)}, this call is for {list(shape)}")
    return draw_noise(shape, generator, program.record.noise, program.record.solver.draws, latents)


def load(folder: str | Path, threads: int | None = None, backend: str = DEFAULT, device: str | None = None) -> Pipeline:
    """Open a bundle, check its files, and return its pipeline; the engines are loaded on entering or calling it.

    Args:
        folder: the bundle, or the hub id of one, which is downloaded.
        threads: for backends on the CPU; None leaves the choice to them.
        backend: see :data:`engines.backends.BACKENDS`, or ``cuda`` for the best on a GPU.
        device: ``cpu``, ``cuda`` or ``cuda:1``; None is the backend's own choice.

    Raises:
        UsageError: an unknown backend or device, or a device that the backend does not run on.
        DipgoError: a damaged bundle, or a backend that cannot run here.
    """
    bundle = open_bundle(found(folder))
    return Pipeline(bundle, runner_for(bundle, backend, threads, device))
