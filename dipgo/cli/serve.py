"""From a bundle to a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dipgo.cli.options import BundleArgument, ForceOption, ThreadsOption

if TYPE_CHECKING:
    from engines.serving.repository import Deployment

NameOption = Annotated[str | None, typer.Option(help="The model's name in URLs; the bundle's own by default.")]
BackendOption = Annotated[str, typer.Option(help="What runs the graphs.")]
InstancesOption = Annotated[int, typer.Option(min=1, max=1024, help="Processes, each with a program of its own.")]
MaxPromptOption = Annotated[int, typer.Option(min=1, max=1_000_000, help="Characters of a prompt, at most.")]
MaxImagesOption = Annotated[int, typer.Option(min=1, max=1_000_000, help="Images of a request, at most.")]
QueueOption = Annotated[
    int, typer.Option(min=1, max=1_000_000, help="Requests that may wait; more are refused with 503.")
]
WaitOption = Annotated[
    float, typer.Option(min=0.001, max=86_400, help="Seconds that a request may wait, then it is 503.")
]
DelayOption = Annotated[
    float, typer.Option(min=0.001, max=60_000, help="Milliseconds that a batch waits to be filled.")
]


def deploy(
    bundle: BundleArgument,
    triton: Annotated[Path, typer.Option("--triton", metavar="DIR", help="Model repository to write, or to add to.")],
    name: NameOption = None,
    link: Annotated[bool, typer.Option("--link", help="Link the bundle instead of copying it.")] = False,
    backend: BackendOption = "onnxruntime",
    instances: InstancesOption = 1,
    threads: ThreadsOption = None,
    max_prompt: MaxPromptOption = 2000,
    max_images: MaxImagesOption = 16,
    queue: QueueOption = 64,
    wait: WaitOption = 60.0,
    delay: DelayOption = 5.0,
    force: ForceOption = False,
) -> None:
    """Write a model repository for the Triton Inference Server; docs/serving.md says how to go on."""
    from engines.serving.repository import write_repository

    limits = (max_prompt, max_images, queue, wait, delay)
    target = write_repository(bundle, triton, _deployment(name, backend, instances, threads, link, limits), force)
    typer.echo(f"model: {target}")


def serve(
    bundle: BundleArgument,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="HTTP; 0 takes any that is free.")] = 8000,
    grpc_port: Annotated[int | None, typer.Option(min=1, max=65535, help="gRPC; off by default.")] = None,
    metrics_port: Annotated[int, typer.Option(min=0, max=65535, help="Prometheus metrics; 0 for none.")] = 8002,
    server: Annotated[
        Path | None, typer.Option(help="tritonserver, or a folder that holds it; TRITON_SERVER and PATH by default.")
    ] = None,
    name: NameOption = None,
    backend: BackendOption = "onnxruntime",
    instances: InstancesOption = 1,
    threads: ThreadsOption = None,
    max_prompt: MaxPromptOption = 2000,
    max_images: MaxImagesOption = 16,
    queue: QueueOption = 64,
    wait: WaitOption = 60.0,
    delay: DelayOption = 5.0,
) -> None:
    """Serve a bundle on this machine with the Triton Inference Server, until Ctrl-C or SIGTERM."""
    import tempfile

    from dipgo.cli.progress import spinner
    from engines.serving.install import find_server
    from engines.serving.repository import write_repository
    from engines.serving.server import serve as run
    from engines.serving.triton import Addresses

    install = find_server(server)
    limits = (max_prompt, max_images, queue, wait, delay)
    with tempfile.TemporaryDirectory(prefix="dipgo-models-") as folder:
        with spinner("check the bundle"):
            write_repository(bundle, Path(folder), _deployment(name, backend, instances, threads, True, limits))
        run(Path(folder), install, Addresses(host, http_port, grpc_port, metrics_port or None), typer.echo)


def _deployment(
    name: str | None,
    backend: str,
    instances: int,
    threads: int | None,
    link: bool,
    limits: tuple[int, int, int, float, float],
) -> Deployment:
    from engines.serving.limits import Limits
    from engines.serving.repository import Deployment

    return Deployment(name, backend, instances, threads, link, Limits(*limits))
