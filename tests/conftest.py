"""What every test of a real model needs: a tiny class-conditional diffusers pipeline on disk."""

from __future__ import annotations

import os

import pytest
import torch

from tests import models

# For the processes that tests start: two of them whose threads wait for each other on two cores take minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """On models as small as these, threads cost more than they bring."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_dit(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A DiTPipeline folder with random weights, see :func:`tests.models.tiny_dit`."""
    return models.tiny_dit(tmp_path_factory.mktemp("models") / "tiny-dit")
