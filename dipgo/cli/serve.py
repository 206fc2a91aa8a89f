"""From a bundle to a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from pydantic import Field

from dipgo.base.config import Backend, Config, Threads
from dipgo.cli.options import BundleArgument, ForceOption

if TYPE_CHECKING:
    from engines.serving.repository import Deployment


class ServeConfig(Config):
    """How a bundle is served, and what requests may ask for."""

    name: str | None = Field(None, description="The model's name in URLs; the bundle's own by default.")
    backend: Backend = "onnxruntime"
    instances: int = Field(1, ge=1, le=1024, description="Processes, each with a program of its own.")
    threads: Threads = None
    max_prompt: int = Field(2000, ge=1, le=1_000_000, description="Characters of a prompt, at most.")
    max_images: int = Field(16, ge=1, le=1_000_000, description="Images of a request, at most.")
    queue: int = Field(64, ge=1, le=1_000_000, description="Requests that may wait; more are refused with 503.")
    wait: float = Field(60.0, ge=0.001, le=86_400, description="Seconds that a request may wait, then it is 503.")
    delay: float = Field(5.0, ge=0.001, le=60_000, description="Milliseconds that a batch waits to be filled.")

    def deployment(self, link: bool) -> Deployment:
        from engines.serving.limits import Limits
        from engines.serving.repository import Deployment

        limits = Limits(self.max_prompt, self.max_images, self.queue, self.wait, self.delay)
        return Deployment(self.name, self.backend, self.instances, self.threads, link, limits)


class AddressConfig(Config):
    """Where a server listens."""

    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for all.")
    http_port: int = Field(8000, ge=0, le=65535, description="HTTP; 0 takes any that is free.")
    grpc_port: int | None = Field(None, ge=1, le=65535, description="gRPC; off by default.")
    metrics_port: int = Field(8002, ge=0, le=65535, description="Prometheus metrics; 0 for none.")
    server: Path | None = Field(
        None, description="tritonserver, or a folder that holds it; TRITON_SERVER and PATH by default."
    )


def deploy(
    bundle: BundleArgument,
    triton: Annotated[Path, typer.Option("--triton", metavar="DIR", help="Model repository to write, or to add to.")],
    config: ServeConfig,
    link: Annotated[bool, typer.Option("--link", help="Link the bundle instead of copying it.")] = False,
    force: ForceOption = False,
) -> None:
    """Write a Triton model repository, for a server elsewhere.

    docs/guides/serving.md says how to go on.
    """
    from engines.serving.repository import write_repository

    typer.echo(f"model: {write_repository(bundle, triton, config.deployment(link), force)}")


def serve(bundle: BundleArgument, addresses: AddressConfig, config: ServeConfig) -> None:
    """Serve a bundle on this machine with Triton.

    The Triton Inference Server runs until Ctrl-C or SIGTERM.
    """
    import tempfile

    from dipgo.base.progress import spinner
    from engines.serving.install import find_server
    from engines.serving.repository import write_repository
    from engines.serving.server import serve as run
    from engines.serving.triton import Addresses

    install = find_server(addresses.server)
    places = Addresses(addresses.host, addresses.http_port, addresses.grpc_port, addresses.metrics_port or None)
    with tempfile.TemporaryDirectory(prefix="dipgo-models-") as folder:
        with spinner("check the bundle"):
            write_repository(bundle, Path(folder), config.deployment(link=True))
        run(Path(folder), install, places, typer.echo)
