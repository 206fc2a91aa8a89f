"""Classes, by name or by number, as the graph input of a model that they condition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dipgo.base.errors import UsageError
from export.records.bundle import BundleRecord


def class_of(record: BundleRecord, label: str) -> int:
    """Return the class that ``label`` names, by its name or its number.

    Raises:
        UsageError: the model has no such class.
    """
    labels = record.conditioning.labels
    if label in labels:
        return labels[label]
    if label.isdecimal() and len(label) < 11 and (not labels or int(label) in labels.values()):
        return int(label)
    names = ", ".join(list(labels)[:10]) + (", …" if len(labels) > 10 else "")
    raise UsageError(f"class '{label}' is unknown to {record.model.name}; it has: {names}")


def class_rows(record: BundleRecord, classes: Sequence[Any]) -> np.ndarray:
    """Return classes as int64, a row for each; with guidance as many rows of the class of no class before them.

    Raises:
        UsageError: a class that the model lacks.
    """
    conditioning = record.conditioning
    numbers = sorted(set(conditioning.labels.values()))
    unknown = next((number for number in classes if numbers and number not in numbers), None)
    if unknown is not None:
        raise UsageError(f"class {unknown} is unknown to {record.model.name}; it has {numbers[0]} to {numbers[-1]}")
    return np.array([conditioning.null_class] * len(classes) * conditioning.guided + list(classes), np.int64)
