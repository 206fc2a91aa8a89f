"""The options of an evaluation, once: the study's command and recipes take them from here."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from dipgo.base.config import Backend, Config, Threads


class Settings(Config):
    """What is made, and scored with what; paths are local."""

    number: int | None = Field(None, ge=1, description="The first so many prompts; all by default.")
    seed: int = Field(0, ge=0, description="Of the first image; each further one has the next.")
    backend: Backend = "onnxruntime"
    threads: Threads = None
    clip: Path | None = Field(None, description="Folder of a CLIP model, for the CLIP score.")
    inception: Path | None = Field(None, description="torch-fidelity's Inception weights, for FID.")
    real: Path | None = Field(None, description="Folder of real pictures, for FID.")
