"""Serve a model repository that lies ready, as containers do: ``python -m engines.serving /models``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dipgo.base.errors import DipgoError
from engines.serving.install import find_server
from engines.serving.server import serve
from engines.serving.triton import Addresses


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m engines.serving", description=__doc__)
    parser.add_argument("repository", type=Path)
    parser.add_argument("--server", type=Path, help="tritonserver, or a folder that holds it")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    parser.add_argument("--http-port", type=int, default=8000)
    parser.add_argument("--grpc-port", type=int, help="off by default; it has no gate before it")
    parser.add_argument("--metrics-port", type=int, default=8002, help="0 for none")
    arguments = parser.parse_args()
    try:
        addresses = Addresses(arguments.host, arguments.http_port, arguments.grpc_port, arguments.metrics_port or None)
        serve(arguments.repository, find_server(arguments.server), addresses, lambda line: print(line, flush=True))
    except DipgoError as error:
        print(f"dipgo: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
