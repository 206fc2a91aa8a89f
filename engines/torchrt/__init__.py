"""The torch backend: a bundle's graphs as torch.fx modules, eager, compiled, or packaged by AOTInductor."""

from dipgo.base.errors import DipgoError

try:
    import torch as _torch  # noqa: F401 - every module here needs it
except ImportError as error:
    raise DipgoError("torch is not installed; run: pip install torch") from error
