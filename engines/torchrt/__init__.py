"""The torch backend: a bundle's graphs as torch.fx modules, eager, compiled, or packaged by AOTInductor."""

from dipgo.base.errors import not_imported
from dipgo.base.install import TORCH

try:
    import torch as _torch  # noqa: F401 - every module here needs it
except ImportError as error:
    raise not_imported("torch", error, TORCH) from error
