"""What one request, and all of them together, may ask for."""

from __future__ import annotations

from dataclasses import dataclass, fields

from dipgo.base.errors import UsageError


@dataclass(frozen=True)
class Limits:
    """Limits of a deployment; all are above zero.

    Attributes:
        prompt: characters of a prompt, and of a negative prompt.
        images: images that one request may ask for.
        queue: requests that may wait; further ones are refused at once, with 503.
        wait_s: seconds that a request may wait; then it is refused, with 503.
        delay_ms: milliseconds that a batch which is not full waits for company; bundles of batch 1 never wait.

    Raises:
        UsageError: a limit that is not above zero.
    """

    prompt: int = 2000
    images: int = 16
    queue: int = 64
    wait_s: float = 60.0
    delay_ms: float = 5.0

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) <= 0:
                raise UsageError(f"limit '{field.name}' is {getattr(self, field.name):g}; give more than 0")
