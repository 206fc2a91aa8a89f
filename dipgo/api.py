"""What ``import dipgo`` gives. Beside the command line, the only place that knows all packages."""

from engines.attach.pipeline import attach, detach
from engines.pipeline.pipeline import load

__all__ = ["attach", "detach", "load"]
