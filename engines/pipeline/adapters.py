"""LoRAs on a bundle, by the methods that diffusers pipelines have for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dipgo.base.dtypes import Dtype
from dipgo.base.errors import UsageError
from engines.pipeline.likeness import DiffusersLikeness
from engines.pipeline.lora_file import Adapter, read_adapter
from engines.program import Program
from export.records.bundle import AdaptersRecord

_NAME = "default_{}"


class AdapterMethods(DiffusersLikeness):
    """Methods of diffusers' ``LoraBaseMixin``: which adapters are there, which are active, and how strongly.

    A call takes the adapters that are active when it begins. Without one the plain programs run.
    """

    def __init__(self, *parts: Any) -> None:
        super().__init__(*parts)
        self._loaded: dict[str, Adapter] = {}
        self._active: dict[str, float] = {}
        self._enabled = True
        self._matrices: dict[str, np.ndarray] | None = None

    def at(self, steps: int | None = None, budget: float | None = None) -> Program:
        """Return the program of so many steps and of a budget, with the adapters that are active."""
        program, matrices = super().at(steps, budget), self._matrices
        return program if matrices is None else program.with_matrices(matrices)

    def denoise(self, *arguments: Any, **options: Any) -> np.ndarray:
        """Run the trajectory of one batch, see :meth:`engines.program.Program.denoise`."""
        program = self.at()
        return super().denoise(*arguments, **options) if program is self else program.denoise(*arguments, **options)

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: Any,
        adapter_name: str | None = None,
        weight_name: str | None = None,
    ) -> None:
        """Load a LoRA and make it the active one, as diffusers does.

        Args:
            pretrained_model_name_or_path_or_dict: its safetensors file, a folder that holds it, or its tensors.
            adapter_name: what :meth:`set_adapters` calls it; None numbers it.
            weight_name: the file in the folder.

        Raises:
            UsageError: a name that is taken, what fits no layer of the bundle, or a rank that is too high.
            DipgoError: no safetensors file.
        """
        adapters = self._adapters()
        name = adapter_name or _NAME.format(len(self._loaded))
        if name in self._loaded:
            raise UsageError(f"the adapter '{name}' is there already; give another adapter_name, or delete it")
        adapter = read_adapter(pretrained_model_name_or_path_or_dict, weight_name, adapters)
        self._activate({**self._loaded, name: adapter}, {name: 1.0})

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float | None] | None = None
    ) -> None:
        """Make adapters active, each with a weight; 1 without one.

        Raises:
            UsageError: an adapter that is not there, another number of weights, or ranks that are too high together.
        """
        self._adapters()
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        given = adapter_weights if isinstance(adapter_weights, Sequence) else [adapter_weights] * len(names)
        self._check_known(names)
        if len(given) != len(names):
            raise UsageError(f"{len(given)} weights for {len(names)} adapters; give as many")
        if len(set(names)) < len(names):
            raise UsageError(f"set_adapters({names}): names one twice; give each once")
        if any(isinstance(weight, Mapping) for weight in given):
            raise UsageError("weights of single blocks are given, a bundle takes one an adapter; give numbers")
        weights = [1.0 if weight is None else float(weight) for weight in given]
        if not np.isfinite(weights).all():
            raise UsageError(f"the weights are {weights}; give finite numbers")
        self._activate(self._loaded, dict(zip(names, weights, strict=True)))

    def disable_lora(self) -> None:
        """Run without adapters until :meth:`enable_lora`."""
        self._adapters()
        self._enabled = False
        self._matrices = None

    def enable_lora(self) -> None:
        """Let the active adapters count again."""
        self._adapters()
        self._activate(self._loaded, self._active)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Let go of adapters.

        Raises:
            UsageError: one that is not there.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        self._check_known(names)
        enabled = self._enabled
        loaded = {name: adapter for name, adapter in self._loaded.items() if name not in names}
        self._activate(loaded, {name: weight for name, weight in self._active.items() if name not in names})
        if not enabled:
            self.disable_lora()

    def unload_lora_weights(self) -> None:
        """Let go of all adapters."""
        self._loaded, self._active, self._enabled, self._matrices = {}, {}, True, None

    def get_active_adapters(self) -> list[str]:
        return list(self._active)

    def get_list_adapters(self) -> dict[str, list[str]]:
        component = "unet" if "UNet" in self.record.model.class_name else "transformer"
        return {component: list(self._loaded)} if self._loaded else {}

    def _adapters(self) -> AdaptersRecord:
        if self.record.adapters is None:
            raise UsageError(f"{self.bundle.folder}: takes no LoRAs; export it with --lora-rank")
        return self.record.adapters

    def _check_known(self, names: Sequence[str]) -> None:
        unknown = next((name for name in names if name not in self._loaded), None)
        if unknown is not None:
            there = f"there are {', '.join(self._loaded)}" if self._loaded else "none is loaded"
            raise UsageError(f"no adapter '{unknown}'; {there}")

    def _activate(self, loaded: dict[str, Adapter], active: dict[str, float]) -> None:
        """Take adapters and weights, of which nothing is changed where they do not fit."""
        matrices = _matrices(self._adapters(), [(loaded[name], weight) for name, weight in active.items()])
        self._loaded, self._active, self._enabled, self._matrices = loaded, active, True, matrices


def _matrices(adapters: AdaptersRecord, active: Sequence[tuple[Adapter, float]]) -> dict[str, np.ndarray] | None:
    """Return the graph inputs of adapters with weights, which lie side by side along the rank; None without any.

    Raises:
        UsageError: ranks that are too high together.
    """
    if not active:
        return None
    values = {tensor.name: np.zeros([int(size) for size in tensor.shape], np.float32) for tensor in adapters.inputs}
    for branch in adapters.branches:
        start = 0
        for adapter, weight in active:
            own = adapter.get(branch.layer)
            if own is None:
                continue
            end = start + own.rank
            if end > adapters.rank:
                ranks = " + ".join(str(each[branch.layer].rank) for each, _ in active if branch.layer in each)
                raise UsageError(
                    f"rank {ranks} at '{branch.layer}', the bundle takes {adapters.rank} in all; export it with a "
                    "higher --lora-rank"
                )
            values[branch.down][branch.down_place, :, start:end] = own.down
            values[branch.up][branch.up_place, start:end] = own.up * np.float32(weight * own.scale)
            start = end
    types = {tensor.name: Dtype(tensor.dtype).numpy for tensor in adapters.inputs}
    return {name: value.astype(types[name]) for name, value in values.items()}
