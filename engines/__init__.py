"""Run: a bundle becomes images. Neither torch nor diffusers is imported for ONNX Runtime."""

from engines.attach import attach, detach
from engines.pipeline import Output, Pipeline, load
from engines.program import Program

__all__ = ["Output", "Pipeline", "Program", "attach", "detach", "load"]
