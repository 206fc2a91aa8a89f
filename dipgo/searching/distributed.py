"""The processes of one search: data-parallel over noise and conditions, started by ``accelerate launch``.

Every process draws its own share of each batch and follows the same optimisation; gradients are averaged. The main
process alone writes files, and what it decides is handed to the others.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch

from dipgo.base.errors import DipgoError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among ``count``; without arguments the only one."""

    rank: int = 0
    count: int = 1

    @property
    def main(self) -> bool:
        return self.rank == 0

    def average(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each float32 tensor by its mean over the processes, in place and in one reduction."""
        if self.count == 1:
            return
        from accelerate.utils import reduce

        flat = reduce(torch.cat([tensor.reshape(-1) for tensor in tensors]), "mean")
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def from_main(self, make: Callable[[], T]) -> T:
        """Return what ``make`` gives in the main process, in every process.

        Raises:
            DipgoError: in every process, where ``make`` raised it.
        """
        if self.count == 1:
            return make()
        from accelerate.utils import broadcast_object_list

        parcel: list[object] = [None, None]
        if self.main:
            try:
                parcel[0] = make()
            except DipgoError as error:
                parcel[1] = error
        broadcast_object_list(parcel)
        if isinstance(parcel[1], DipgoError):
            raise parcel[1]
        return parcel[0]  # type: ignore[return-value]


ALONE = Processes()


def processes(device: torch.device) -> Processes:
    """Join the processes that ``accelerate launch`` (or torchrun) started; alone where there are none."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return ALONE
    from accelerate import PartialState

    # The others wait while the main process compares candidates, which may take long.
    state = PartialState(cpu=device.type == "cpu", timeout=timedelta(hours=2))
    return Processes(state.process_index, state.num_processes)
