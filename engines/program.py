"""The program of a bundle, executed: noise and conditions to latents and images. Backend-agnostic, torch-free."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from dipgo.base.control import PICTURE, STRENGTH, drawings
from dipgo.base.dtypes import Dtype
from dipgo.base.errors import UsageError
from engines.backend import Runner
from engines.classes import class_of, class_rows
from engines.context_pool import ContextPool
from engines.finite import check_finite
from engines.guidance import Guidance, fixed_conditions, is_off
from engines.pipeline.formats import draw_noise
from engines.pipeline.text import Each, Text, TextEncoder
from engines.sizes import axes_of, batch_of, batches_of, image_shape, latent_shape_of
from engines.steps import Steps, Walk
from export.axes import shape_at, sizes_at, values_at
from export.bundle import Bundle
from export.records.bundle import DecoderRecord

NEAR = 0.03  # between the budget that is asked for and a program's
AfterStep = Callable[[int, np.ndarray], None]


class Program:
    """A bundle ready to run; a context manager that holds its engines.

    Attributes:
        bundle, record: as if it held this program alone.
        contexts: what trajectories run in, each in one of its own.
        further: other programs of the bundle, on the same runner; see :meth:`at`.
        adapted: the program with low-rank branches; None where requests bring no LoRAs.
        unguided: the program with the conditional pass alone; None where the bundle has none. See :meth:`under`.
    """

    def __init__(self, bundle: Bundle, runner: Runner, text: TextEncoder | None = None) -> None:
        self.bundle, *others = bundle.programs
        self.record, self.runner = self.bundle.record, runner
        encoder = self.record.conditioning.encoder
        self._text = text or (TextEncoder(encoder, bundle.folder, runner.run) if encoder else None)
        self.contexts = ContextPool(self.bundle, runner)
        adapted = self.bundle.adapted
        self.adapted = Program(adapted, runner, self._text) if adapted else None
        alone = self.bundle.unguided
        self.unguided = Program(alone, runner, self._text) if alone else None
        self.further = tuple(Program(other, runner, self._text) for other in others)

    def __enter__(self) -> Program:
        self.runner.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        for program in self.programs:
            for each in (program, program.adapted, program.unguided):
                if each:
                    each.contexts.clear()
        self.runner.__exit__()

    def at(self, steps: int | None = None, budget: float | None = None) -> Program:
        """Return the program of so many steps and of a budget, a share of the full trajectory's MACs.

        None leaves it to the bundle: its first program's steps where that leaves a choice, then its order.

        Raises:
            UsageError: the bundle holds no such program; the line says which it holds.
        """
        fitting = [program for program in self.programs if steps in (None, program.steps)]
        if budget is not None:
            fitting = [each for each in fitting if abs(each.record.budget - budget) <= NEAR]
            fitting.sort(key=lambda each: abs(each.record.budget - budget))
        if not fitting:
            asked = [f"num_inference_steps = {steps}"] if steps is not None else []
            asked += [f"budget = {budget:g}"] if budget is not None else []
            own = f"was compiled for {self.steps}; ask for that"
            if self.further or budget is not None:
                own = f"holds {self.choices}; ask for one of these"
            raise UsageError(f"{' and '.join(asked)}, the bundle {own}, or export another bundle")
        return next((program for program in fitting if program.steps == self.steps), fitting[0])

    def under(self, guidance: Guidance) -> Program:
        """Return the program that a request's guidance needs: of one pass where it is off and there is such a one."""
        return self.unguided if self.unguided and is_off(self.record, guidance) else self

    def with_matrices(self, matrices: Mapping[str, np.ndarray]) -> Program:
        """Return the program with low-rank branches, and these as their matrices, by graph input."""
        assert self.adapted is not None
        program = copy.copy(self.adapted)
        program.contexts = self.adapted.contexts.adapted(matrices)
        return program

    @property
    def programs(self) -> tuple[Program, ...]:
        """All programs of the bundle, this one first."""
        return (self, *self.further)

    @property
    def steps(self) -> int:
        """What a diffusers pipeline is asked for: not its calls of the denoiser, of which some solvers make more."""
        return self.record.sampler.steps

    @property
    def choices(self) -> str:
        """The programs as a line."""
        return ", ".join(f"{each.steps} steps at {each.record.budget:.1%} of the MACs" for each in self.programs)

    @property
    def batch(self) -> int:
        """The most images that a call of :meth:`denoise` takes; where the batch is no axis, the only number."""
        return batch_of(self.record)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of images in pixels, where a request names none."""
        if self.record.pixels:
            return self.record.pixels
        height, width = shape_at(self.record.latent.shape, values_at(self.record.axes, "opt"))[-2:]
        return height * self.record.cell, width * self.record.cell

    def latent_shape(self, count: int, size: tuple[int, int] | None = None) -> tuple[int, ...]:
        """Return the shape of ``count`` latents for images of a height and width in pixels; None is :attr:`size`.

        Raises:
            UsageError: a size that the bundle does not take.
        """
        return count, *image_shape(self.record, size or self.size, str(self.bundle.folder))

    def noise(self, count: int, seed: int, size: tuple[int, int] | None = None) -> np.ndarray:
        """Return noise, the same that diffusers draws from this seed on the CPU.

        It is ``[count, C, H, W]``; with a sampler that draws noise on its way ``[count, 1 + draws, C, H, W]``, the
        initial one first. ``size`` is height and width of the images in pixels; None is :attr:`size`.

        Raises:
            UsageError: a seed that torch's noise cannot be rebuilt from, or a size that the bundle does not take.
        """
        return draw_noise(self.latent_shape(count, size), seed, self.record.noise, self.record.solver.draws)

    def class_of(self, label: str) -> int:
        """Return the class that ``label`` names, by its name or its number.

        Raises:
            UsageError: the model has no such class.
        """
        return class_of(self.record, label)

    def conditions(
        self,
        subjects: Sequence[int] | Sequence[Text],
        negative: Text | None = None,
        size: tuple[int, int] | None = None,
        clip_skip: int = 0,
        guidance: Guidance = Guidance(),
    ) -> dict[str, np.ndarray]:
        """Return the graph inputs for one batch of subjects: classes or prompts.

        ``negative`` is a prompt to stay away from; None is the pipeline's own way without one. ``size`` is height and
        width of the images in pixels; None is :attr:`size`. A prompt may be one for each text encoder;
        ``clip_skip`` leaves out the last layers of the encoders.

        Raises:
            UsageError: classes for a model of prompts or the reverse, a class that the model lacks, a size or guidance
                that the bundle does not take, or a negative prompt without guidance.
        """
        conditioning, folder = self.record.conditioning, self.bundle.folder
        self.check_negative(negative)
        if conditioning.kind == "nothing":
            return {}
        if conditioning.kind == "class":
            if not all(isinstance(label, int | np.integer) for label in subjects):
                raise UsageError(f"{folder}: conditioned by classes, not by prompts; give --class")
            rows = {conditioning.inputs[0].name: class_rows(self.record, subjects)}
            return rows | fixed_conditions(self.record, (1 + conditioning.guided) * len(subjects), guidance)
        if self._text is None:
            raise UsageError(f"{folder}: holds no text encoder; pass embeddings to denoise()")
        if not all(isinstance(prompt, str | Each) for prompt in subjects):
            raise UsageError(f"{folder}: conditioned by prompts, not by classes; give --prompt")
        rows = self._text(cast(Sequence[Text], subjects), negative, conditioning.guided, clip_skip)
        rows |= fixed_conditions(self.record, (1 + conditioning.guided) * len(subjects), guidance)
        rows |= self._drawn(subjects, size)
        if conditioning.encoder and conditioning.encoder.sized:
            sizes = self.axes_of(self.latent_shape(self.batch, size))
            for name, row in conditioning.encoder.sized.items():
                rows[name][:] = sizes_at(row, sizes)
        return {
            tensor.name: check_finite(
                self.record, rows[tensor.name].astype(Dtype(tensor.dtype).numpy), f"'{tensor.name}' of the prompt"
            )
            for tensor in conditioning.inputs
        }

    def _drawn(self, subjects: Sequence[Any], size: tuple[int, int] | None) -> dict[str, np.ndarray]:
        """Return pictures for ControlNets, which a request's own take the place of; see :func:`drawings`."""
        shapes = {tensor.name: tensor.shape for tensor in self.record.conditioning.inputs}
        if PICTURE not in shapes:
            return {}
        nets = int(shapes[STRENGTH][1])
        pictures = drawings(subjects, nets, size or self.size, int(shapes[PICTURE][1]) // nets)
        return {PICTURE: np.concatenate([pictures] * (1 + self.record.conditioning.guided))}

    @property
    def encoders(self) -> int:
        """How many text encoders read prompts, each of which may be given one of its own."""
        encoder = self.record.conditioning.encoder
        return len(encoder.tokenizers) if encoder else 0

    def check_negative(self, negative: Text | None) -> None:
        """Refuse a negative prompt that nothing would come of; the empty one is everybody's."""
        if negative and not self.record.conditioning.guided:
            scale = self.record.sampler.guidance_scale
            raise UsageError(
                f"a negative prompt is given, and the bundle was compiled for guidance {scale:g}, at which none is "
                "read; leave it out"
            )

    def denoise(
        self,
        noise: np.ndarray,
        conditions: Mapping[str, np.ndarray],
        after_step: AfterStep | None = None,
        before_step: Callable[[], None] | None = None,
    ) -> np.ndarray:
        """Run the trajectory of one batch.

        Args:
            noise: float32 of the bundle's latent shape, or of one in its ranges, as :meth:`noise` gives it.
            conditions: the graph inputs of the prompt or class.
            after_step: called with the step and its ε, float32 ``[B, C, H, W]``.
            before_step: called before every step, but where one launch does them all; it may raise to end here.

        Returns:
            The final latent, float32 ``[B, C, H, W]``.
        """
        shape = latent_shape_of(self.record, noise.shape)
        self._check_rows(conditions, self.axes_of(shape))
        with Steps(self.contexts, shape, conditions) as steps:
            walk = Walk(steps, noise, watched=False)
            if steps.can_replay and not after_step:
                walk.finish()
            while walk.step < len(self.record.steps):
                if before_step:
                    before_step()
                walk.advance()
                if after_step:
                    after_step(walk.step - 1, steps.epsilon(walk.step - 1))
            return walk.latent

    @property
    def makes_pixels(self) -> bool:
        """Whether latents are images, as where a pipeline has no VAE."""
        return self.record.decoder is None and self.record.conditioning.kind == "nothing"

    def decode(self, latent: np.ndarray) -> np.ndarray:
        """Return pixels ``[B, channels, height, width]`` in [0, 1] of a latent ``[B, C, H, W]``, by the VAE decoder.

        Raises:
            UsageError: a bundle without one whose latents are no images either.
        """
        if self.makes_pixels:
            return (latent / 2 + np.float32(0.5)).clip(0, 1)
        decoder = self._decoder()
        pixels = self.runner.run(decoder.file, {decoder.input.name: latent})[decoder.output.name]
        return check_finite(self.record, pixels, "the image that the VAE decodes")

    def generate(
        self,
        subjects: Sequence[int] | Sequence[str],
        seed: int,
        progress: Callable[[Sequence[int]], Any] = iter,
        negative: str | None = None,
        size: tuple[int, int] | None = None,
        guidance: Guidance = Guidance(),
    ) -> np.ndarray:
        """Generate one image per class or prompt: pixels ``[n, height, width, channels]`` in [0, 1], float32.

        The images are those of the diffusers pipeline called with the same classes or prompts and
        ``generator=torch.Generator().manual_seed(seed)``, and ``size``, height and width in pixels (None is
        :attr:`size`). A last batch that is not full is filled up and cut, unless the bundle takes fewer images too.

        Raises:
            UsageError: see :meth:`noise`, :meth:`conditions` and :meth:`decode`.
        """
        alone = self.under(guidance)
        if alone is not self:
            return alone.generate(subjects, seed, progress, None, size, guidance)
        if not self.makes_pixels:
            self._decoder()
        noise = self.noise(len(subjects), seed, size)
        pixels, batches = [], batches_of(self.record, len(subjects))
        for number in progress(range(len(batches))):
            images = batches[number]
            conditions = self.conditions([subjects[image] for image in images], negative, size, guidance=guidance)
            pixels.append(self.decode(self.denoise(noise[images], conditions)))
        return np.concatenate(pixels)[: len(subjects)].transpose(0, 2, 3, 1)

    def axes_of(self, shape: Sequence[int]) -> dict[str, int]:
        """Return the values of the axes that a latent's shape has.

        Raises:
            UsageError: a shape that the bundle was not compiled for.
        """
        return axes_of(self.record, shape)

    def _decoder(self) -> DecoderRecord:
        """Return the VAE decoder, or refuse where there is none."""
        if self.record.decoder is None:
            raise UsageError(f"{self.bundle.folder}: holds no VAE decoder, only latents can be had from it")
        return self.record.decoder

    def _check_rows(self, conditions: Mapping[str, np.ndarray], sizes: Mapping[str, int]) -> None:
        """Refuse conditions of another number of images than the noise."""
        for tensor in self.record.conditioning.inputs:
            shape, value = shape_at(tensor.shape, sizes), conditions[tensor.name]
            rows = value[:, 0] if tensor.name == STRENGTH and np.ndim(value) > len(shape) else value
            if np.shape(rows) != shape:
                raise UsageError(f"'{tensor.name}' is {list(np.shape(value))}, this noise goes with {list(shape)}")
