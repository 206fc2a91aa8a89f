"""A training loop that can be killed at any moment, and goes on to the same result.

Batches and noise are drawn from the seed and the iteration's number alone; the rest (parameters, their moving average,
AdamW's moments) is in the newest checkpoint.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dipgo.base.errors import DipgoError
from dipgo.base.files import sha256_of_json
from dipgo.searching.checkpoint import CheckpointRecord, pack, read_checkpoint, unpack, write_checkpoint

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Course:
    """How one model is trained.

    Attributes:
        name: of the stage; its checkpoint is ``<name>.safetensors``.
        iterations, batch: steps of AdamW, and examples in each.
        rate: the learning rate at its height: a linear rise over a twentieth (200 at most), then half a cosine.
        average: the decay of the moving average of the parameters, lower in the beginning.
        checkpoint_seconds: the most that a kill loses.
        settings: what else the result depends on; a checkpoint of other settings is refused.
    """

    name: str
    iterations: int
    batch: int
    rate: float
    average: float = 0.999
    checkpoint_seconds: float = 60.0
    settings: Mapping[str, Any] | None = None

    def rate_at(self, iteration: int) -> float:
        rise = max(1, min(200, self.iterations // 20))
        return (
            self.rate * min(1.0, (iteration + 1) / rise) * 0.5 * (1 + math.cos(math.pi * iteration / self.iterations))
        )

    def fingerprint(self) -> str:
        parts = [self.name, self.iterations, self.batch, self.rate, self.average, self.settings]
        return sha256_of_json(json.loads(json.dumps(parts)))


class Draw:
    """The chance of one iteration: ``numpy`` for choices, :meth:`noise` on the device."""

    def __init__(self, seed: int, iteration: int, device: torch.device | str = "cpu") -> None:
        self.numpy = np.random.default_rng((seed, iteration))
        self.generator = torch.Generator(device).manual_seed((seed << 32) + iteration)
        self.device = device

    def noise(self, *shape: int) -> torch.Tensor:
        """Return a standard normal float32 tensor."""
        return torch.randn(shape, generator=self.generator, device=self.device)


def batch_of(count: int, size: int, iteration: int, seed: int) -> np.ndarray:
    """Return the ``size`` indices below ``count`` that ``iteration`` sees; epoch after epoch, each shuffled."""
    start, chosen = iteration * size, list[np.ndarray]()
    while size > 0:
        epoch, offset = divmod(start, count)
        order = np.random.default_rng((seed, 1, epoch)).permutation(count)[offset : offset + size]
        chosen.append(order)
        start, size = start + len(order), size - len(order)
    return np.concatenate(chosen)


def on_graph(module: nn.Module, *examples: torch.Tensor) -> nn.Module:
    """Return ``module`` as one CUDA graph forward and one backward; on other devices the module itself.

    A small model's step is hundreds of kernels of microseconds each: launched one by one, they leave a GPU idle most
    of the time. The module must not be copied afterwards, since its ``forward`` is replaced by the graphs.

    Args:
        examples: tensors like the arguments of every later call; their device decides.
    """
    if not examples[0].is_cuda:
        return module
    graphed = torch.cuda.make_graphed_callables(module, examples, allow_unused_input=True)
    return cast(nn.Module, graphed)


def train(
    module: M,
    loss_at: Callable[[int], torch.Tensor],
    course: Course,
    folder: Path,
    watch: Callable[[int, M], None] | None = None,
) -> tuple[M, dict[str, Any]]:
    """Train ``module`` and return the moving average of it, with the figures of the training.

    A line a minute says where it stands. The figures are ``seconds`` (all runs together), ``final_loss`` (mean of the
    last tenth) and ``losses`` (means of twentieths).

    Args:
        loss_at: the loss of iteration k as a function of ``module``'s parameters; it draws from k alone.
        folder: of the checkpoint, from which a killed training goes on.
        watch: called after every tenth (of ten iterations or more) with the iterations done and the average.

    Raises:
        DipgoError: a loss that is not finite; a checkpoint that is damaged or of other settings.
    """
    averaged = deepcopy(module)
    averaged.requires_grad_(False)
    both = nn.ModuleDict({"model": module, "averaged": averaged})
    fused = next(module.parameters()).is_cuda
    optimiser = torch.optim.AdamW(
        module.parameters(), lr=course.rate, weight_decay=0.01, betas=(0.9, 0.99), fused=fused
    )
    done, losses, seconds = _restore(both, optimiser, course, folder)
    kept = told = began = time.monotonic()
    first = done
    for iteration in range(done, course.iterations):
        for group in optimiser.param_groups:
            group["lr"] = course.rate_at(iteration)
        loss = loss_at(iteration)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        losses[iteration] = loss.detach()
        follow = get_ema_multi_avg_fn(min(course.average, (1 + iteration) / (10 + iteration)))
        follow(list(averaged.parameters()), list(module.parameters()), iteration)
        done, now = iteration + 1, time.monotonic()
        if now - told > 60 or done == course.iterations:
            mean, told = losses[max(0, done - 100) : done].mean().item(), now
            if not math.isfinite(mean):
                raise DipgoError(f"{course.name}: the loss at iteration {done} is {mean}; lower the rate")
            pace = (now - began) / (done - first)
            left = (course.iterations - done) * pace / 60
            print(
                f"{time.strftime('%H:%M:%S')} {course.name} {done}/{course.iterations}: loss {mean:.4f}, "
                f"{pace:.3f} s an iteration, {left:.0f} minutes left",
                flush=True,
            )
        if watch and done % max(10, course.iterations // 10) == 0:
            watch(done, averaged)
        if now - kept > course.checkpoint_seconds or done == course.iterations:
            _keep(both, optimiser, course, folder, done, losses, seconds + time.monotonic() - began)
            kept = time.monotonic()
    seconds += time.monotonic() - began
    parts = [part.mean().item() for part in losses.tensor_split(20) if len(part)]
    figures = {
        "iterations": course.iterations,
        "batch": course.batch,
        "seconds": round(seconds, 1),
        "final_loss": losses[-max(1, course.iterations // 10) :].mean().item(),
        "losses": [round(part, 5) for part in parts],
    }
    return averaged, figures


def _restore(
    both: nn.Module, optimiser: torch.optim.Optimizer, course: Course, folder: Path
) -> tuple[int, torch.Tensor, float]:
    """Return the iterations done, the losses so far and the seconds spent."""
    losses = torch.zeros(course.iterations, device=next(both.parameters()).device)
    path = folder / f"{course.name}.safetensors"
    if not path.exists():
        return 0, losses, 0.0
    record, tensors = read_checkpoint(path)
    if record.fingerprint != course.fingerprint():
        raise DipgoError(f"{path}: a checkpoint of other settings; give the settings it was begun with, or remove it")
    losses.copy_(tensors.pop("losses"))
    try:
        unpack(tensors, both, optimiser)
    except (ValueError, KeyError) as error:
        raise DipgoError(f"{path}: a checkpoint of another model ({error}); remove it to begin anew") from error
    return record.iteration, losses, record.scaler["seconds"]


def _keep(
    both: nn.Module,
    optimiser: torch.optim.Optimizer,
    course: Course,
    folder: Path,
    done: int,
    losses: torch.Tensor,
    seconds: float,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    record = CheckpointRecord(
        fingerprint=course.fingerprint(), phase=course.name, iteration=done, scaler={"seconds": seconds}
    )
    tensors = pack(both, optimiser) | {"losses": losses.cpu()}
    write_checkpoint(folder / f"{course.name}.safetensors", record, tensors)
