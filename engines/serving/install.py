"""Find a Triton server on this machine, and the Python that its Python backend runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from dipgo.base.errors import DipgoError

VARIABLE = "TRITON_SERVER"
LEFT = "DIPGO_LEFT"  # the variable that names the folder of tickets whose clients have left
REQUIREMENTS = Path(__file__).parent / "deploy" / "requirements.txt"
PACKAGES = ("dipgo", "engines", "export")
PLACES = ("bin/tritonserver", "lib/python*/site-packages/pytriton/tritonserver/bin/tritonserver")
STUB = "triton_python_backend_stub"


@dataclass(frozen=True)
class Install:
    """A Triton server.

    Attributes:
        binary: ``tritonserver``.
        backends: its backends.
        python: the interpreter whose packages models see; of the same version as the server's stub.
        stubs: stubs by Python version, where the server has several to choose from (in the pytriton wheel); else None.
    """

    binary: Path
    backends: Path
    python: Path
    stubs: Path | None


@dataclass(frozen=True)
class Place:
    """Where and how a server is started.

    Attributes:
        backends: the folder of its backends.
        folder: its working directory, from which models import dipgo's packages.
        left: the folder in which models learn whose client has left.
        environment: its variables.
    """

    backends: Path
    folder: Path
    left: Path
    environment: dict[str, str]


def find_server(place: Path | None = None) -> Install:
    """Find Triton: at a place (the binary or a folder with it), ``TRITON_SERVER``, PATH, a container's place.

    Raises:
        DipgoError: there is none, or it lacks the Python backend.
    """
    place = place or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    if place is not None:
        binary = place if place.is_file() else next((path for each in PLACES for path in place.glob(each)), None)
        if binary is None:
            raise DipgoError(f"{place}: holds no tritonserver; {_cure()}")
    else:
        binary = Path(shutil.which("tritonserver") or "/opt/tritonserver/bin/tritonserver")
        if not binary.is_file():
            raise DipgoError(f"tritonserver is not on this machine's PATH; {_cure()}")
    root = binary.resolve().parents[1]
    backends = root / "backends"
    if not (backends / "python").is_dir():
        raise DipgoError(f"{backends / 'python'}: missing, so this Triton cannot run Python models; {_cure()}")
    wheel = root.parent.name == "pytriton"  # ENV/lib/pythonX.Y/site-packages/pytriton/tritonserver
    python = root.parents[4] / "bin" / "python" if wheel else Path(sys.executable)
    stubs = root / "python_backend_stubs"
    return Install(binary, backends, python, stubs if stubs.is_dir() else None)


def prepare(install: Install, scratch: Path) -> Place:
    """Check the server's Python, and return where to start the server.

    ``scratch`` must last as long as the server. It gets links: the stub of the right version beside the Python backend,
    and dipgo's packages as they run here, so that the server's Python needs public packages alone. The stub reads no
    ``PYTHONPATH`` but imports from its working directory first, so that is where they are.

    Raises:
        DipgoError: that Python lacks packages, or is of a version that the server has no stub for.
    """
    code, left = scratch / "code", scratch / "left"
    code.mkdir()
    left.mkdir()
    for name in PACKAGES:
        (code / name).symlink_to(Path(__file__).parents[2] / name, target_is_directory=True)
    path = f"{install.python.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"  # the stub takes its packages
    environment = {**os.environ, "PATH": path, LEFT: str(left)}
    version, numpy = _probe(install.python, code, environment)
    if install.stubs is None:
        return Place(install.backends, code, left, environment)
    stub = install.stubs / version / STUB
    if not stub.is_file():
        versions = ", ".join(sorted(entry.name for entry in install.stubs.iterdir()))
        raise DipgoError(f"{install.python}: is Python {version}, this Triton takes {versions}; use one of them")
    if not numpy.startswith("1."):  # the wheel's stub reads numpy's structures as they were before 2.0
        raise DipgoError(f"{install.python}: has numpy {numpy}, this Triton needs numpy<2; {_cure()}")
    python = scratch / "backends" / "python"
    python.mkdir(parents=True)
    for file in [stub, *(install.backends / "python").iterdir()]:
        if file.is_file() and not (python / file.name).exists():
            (python / file.name).symlink_to(file)
    return Place(scratch / "backends", code, left, environment)


def _probe(python: Path, code: Path, environment: dict[str, str]) -> tuple[str, str]:
    """Return the versions of Python (``3.11``) and numpy, having imported all that the model imports, as the stub."""
    script = (
        "import sys; sys.path.insert(0, ''); import json, numpy, onnxruntime, engines, engines.serving.requests;"
        "print(json.dumps(['%d.%d' % sys.version_info[:2], numpy.__version__]))"
    )
    command = [str(python), "-I", "-c", script]
    probe = subprocess.run(command, cwd=code, env=environment, capture_output=True, text=True, check=False)
    if probe.returncode:
        line = (probe.stderr.strip().splitlines() or ["it does not start"])[-1]
        raise DipgoError(f"{python}: {line}; run: {python} -m pip install -r {REQUIREMENTS}")
    version, numpy = json.loads(probe.stdout)
    return version, numpy


def _cure() -> str:
    return (
        "run: python3 -m venv triton && triton/bin/pip install nvidia-pytriton==0.7.0 "
        f"-r {REQUIREMENTS}, then give --server triton"
    )
