"""The search's training loop for the models of the zoo: killed at any moment, a training goes on to the same result.

Batches and noise are drawn from the seed and the iteration's number alone; the rest (parameters, their moving average,
AdamW's moments) is in the newest checkpoint of the run (:mod:`dipgo.searching.run_folder`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from dipgo.base.files import new_file
from dipgo.searching.run_folder import Run
from dipgo.searching.training_loop import Descent, optimise

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Course:
    """How one model is trained.

    Attributes:
        name: of the stage.
        iterations, batch: steps of AdamW, and examples in each.
        rate: the learning rate at its height: a linear rise over a twentieth (200 at most), then half a cosine.
        average: the decay of the moving average of the parameters, lower in the beginning.
    """

    name: str
    iterations: int
    batch: int
    rate: float
    average: float = 0.999


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
    start, parts = iteration * size, list[np.ndarray]()
    while size > 0:
        epoch, offset = divmod(start, count)
        parts.append(np.random.default_rng((seed, 1, epoch)).permutation(count)[offset : offset + size])
        start, size = start + len(parts[-1]), size - len(parts[-1])
    return np.concatenate(parts)


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


class Averaged(nn.Module, Generic[M]):
    """A module that learns, and the moving average of its parameters."""

    def __init__(self, module: M) -> None:
        super().__init__()
        self.module, self.average = module, deepcopy(module).requires_grad_(False)

    def follow(self, updates: int, decay: float) -> None:
        """Move the average after so many updates; early ones weigh more."""
        move = get_ema_multi_avg_fn(min(decay, updates / (9 + updates)))
        move(list(self.average.parameters()), list(self.module.parameters()), updates)


def train(
    module: M,
    loss_at: Callable[[int], torch.Tensor],
    course: Course,
    run: Run,
    watch: Callable[[int, M], None] = lambda updates, average: None,
) -> tuple[M, dict[str, Any]]:
    """Train ``module`` where it lies and return the moving average of it, with the figures of the training.

    The figures are ``seconds`` (all processes together), ``final_loss`` (mean of the last tenth) and ``losses`` (means
    of twentieths).

    Args:
        loss_at: the loss of iteration k as a function of ``module``'s parameters; it draws from k alone.
        run: in a folder, from which a killed training goes on.
        watch: called after every tenth (of ten iterations or more) with the updates so far and the average.

    Raises:
        DipgoError: a loss that is not finite; a checkpoint that is damaged or of another model.
    """
    device, both = next(module.parameters()).device, Averaged(module)
    count, tenth = course.iterations, max(10, course.iterations // 10)

    def follow(updates: int) -> None:
        if updates:
            both.follow(updates, course.average)
            if updates % tenth == 0:
                watch(updates, both.average)

    def loss_of(iteration: int) -> tuple[torch.Tensor, dict[str, float]]:
        follow(iteration)
        return loss_at(iteration), {}

    rise = max(1, min(200, count // 20))
    descent = Descent(count, course.rate, "adamw", warmup=rise, weight_decay=0.01, clip=1.0)
    optimise(both, loss_of, descent, run.phase(course.name), device)
    both.to(device)
    follow(count)
    assert run.journal
    lines = [json.loads(line) for line in run.journal.path.read_text().splitlines()]
    lines = [line for line in lines if line["phase"] == course.name]
    losses = [line["loss"] for line in lines]
    return both.average, {
        "iterations": count,
        "batch": course.batch,
        "seconds": round(sum(line["seconds"] for line in lines), 1),
        "final_loss": float(np.mean(losses[-max(1, count // 10) :])),
        "losses": [round(float(part.mean()), 5) for part in np.array_split(losses, 20) if len(part)],
    }


def record_stage(path: Path, begun: dict[str, Any], device: str, stage: str, figures: dict[str, Any]) -> None:
    """Add a finished stage to a training's record, whose file begins with ``begun``; ``losses`` are not printed."""
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else begun | {"stages": {}}
    machine = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    record |= {"device": machine, "stages": record["stages"] | {stage: figures}}
    with new_file(path) as draft:
        draft.write_text(json.dumps(record, indent=2) + "\n")
    print(stage, {name: value for name, value in figures.items() if name != "losses"}, flush=True)
