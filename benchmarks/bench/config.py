"""Every option of a benchmark, once. What a suite says counts where nothing else is said."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from benchmarks.bench.suite import DEFAULT, Suite, load_suite
from dipgo.base.config import Config, Threads


class BenchConfig(Config):
    """What is measured, and how often."""

    suite: str | Suite = Field(
        DEFAULT, description="What to measure: quick, quality, sd15, …, or a suite's .yaml file."
    )
    images: int | None = Field(None, ge=8, description="Images that quality is judged on; the suite's by default.")
    repeats: int | None = Field(None, ge=3, description="Least repeats of each timing; the suite's by default.")
    threads: Threads = None

    @property
    def name(self) -> str | None:
        """The suite's name or file, where it has one."""
        return self.suite if isinstance(self.suite, str) else None

    def settings(self) -> Suite:
        """Return the suite with what is said here in its place; UsageError where there is no such suite."""
        suite = load_suite(self.suite) if isinstance(self.suite, str) else self.suite
        return suite.changed(images=self.images, repeats=self.repeats, threads=self.threads)


class JudgeConfig(Config):
    """What schedules are judged on."""

    images: int = Field(
        64, ge=8, description="How many images to judge on.", json_schema_extra={"flags": ["--images", "-n"]}
    )
    prompts: Path | None = Field(
        None, description="What to judge on, one a line, where prompts condition; the model's own by default."
    )
    classes: str | None = Field(
        None, description="Classes to judge on, by name or number, joined by commas; all by default."
    )
    guidance: float | None = Field(None, description="Guidance scale to judge at; by default the one of the search.")
    device: str = Field("cpu", description="Where to judge: cpu, or cuda where torch has it.")
    threads: Threads = None
