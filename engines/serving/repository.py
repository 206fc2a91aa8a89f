"""A bundle as a Triton model repository.

``ROOT/NAME/config.pbtxt``, ``1/model.py``, ``1/bundle`` (a copy, or a link) and ``warmup/`` with the request that the
server sends itself before it says that it is ready.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from dipgo.base.errors import DipgoError, UsageError
from dipgo.base.files import Kind, files_below, new_folder
from dipgo.base.guidance import SCALE
from engines.backends import BACKENDS, DEFAULT
from engines.pipeline.control import nets_of
from engines.serving.limits import Limits
from engines.sizes import batch_of
from engines.trt.store import FOLDER as ENGINES
from engines.trt.store import record_path
from export.bundle import RECORD_FILE, files_of, open_bundle
from export.records.bundle import BundleRecord

MODEL = Path(__file__).with_name("model.py")
CONFIG, VERSION, BUNDLE, WARMUP = "config.pbtxt", "1", "bundle", "warmup"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


@dataclass(frozen=True)
class Deployment:
    """How a bundle is served.

    Attributes:
        name: the model's name in URLs; None takes the bundle's model's.
        backend: see :data:`engines.backends.BACKENDS`.
        instances: processes, each with a program of its own.
        threads: of each process, for backends on the CPU; None leaves the choice to them.
        link: link the bundle instead of copying it; the repository then works on this machine alone.
        limits: what requests may ask for.
    """

    name: str | None = None
    backend: str = DEFAULT
    instances: int = 1
    threads: int | None = None
    link: bool = False
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class _Input:
    name: str
    type: str
    optional: bool


def _files(model: Path) -> list[str]:
    """Return the files of a model's folder: what is written here, and what Python compiles of it."""
    bundle, code = model / VERSION / BUNDLE, model / VERSION / "__pycache__"
    files = [CONFIG, f"{VERSION}/{MODEL.name}", f"{VERSION}/{BUNDLE}"]  # the last where it is a link
    files += [f"{VERSION}/{BUNDLE}/{name}" for name in (RECORD_FILE, *files_of(bundle))]
    return files + [
        f"{folder.relative_to(model)}/{file}" for folder in (model / WARMUP, code) for file in files_below(folder)
    ]


REPOSITORY = Kind(f"{VERSION}/{BUNDLE}/{RECORD_FILE}", _files)


def write_repository(bundle: Path, root: Path, deployment: Deployment | None = None, force: bool = False) -> Path:
    """Write a model repository, or one more model into it; returns the model's folder ``root/name``.

    Raises:
        UsageError: the model is there already, without ``force``, or something else is; a name or backend that cannot
            be.
        DipgoError: not an intact bundle, or one that cannot turn a class or prompt into an image.
    """
    deployment = deployment or Deployment()
    if deployment.backend not in BACKENDS:
        raise UsageError(f"unknown backend '{deployment.backend}'; use {', '.join(BACKENDS)}")
    record = open_bundle(bundle).record
    _check_servable(record, bundle)
    engines = _engines(bundle) if deployment.backend == "tensorrt" else []
    name = deployment.name or _name_of(record.model.name)
    if not NAME.fullmatch(name):
        raise UsageError(f"model name '{name}' does not fit a URL; use up to 64 letters, digits, '_', '-' and '.'")
    target = root / name
    if deployment.link and bundle.resolve().is_relative_to(target.resolve()):
        raise UsageError(f"{bundle}: is the copy that the link would replace; link to the bundle that it was made from")
    if root.is_file():
        raise UsageError(f"{root}: is a file; give a folder for the model repository")
    with new_folder(target, force, REPOSITORY) as draft:
        (draft / CONFIG).write_text(config_text(record, name, deployment))
        version = draft / VERSION
        version.mkdir()
        shutil.copyfile(MODEL, version / "model.py")
        if deployment.link:
            (version / BUNDLE).symlink_to(bundle.resolve(), target_is_directory=True)
        else:
            _copy(bundle, [RECORD_FILE, *record.files, *engines], version / BUNDLE)
            open_bundle(version / BUNDLE)
        (draft / WARMUP).mkdir()
        for entry in _inputs(record):
            if entry.type == "TYPE_STRING" and not entry.optional:
                (draft / WARMUP / entry.name).write_bytes(_packed(_example(record)))
    return target


