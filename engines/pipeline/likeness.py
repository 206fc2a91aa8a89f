"""What code that is written for a diffusers pipeline finds at a bundle: attributes, and reasons for those it lacks."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dipgo.base.dtypes import PRECISIONS
from dipgo.base.errors import UsageError
from dipgo.base.files import new_folder
from dipgo.base.records import SamplerIdentity
from engines.pipeline.arguments import check_scheduler
from engines.program import Program
from export.bundle import BUNDLE, RECORD_FILE

_PRECISIONS = tuple(dtype.value for dtype in PRECISIONS.values())
COMPONENTS = ("unet", "transformer", "controlnet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
_MISSING = {
    **dict.fromkeys(COMPONENTS, "it is compiled into the bundle's graphs"),
    **dict.fromkeys(
        ("fuse_lora", "load_textual_inversion"),
        "a bundle's weights are fixed; fuse them into the pipeline and export that",
    ),
    **dict.fromkeys(
        ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "enable_attention_slicing", "enable_vae_tiling"),
        "memory is laid out when a bundle is compiled; choose another backend or batch",
    ),
    "encode_prompt": "prompts are encoded by a graph of the bundle; give prompts, or embeddings of the pipeline",
    "enable_freeu": "it changes what the denoiser computes; export a pipeline that has it",
}


class DiffusersLikeness(Program):
    """The attributes of diffusers pipelines, on a program."""

    @classmethod
    def from_pretrained(cls, folder: str | Path, **options: Any) -> Any:
        """Open a bundle, see :func:`engines.pipeline.pipeline.load`."""
        from engines.pipeline.pipeline import load

        return load(folder, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Copy the bundle's files, engines left out, into a new folder.

        Raises:
            UsageError: a folder that exists.
        """
        with new_folder(Path(folder), False, BUNDLE) as draft:
            for name in (*self.record.files, RECORD_FILE):
                (draft / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.bundle.folder / name, draft / name)

    def to(self, *where: Any, **more: Any) -> Any:
        """Accept the device and dtype that the program has already.

        Raises:
            UsageError: others.
        """
        for place in (*where, *more.values()):
            name = str(place).removeprefix("torch.")
            if name in _PRECISIONS and name != self.record.dtype:
                raise UsageError(f"dtype {name}, the bundle is {self.record.dtype}; export one with --dtype")
            if name.split(":")[0] in ("cpu", "cuda", "mps", "xpu") and name.split(":")[0] != self._kind:
                raise UsageError(f"device {name}, the bundle runs on {self.runner.label}; load it with another backend")
        return self

    @property
    def device(self) -> Any:
        """``cpu`` or ``cuda``: torch's device where torch is imported, else its name."""
        torch = sys.modules.get("torch")
        return torch.device(self._kind) if torch else self._kind

    @property
    def dtype(self) -> Any:
        """Of the weights: torch's dtype where torch is imported, else its name."""
        torch = sys.modules.get("torch")
        return getattr(torch, self.record.dtype) if torch else self.record.dtype

    @property
    def _kind(self) -> str:
        return "cpu" if "cpu" in self.runner.label.lower() else "cuda"

    @property
    def config(self) -> dict[str, Any]:
        """What the bundle is, as plain values."""
        record = self.record
        programs = [{"num_inference_steps": each.steps, "budget": each.record.budget} for each in self.programs]
        return {
            "_class_name": type(self).__name__,
            "_name_or_path": str(self.bundle.folder),
            "model": record.model.name,
            "denoiser": record.model.class_name,
            "scheduler": record.sampler.class_name,
            "guidance_scale": record.sampler.guidance_scale,
            "height": self.size[0],
            "width": self.size[1],
            "dtype": record.dtype,
            "programs": programs,
        }

    @property
    def components(self) -> dict[str, Any]:
        """What can be handed on: the sampler alone, since all models are graphs."""
        return {"scheduler": self.scheduler}

    @property
    def scheduler(self) -> SamplerIdentity:
        """The bundle's sampler, with the ``config`` of its diffusers scheduler; only the same may be set."""
        return self.record.sampler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        check_scheduler(self.record, scheduler)

    @property
    def num_timesteps(self) -> int:
        return len(self.record.steps)

    def get_label_ids(self, label: str | Sequence[str]) -> list[int]:
        """Return the classes that labels name, as ``DiTPipeline`` does."""
        return [self.class_of(each) for each in ([label] if isinstance(label, str) else label)]

    def __getattr__(self, name: str) -> Any:
        if name in _MISSING:
            raise AttributeError(f"a bundle has no '{name}': {_MISSING[name]}")
        raise AttributeError(f"'{type(self).__name__}' has no attribute '{name}'")

    def __repr__(self) -> str:
        height, width = self.size
        return (
            f"{type(self).__name__}({self.bundle.folder}: {self.record.model.name}, {self.choices}, "
            f"{self.record.sampler.class_name}, images of {height}x{width}, {self.record.dtype}, {self.runner.label})"
        )
