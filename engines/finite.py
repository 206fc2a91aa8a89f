"""Values that stop being numbers: said with the step and the tensor, instead of a black picture."""

from __future__ import annotations

import numpy as np

from dipgo.base.errors import DipgoError, UsageError
from export.records.bundle import BundleRecord


class NotFinite(DipgoError):
    """A program computed infinity or NaN."""


def check_finite(record: BundleRecord, values: np.ndarray, what: str) -> np.ndarray:
    """Return values of a program; random weights, whose images mean nothing, may make anything.

    Raises:
        NotFinite: naming ``what`` they are.
    """
    if not record.random_weights and not np.isfinite(values).all():
        cures = {"float16": "export it with --dtype bfloat16 or float32", "bfloat16": "export it with --dtype float32"}
        cure = cures.get(record.dtype, "the model's own weights, or what it was given, are beyond its range")
        raise NotFinite(f"{what} is not finite ({_count(values)} in {record.dtype}); {cure}")
    return values


def check_input(values: np.ndarray, name: str) -> np.ndarray:
    """Return values that a caller gave.

    Raises:
        UsageError: they hold infinity or NaN.
    """
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise UsageError(f"{name} is not finite ({_count(values)}); give numbers")
    return values


def _count(values: np.ndarray) -> str:
    return f"{int((~np.isfinite(values)).sum())} of {values.size} values are infinite or NaN"
