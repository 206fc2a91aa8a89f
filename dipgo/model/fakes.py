"""Torch keeps quiet where its fake tensors fail: what it logs and prints, the error says anyway."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

_TALKATIVE = ("fx.experimental.symbolic_shapes", "_subclasses.fake_tensor")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from logging and printing within the context."""
    loggers = [logging.getLogger(f"torch.{name}") for name in _TALKATIVE]
    before = [logger.disabled for logger in loggers]
    for logger in loggers:
        logger.disabled = True
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled
