"""What conditions images, and how prompts become graph inputs, as the bundle's record has it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, FiniteFloat

from dipgo.base.guidance import RESCALE, GuidanceScale, ScaleArgument
from dipgo.base.records import FileName, Line, Record
from export.records.graphs import Size, Tensors

Class = Annotated[int, Field(ge=0, lt=2**31)]


class TokenizerRecord(Record):
    """A tokenizer (file of the ``tokenizers`` library) and the inputs of the text graph that it fills.

    Every prompt is put between ``before`` and ``after``, then cut and padded to ``length`` tokens, on one ``side``.
    ``expands`` has the tokens that stand for several vectors of a textual inversion, and what they are replaced by.
    """

    file: FileName
    ids: Line
    mask: Line | None
    length: int = Field(ge=1, le=2**20)
    pad_token: Line
    pad_id: int = Field(ge=0, lt=2**31)
    expands: dict[Line, str] = Field(default_factory=dict)
    before: str = Field(default="", max_length=100_000)
    after: str = Field(default="", max_length=100_000)
    side: Literal["right", "left"] = "right"


class TextRecord(Record):
    """Prompts to conditions: one graph that holds all text encoders.

    ``unconditional`` says what stands for no prompt: the empty prompt's encoding, or zeros. ``lower`` strips and
    lower-cases prompts first. ``fixed`` holds conditions that do not depend on the prompt, one row each; those of them
    that follow the image's size are in ``sized`` too, as expressions over the axes (in ``fixed`` at ``opt``). Outputs
    are conditions, and conditions with the encoders' last layers skipped: ``NAME.1``, ``NAME.2``, …. ``negative`` is
    how negative prompts, and the empty one in their place, become the same conditions where that is another way.
    """

    file: FileName
    tokenizers: list[TokenizerRecord] = Field(max_length=8)
    inputs: Tensors
    outputs: Tensors
    unconditional: Literal["encoded", "zeros"]
    lower: bool
    fixed: dict[Line, list[FiniteFloat]]
    sized: dict[Line, list[Size]] = Field(default_factory=dict)
    negative: TextRecord | None = None

    @property
    def ways(self) -> list[TextRecord]:
        """This record, and that of negative prompts where there is one."""
        return [self, *([self.negative] if self.negative else [])]


class GuidanceRecord(Record):
    """What the guidance scale of a request changes: conditions that are so many times the scale.

    A scale of at most ``off`` is no guidance: then the scale is ``neutral``, at which the image is that of the
    conditional pass.
    """

    inputs: dict[Line, FiniteFloat]
    off: FiniteFloat | None = None
    neutral: FiniteFloat = 1.0


class ConditioningRecord(Record):
    """What the user conditions on, and how it becomes graph inputs; ``prompt`` without an encoder takes embeddings.

    ``prompts`` are a few of those that the model's folder brings, if it does.
    """

    kind: Literal["class", "prompt", "nothing"]
    guided: bool
    inputs: Tensors
    null_class: Class | None = None
    labels: dict[Line, Class] = Field(default_factory=dict)
    prompts: list[Line] = Field(default_factory=list)
    fixed: dict[Line, list[FiniteFloat]] = Field(
        default_factory=dict, description="conditions that are the same for all prompts: one row each, flat"
    )
    guidance: GuidanceRecord | None = Field(
        default=None, description="how a request chooses the guidance scale; none where it is compiled in"
    )
    scale: ScaleArgument = Field(
        default="guidance_scale",
        description="the argument of the pipeline's call that is the guidance scale; by true_cfg_scale it guides where "
        "a negative prompt is given, and else not at all",
    )
    encoder: TextRecord | None = None

    def at(self, scale: GuidanceScale) -> ConditioningRecord:
        """Return the record where the usual guidance is another, as far as a request may choose it."""
        factors = self.guidance.inputs if self.guidance else {}
        values = {name: factor * scale for name, factor in factors.items()} | {RESCALE: scale.rescale}
        fixed = {name: [values[name]] if name in values else row for name, row in self.fixed.items()}
        return self.model_copy(update={"fixed": fixed})
