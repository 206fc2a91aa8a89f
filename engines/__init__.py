"""Run: a bundle becomes images. Neither torch nor diffusers is imported for ONNX Runtime."""

from engines.program import Program, load

__all__ = ["Program", "load"]