def config_text(record: BundleRecord, name: str, deployment: Deployment) -> str:
    """Return ``config.pbtxt``: what goes in and out, batching, the queue, warm-up, and what the model reads."""
    environment = Environment(loader=PackageLoader("engines.serving"), undefined=StrictUndefined, autoescape=False)
    assert record.decoder is not None
    channels, height, width = (size if isinstance(size, int) else -1 for size in record.decoder.output.shape[1:])
    limits, batch = deployment.limits, batch_of(record)
    return environment.get_template("config.pbtxt.jinja").render(
        name=name,
        batch=batch,
        inputs=_inputs(record),
        image=[height, width, channels],
        instances=deployment.instances,
        delay_us=round(limits.delay_ms * 1e3) if batch > 1 else 0,
        backend=deployment.backend,
        threads=deployment.threads or 0,
        limits=limits,
    )


def _inputs(record: BundleRecord) -> list[_Input]:
    kinds = {
        "class": [_Input("class", "TYPE_STRING", False)],
        "prompt": [_Input("prompt", "TYPE_STRING", False), _Input("negative_prompt", "TYPE_STRING", True)],
        "nothing": [],
    }
    seed = _Input("seed", "TYPE_INT64", record.conditioning.kind != "nothing")  # Triton wants one that is not optional
    chosen = [_Input(SCALE, "TYPE_FP32", True)] if record.conditioning.guidance else []
    if record.further:
        chosen += [_Input("steps", "TYPE_INT32", True), _Input("budget", "TYPE_FP32", True)]
    return [*kinds[record.conditioning.kind], seed, _Input("number", "TYPE_INT32", True), *chosen]


def _check_servable(record: BundleRecord, bundle: Path) -> None:
    if record.decoder is None:
        raise DipgoError(
            f"{bundle}: holds no VAE decoder, so there are no images to serve; export a pipeline that has one, with "
            "--pipeline"
        )
    if record.conditioning.kind == "prompt" and record.conditioning.encoder is None:
        raise DipgoError(f"{bundle}: holds no text encoder, so it takes no prompts; export it with --pipeline")
    if nets_of(record):
        raise DipgoError(f"{bundle}: has a ControlNet, whose pictures the server does not take; use it from Python")


def _example(record: BundleRecord) -> str:
    """Return the class or prompt of the warm-up."""
    if record.conditioning.kind == "prompt":
        return "a photo"
    return next(iter(record.conditioning.labels), "0")


def _packed(text: str) -> bytes:
    """Return a string as Triton lays it out: its length in four bytes, then its bytes."""
    content = text.encode()
    return len(content).to_bytes(4, "little") + content


def _name_of(model: str) -> str:
    """Return a name for URLs after a model's name, which may be a path."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(model).name).strip("-.")[:64] or "model"


def _engines(bundle: Path) -> list[str]:
    """Return the files of the bundle's TensorRT engines; one without a record is a build that was interrupted."""
    engines = [path for path in sorted((bundle / ENGINES).glob("*.engine")) if record_path(path).is_file()]
    if not engines:
        raise DipgoError(f"{bundle}: holds no TensorRT engines; run: dipgo build {bundle} --backend tensorrt")
    return [str(path.relative_to(bundle)) for engine in engines for path in (engine, record_path(engine))]


def _copy(bundle: Path, names: Iterable[str], target: Path) -> None:
    """Copy files by their names, readable by the server's user; a pipeline's folder may hold more than a bundle."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle / name, target / name)
        status = (bundle / name).stat()
        os.utime(target / name, ns=(status.st_atime_ns, status.st_mtime_ns))  # an engine's record knows when it changed
