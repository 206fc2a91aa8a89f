"""The one training loop: every phase that learns by gradient through the trajectory runs it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from dipgo.base.errors import DipgoError
from dipgo.eager.trajectory import Trajectory
from dipgo.searching.config import SearchConfig
from dipgo.searching.journal import peak_memory
from dipgo.searching.losses import Loss
from dipgo.searching.pool import Batches
from dipgo.searching.run_folder import Phase

LossAt = Callable[[int], tuple[torch.Tensor, Mapping[str, float]]]
"""From the number of a batch to its loss and figures to report (``kept``: the ratio of MACs that it ran)."""

OPTIMISERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
    "adamw": partial(torch.optim.AdamW, betas=(0.9, 0.99)),
}


@dataclass(frozen=True)
class Descent:
    """How a phase descends.

    Attributes:
        rate: the highest learning rate.
        optimiser: ``adam``, ``adamw``, or ``sgd`` (without momentum, as in the paper).
        schedule: ``cosine`` down to zero after the last iteration (Loshchilov & Hutter 2017, eq. 5), or ``constant``.
        warmup: iterations over which the rate first rises in a straight line.
        weight_decay: added to the gradient, L2; of ``adamw`` taken off the parameters.
        clip: the highest norm of the gradient; 0 leaves it as it is.
        accumulate: batches whose gradients make one update.
    """

    iterations: int
    rate: float
    optimiser: str = "adam"
    schedule: str = "cosine"
    warmup: int = 0
    weight_decay: float = 0.0
    clip: float = 0.0
    accumulate: int = 1

    def rate_at(self, iteration: int) -> float:
        """Return the learning rate of an iteration, from 0."""
        if iteration < self.warmup:
            return self.rate * (iteration + 1) / (self.warmup + 1)
        if self.schedule == "constant":
            return self.rate
        progress = (iteration - self.warmup) / max(1, self.iterations - self.warmup)
        return self.rate * (1 + math.cos(math.pi * progress)) / 2


def gate_descent(config: SearchConfig) -> Descent:
    """Return how the paper's method descends."""
    return Descent(
        config.gate_iterations,
        config.gate_rate,
        config.optimiser,
        config.gate_schedule,
        config.warmup,
        config.weight_decay,
        config.clip,
        config.accumulate,
    )


def backup_descent(config: SearchConfig, iterations: int, budget: float) -> Descent:
    """Return how backups descend."""
    return Descent(
        iterations,
        config.backup_rate / max(budget, 0.2) ** 2,
        schedule=config.backup_schedule,
        warmup=config.backup_warmup,
        accumulate=config.accumulate,
    )


@dataclass(frozen=True)
class Training:
    """What a phase learns with: the trajectory, its batches, the loss, how it descends, where it is kept."""

    trajectory: Trajectory
    batches: Batches
    loss: Loss
    descent: Descent
    phase: Phase


def optimise(
    module: nn.Module,
    loss_at: LossAt,
    descent: Descent,
    phase: Phase,
    device: torch.device,
    precision: torch.dtype | None = None,
) -> None:
    """Descend on ``loss_at`` over the parameters of ``module``, from where ``phase`` was left.

    Iteration i (from 0) uses the batches i A … i A + A - 1 with A = ``accumulate``, and nothing else that is drawn,
    so a run that was killed and resumed equals one that was not. Parameters and optimiser are float32; where
    ``loss_at`` computes in float16 (``precision``) the loss is scaled (Micikevicius et al. 2018). With several
    processes each computes the loss of its share, and gradients are averaged: the result is that of one process with
    the joint batch.

    The module is moved to the device and, at the end, to the CPU.

    Raises:
        DipgoError: a loss or gradient that is NaN or infinite (the parameters are those before that iteration, and the
            last checkpoint is kept), a checkpoint that does not fit, a full disk.
    """
    run = phase.run
    module.to(device)
    parameters = list(module.parameters())
    optimiser = OPTIMISERS[descent.optimiser](parameters, lr=descent.rate, weight_decay=descent.weight_decay)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    first = phase.restore(module, optimiser, scaler)
    for iteration in range(first, descent.iterations):
        started = time.perf_counter()
        optimiser.param_groups[0]["lr"] = descent.rate_at(iteration)
        optimiser.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=device)
        for batch in range(iteration * descent.accumulate, (iteration + 1) * descent.accumulate):
            part, figures = loss_at(batch)
            part = part / descent.accumulate
            scaler.scale(part).backward()
            loss += part.detach()

        last = iteration + 1 == descent.iterations
        due = torch.tensor(float(run.processes.main and (last or phase.due(iteration + 1))), device=device)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        run.processes.average([*gradients, loss, due])
        _update(parameters, optimiser, scaler, descent, loss.item(), f"iteration {iteration + 1}", phase)
        phase.tell(
            iteration + 1,
            descent.iterations,
            {
                "loss": loss.item(),
                **figures,
                "rate": descent.rate_at(iteration),
                "seconds": round(time.perf_counter() - started, 4),
                "peak_memory": peak_memory(device),
            },
        )
        if due > 0:
            phase.keep(iteration + 1, module, optimiser, scaler)
    module.to("cpu")


def _update(
    parameters: list[nn.Parameter],
    optimiser: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    descent: Descent,
    loss: float,
    where: str,
    phase: Phase,
) -> None:
    """Take one step, or say why none can be taken."""
    if not math.isfinite(loss):
        raise _stopped(f"the loss is {loss} at {where}", phase)
    scaler.unscale_(optimiser)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if descent.clip:
        torch.nn.utils.clip_grads_with_norm_(parameters, descent.clip, norm)
    if not scaler.is_enabled() and not math.isfinite(norm.item()):
        raise _stopped(f"the gradient is {norm.item()} at {where}", phase)
    scaler.step(optimiser)  # with scaling, a gradient that overflowed is left out and the scale halved
    scaler.update()
    if scaler.is_enabled() and scaler.get_scale() < 1:
        raise _stopped(f"the gradient overflows float16 at {where} without any scaling", phase)


def _stopped(what: str, phase: Phase) -> DipgoError:
    return DipgoError(
        f"phase '{phase.name}': {what}; {phase.standing()}; begin anew with a lower learning rate, with --set clip=1, "
        "or in bf16 or fp32"
    )
