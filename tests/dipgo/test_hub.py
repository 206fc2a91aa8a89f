"""Models of a hub, here a small server: configurations come first, then one variant of the weights."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from dipgo.model.hub import files_of_one_variant
from tests import zoo

COMMIT = "0" * 40


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (["unet/m.safetensors", "unet/m.fp16.safetensors", "vae/m.safetensors"], ["unet/m", "vae/m"]),
        (["unet/m.fp16.safetensors", "vae/m.safetensors", "vae/m.fp16.safetensors"], ["unet/m.fp16", "vae/m.fp16"]),
        (["unet/m.fp16.safetensors", "vae/m.safetensors"], ["unet/m.fp16", "vae/m"]),
        (["unet/m-1-of-2.safetensors", "unet/m-2-of-2.safetensors"], ["unet/m-1-of-2", "unet/m-2-of-2"]),
        (["unet/m.fp16-1-of-1.safetensors", "unet/m-1-of-1.safetensors"], ["unet/m-1-of-1"]),
        (["m.safetensors", "other/m.safetensors", "unet/old/m.safetensors", "unet/m.bin"], []),
    ],
)
def test_one_variant_of_each_component(files, expected):
    chosen = files_of_one_variant(files, ["unet", "vae", "scheduler"])
    assert chosen == [f"{name}.safetensors" for name in expected]


@pytest.fixture
def hub(tmp_path):
    """Serve a pipeline's folder with further files as the repository ``some/model``; yield it and what was fetched."""
    folder = zoo.once("hub/model", zoo.PIPELINES["sd"])
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"another variant")
    (folder / "v1-5-pruned.safetensors").write_bytes(b"the same again")
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    fetched = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.do_GET()

        def do_GET(self):
            path = self.path.split("?")[0]
            if path.startswith("/api/models/some/model/tree"):
                return self.answer(
                    json.dumps([{"type": "file", "path": name, "size": 1, "oid": "0"} for name in files])
                )
            if path.startswith("/api/models/some/model"):
                siblings = [{"rfilename": name} for name in files]
                return self.answer(json.dumps({"id": "some/model", "sha": COMMIT, "siblings": siblings}))
            name = path.split(f"/some/model/resolve/{COMMIT}/")[-1]
            if self.command == "GET":
                fetched.append(name)
            return self.answer(files[name].read_bytes(), name) if name in files else self.send_error(404)

        def answer(self, content, name="json"):
            content = content if isinstance(content, bytes) else content.encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("ETag", f'"{name.replace("/", "-")}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HUB_DISABLE_XET": "1",
    }

    def find(cache):
        env = environment | {"HF_HOME": str(tmp_path / cache)}
        code = "from dipgo.model.models import find_model; print(find_model('some/model').identity().weights_sha256)"
        return subprocess.run([sys.executable, "-c", code], check=False, env=env, capture_output=True, text=True)

    yield folder, files, fetched, find
    server.shutdown()


def test_configurations_are_judged_before_weights_are_fetched(hub):
    folder, files, fetched, find = hub
    index = json.loads((folder / "model_index.json").read_text())
    other = folder / "other.json"
    other.write_text(json.dumps(index | {"_class_name": "StableDiffusionImg2ImgPipeline"}))
    plain, files["model_index.json"] = files["model_index.json"], other
    assert "starts from pictures" in find("judged").stderr
    assert fetched
    assert not [name for name in fetched if name.endswith(".safetensors")]

    files["model_index.json"] = plain
    found = find("fetched")
    assert found.stdout.strip() == zoo.model("sd").identity().weights_sha256, found.stderr
    assert {name for name in fetched if name.endswith(".safetensors")} == {
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
    }
