"""The real Triton, started as a user starts it: its images, its refusals, its end.

``TRITON_SERVER``, PATH or ``build/serving`` (docs/guides/serving.md) must hold a server; without one these tests skip.
"""

import contextlib
import http.client
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from benchmarks.studies.attacks import nginx
from dipgo.base.errors import DipgoError
from engines.serving import processes, triton
from engines.serving.install import find_server
from engines.serving.limits import Limits
from engines.serving.repository import Deployment, write_repository
from export.compiler import write_bundle
from tests import zoo
from tests.models import random_subnet

ROOT = Path(__file__).parents[2]
SERVE = [sys.executable, "-m", "engines.serving"]
PLACE = ["--host", "127.0.0.1", "--http-port", "0", "--metrics-port"]


@pytest.fixture(scope="module")
def server():
    try:
        return find_server(ROOT / "build" / "serving" if (ROOT / "build" / "serving").is_dir() else None)
    except DipgoError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def bundles(server, tmp_path_factory):
    """A class model of batch 2 and a prompt model of batch 1; seven and four steps."""
    folder = tmp_path_factory.mktemp("serving")
    for name, steps, batch in (("dit", 7, 2), ("sd", 4, 1)):
        traced, sampler = zoo.trace(name), zoo.sampler(name, steps, None)
        subnet = random_subnet(traced, sampler, 2, terms=2, channels=2)
        write_bundle(zoo.converted(traced, batch), subnet, sampler, folder / name)
    return folder


class Server:
    """A server process and where it listens."""

    def __init__(self, binary, command, log, folder=ROOT):
        self.log = log
        environment = {**os.environ, "TRITON_SERVER": str(binary), "PYTHONPATH": str(ROOT)}
        with log.open("w") as stream:
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=stream, stderr=stream)
        deadline = time.time() + 120
        while "ready: http" not in self.text() and self.process.poll() is None and time.time() < deadline:
            time.sleep(0.1)
        self.port = int(self.text().split("ready: http://127.0.0.1:")[1].split(",")[0]) if self.is_up() else 0

    def text(self):
        return self.log.read_text()

    def is_up(self):
        return "ready: http" in self.text() and self.process.poll() is None

    def ask(self, path, body=None, headers=None):
        """Return status and body of a GET, or of a POST where there is a body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET" if body is None else "POST", path, body, headers or {})
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        return answer.status, content, answer.headers

    def infer(self, model, tensors, outputs=("image", "seed"), **parameters):
        """Return the status and either outputs by name or the error's line."""
        pictures = [{"name": name, "parameters": {"binary_data": True}} for name in outputs]
        body = json.dumps({**inference(tensors), "outputs": pictures, "parameters": parameters})
        status, content, headers = self.ask(f"/v2/models/{model}/infer", body)
        if status != 200:
            return status, json.loads(content)["error"]
        length = int(headers["Inference-Header-Content-Length"])
        entries, rest = {}, content[length:]
        for entry in json.loads(content[:length])["outputs"]:
            size = entry["parameters"]["binary_data_size"]
            entries[entry["name"]], rest = (entry, rest[:size]), rest[size:]
        return status, {name: decoded(*value) for name, value in entries.items()}

    def end(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


def inference(tensors):
    """Return what a request holds, of the kinds and values of its inputs."""
    inputs = [
        {"name": name, "datatype": kind, "shape": [len(data), 1], "data": data}
        for name, (kind, data) in tensors.items()
    ]
    return {"inputs": inputs}


def decoded(entry, content):
    if entry["datatype"] == "BYTES":
        return content[4:]  # of one element
    kind = {"UINT8": np.uint8, "INT64": np.int64}[entry["datatype"]]
    return np.frombuffer(content, kind).reshape(entry["shape"])


def request(label="dog", seed=None, number=None):
    tensors = {"class": ("BYTES", [label])}
    tensors |= {} if seed is None else {"seed": ("INT64", [seed])}
    return tensors | ({} if number is None else {"number": ("INT32", [number])})


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def up(server, bundles):
    """One server with both models, and a third whose queue holds two requests; its metrics are at ``metrics``."""
    models = bundles / "models"
    limits = Limits(prompt=60, images=16)
    write_repository(bundles / "dit", models, Deployment(name="dit", limits=limits))
    write_repository(bundles / "sd", models, Deployment(name="sd", limits=limits))
    write_repository(bundles / "dit", models, Deployment(name="short", limits=Limits(queue=2), link=True))
    port = free_port()
    running = Server(server.binary, [*SERVE, models, *PLACE, str(port)], bundles / "log")
    running.metrics = port
    assert running.is_up(), running.text()
    yield running
    assert running.end() == 0
    assert "Traceback" not in running.text()


@pytest.fixture(scope="module")
def generated(server, bundles):
    """``generated(bundle, given, seed, negative)``: ``Program.generate`` in the Python that the server uses."""

    def generate(name, subjects, seed, negative=None):
        script = f"""
import sys
import dipgo
with dipgo.load({str(bundles / name)!r}) as program:
    pixels = program.generate({subjects!r}, {seed}, negative={negative!r})
sys.stdout.buffer.write((pixels * 255).round().astype("uint8").tobytes())
"""
        done = subprocess.run([server.python, "-c", script], cwd=ROOT, capture_output=True, check=True)
        return np.frombuffer(done.stdout, np.uint8).reshape(len(subjects), *([16, 16, 3]))

    return generate


def test_images_are_the_programs_bit_for_bit(up, generated):
    status, answer = up.infer("dit", request("dog", 7, 3), ("image", "seed"))
    assert status == 200
    assert answer["image"].shape == (1, 3, 16, 16, 3)
    assert answer["seed"].tolist() == [[7]]
    assert np.array_equal(answer["image"][0], generated("dit", [1] * 3, 7))
    status, answer = up.infer("dit", {"class": ("BYTES", ["dog", "2"]), "seed": ("INT64", [5, 6])})
    assert np.array_equal(answer["image"][0], generated("dit", [1], 5))
    assert np.array_equal(answer["image"][1], generated("dit", [2], 6))


@pytest.mark.parametrize("negative", [None, "blue"])
def test_prompts_and_pictures(up, generated, negative):
    tensors = {"prompt": ("BYTES", ["a red fox, ünïcödé"]), "seed": ("INT64", [3])}
    tensors |= {} if negative is None else {"negative_prompt": ("BYTES", [negative])}
    expected = generated("sd", ["a red fox, ünïcödé"], 3, negative)[0]
    status, answer = up.infer("sd", tensors)
    assert status == 200
    assert np.array_equal(answer["image"][0, 0], expected)
    status, answer = up.infer("sd", tensors, ("png",))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(answer["png"]))), expected)


def test_without_a_seed_one_is_drawn_and_told(up):
    answers = [up.infer("dit", request("fox"))[1] for _ in range(2)]
    assert answers[0]["seed"] != answers[1]["seed"]
    for answer in answers:
        again = up.infer("dit", request("fox", int(answer["seed"][0, 0])))[1]
        assert np.array_equal(again["image"], answer["image"])


def test_requests_share_batches_and_keep_their_images(up):
    alone = {seed: up.infer("dit", request("cat", seed))[1]["image"] for seed in range(12)}
    together = {}
    threads = [
        threading.Thread(target=lambda seed=seed: together.update({seed: up.infer("dit", request("cat", seed))}))
        for seed in alone
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, image in alone.items():
        assert np.array_equal(together[seed][1]["image"], image)
    statistics = json.loads(up.ask("/v2/models/dit/stats")[1])["model_stats"][0]
    assert any(entry["batch_size"] == 2 for entry in statistics["batch_stats"])


@pytest.mark.parametrize(
    ("model", "tensors", "status", "message"),
    [
        ("dit", request("wolf\n" * 10), 400, "class 'wolf wolf"),
        ("dit", request("x" * 100), 400, "class has 100 characters; the limit is 60"),
        ("sd", {"prompt": ("BYTES", ["猫" * 61])}, 400, "prompt has 61 characters; the limit is 60"),
        ("sd", {"prompt": ("BYTES", ["x" * 500_000])}, 400, "prompt has 500000 bytes; the limit is 60 characters"),
        ("sd", {"prompt": ("BYTES", ["a"]), "negative_prompt": ("BYTES", ["x" * 61])}, 400, "negative_prompt has 61"),
        ("dit", request(seed=2**63), 400, "which is no INT64"),
        ("dit", request(number=0), 400, "number is 0; a request may ask for 1 to 16 images"),
        ("dit", request(number=-5), 400, "number is -5; a request may ask"),
        ("dit", request(number=2**31 - 1), 400, "a request may ask for 1 to 16 images"),
        ("dit", {"class": ("BYTES", ["0"] * 2), "number": ("INT32", [9] * 2)}, 400, "number is 9 for each of 2 rows"),
        ("dit", {"class": ("BYTES", ["0"] * 2), "number": ("INT32", [1, 2])}, 400, "number differs within a request"),
        ("dit", {"class": ("BYTES", ["0"] * 3)}, 400, "batch-size must be <= 2"),
        ("dit", {"class": ("INT64", [1])}, 400, "data-type is 'INT64'"),
        ("dit", {"prompt": ("BYTES", ["a fox"])}, 400, "prompt"),
        ("dit", {"seed": ("INT64", [1])}, 400, "class is missing"),
        ("wolf", request(), 404, "unknown model: 'wolf'"),
    ],
)
def test_wrong_requests_are_one_line_and_the_next_is_served(up, model, tensors, status, message):
    got, line = up.infer(model, tensors)
    assert got == status
    assert message in line
    assert "\n" not in line
    assert up.infer("dit", request(seed=1))[0] == 200


def framed(length, content):
    entry = {
        "name": "class",
        "datatype": "BYTES",
        "shape": [1, 1],
        "parameters": {"binary_data_size": 4 + len(content)},
    }
    head = json.dumps({"inputs": [entry]}).encode()
    return head + length.to_bytes(4, "little") + content, {"Inference-Header-Content-Length": str(len(head))}


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        ("/v2/models/dit/infer", b"x" * 100_000_000, {}, 413),
        ("/v2/models/dit/infer", b'{"inputs":' + b"[" * 400_000, {}, 400),  # Triton 2.51 alone dies of it
        ("/v2/models/dit/infer", b"", {}, 400),
        ("/v2/models/dit/infer", [b"[]"] * 100_000, {}, 400),  # in chunks
        ("/v2/models/dit/infer", [b" " * 10_000] * 300, {}, 413),
        ("/v2/models/dit/infer", *framed(100, b"abcd"), 400),
        ("/v2/models/dit/infer", *framed(4, b"\xff\xfe\xff\xfe"), 400),
        ("/v2/models/dit/infer", b"\x1f\x8b" * 10, {"Content-Encoding": "gzip"}, 415),
        ("/v2/models/dit/generate", b"{}", {}, 404),
        ("/v2/models/../../etc/passwd", None, {}, 404),
        ("/v2/models/dit/infer", None, {}, 405),
        ("/v2/repository/models/dit/unload", b"{}", {}, 404),
        ("/v2/systemsharedmemory/region/r/register", b"{}", {}, 404),
    ],
)
def test_malicious_requests_crash_nothing(up, path, body, headers, status):
    got, content, _ = up.ask(path, body, headers)
    assert got == status
    assert len(json.loads(content)["error"].splitlines()) == 1
    assert up.infer("dit", request(seed=1))[0] == 200


def test_beyond_the_queue_requests_are_refused_and_none_is_lost(up):
    answers = []
    start = threading.Barrier(24)

    def ask(seed):
        start.wait()
        answers.append(up.infer("short", request("dog", seed, 16)))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    statuses = [status for status, _ in answers]
    assert len(statuses) == 24
    assert set(statuses) == {200, 503}
    assert {line.split("] ")[-1] for status, line in answers if status == 503} == {"Exceeds maximum queue size"}


def test_a_request_may_wait_less_long(up):
    with ThreadPoolExecutor(8) as threads:
        busy = [threads.submit(up.infer, "dit", request("dog", seed, 16)) for seed in range(8)]
        while not all(answer.done() for answer in busy):
            status, line = up.infer("dit", request(seed=1), timeout=1)
            if status == 503:
                break
        assert (status, line) == (503, "Request timeout expired")
        assert {answer.result()[0] for answer in busy} == {200}


def test_clients_that_leave_take_their_requests_along(up):
    """Through the gate alone: what the model does then is in test_serving_requests.py."""
    alone = up.infer("dit", request("cat", 3))[1]["image"]
    body = json.dumps(inference(request("dog", 1, 16))).encode()
    head = f"POST /v2/models/dit/infer HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    for _ in range(64):
        with socket.create_connection(("127.0.0.1", up.port)) as client:
            client.sendall(head + body)
    assert np.array_equal(up.infer("dit", request("cat", 3))[1]["image"], alone)


def test_health_and_metrics(up):
    assert up.ask("/v2/health/live")[0] == up.ask("/v2/health/ready")[0] == up.ask("/v2/models/sd/ready")[0] == 200
    metrics = Server.ask(type("", (), {"port": up.metrics}), "/metrics")[1].decode()
    assert 'nv_inference_request_success{model="dit",version="1"}' in metrics


def test_a_real_client_is_served(up, generated):
    client = pytest.importorskip("tritonclient.http")
    label = client.InferInput("class", [1, 1], "BYTES")
    label.set_data_from_numpy(np.array([[b"dog"]], np.object_))
    seed = client.InferInput("seed", [1, 1], "INT64")
    seed.set_data_from_numpy(np.array([[9]]))
    with client.InferenceServerClient(f"127.0.0.1:{up.port}") as connection:
        assert connection.is_model_ready("dit")
        answer = connection.infer("dit", [label, seed], outputs=[client.InferRequestedOutput("image")])
    assert np.array_equal(answer.as_numpy("image")[0], generated("dit", [1], 9))


def test_serve_finishes_what_is_under_way_and_leaves_nothing(server, bundles, tmp_path, monkeypatch):
    """``dipgo serve`` itself, from a folder with other packages of our names; in the midst it is asked to end."""
    for name in ("dipgo", "engines", "export"):
        (tmp_path / "elsewhere" / name).mkdir(parents=True)
        (tmp_path / "elsewhere" / name / "__init__.py").write_text("raise SystemExit('another package')")
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    before = set(Path("/dev/shm").glob("dipgo-*"))  # of another server that runs
    command = [sys.executable, "-P", "-m", "dipgo.cli.main", "serve", bundles / "dit", "--name", "dit"]
    command += ["--http-port", "0", "--metrics-port", "0"]
    running = Server(server.binary, command, tmp_path / "log", tmp_path / "elsewhere")
    assert running.is_up(), running.text()
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(running.infer("dit", request("dog", 4, 16)))) for _ in range(12)
    ]
    for thread in threads:
        thread.start()
    while json.loads(running.ask("/v2/models/dit/stats")[1])["model_stats"][0]["execution_count"] < 3:
        time.sleep(0.01)
    children = psutil.Process(running.process.pid).children(recursive=True)
    assert running.end() == 0
    for thread in threads:
        thread.join()
    assert {status for status, _ in answers} <= {200, 503}
    images = [answer["image"] for status, answer in answers if status == 200]
    assert len(images) >= 2
    assert all(np.array_equal(image, images[0]) for image in images)
    assert {line for status, line in answers if status == 503} <= {"the server is shutting down"}
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    assert not list((tmp_path / "scratch").glob("dipgo-*"))
    assert set(Path("/dev/shm").glob("dipgo-*")) <= before
    assert "Traceback" not in running.text()


def test_a_stopped_process_is_not_ready_and_a_lost_one_ends_the_server(server, bundles, tmp_path):
    write_repository(bundles / "dit", tmp_path / "models", Deployment(name="dit", link=True))
    running = Server(server.binary, [*SERVE, tmp_path / "models", *PLACE, str(free_port())], tmp_path / "log")
    assert running.is_up(), running.text()
    server_process = psutil.Process(running.process.pid).children()[0]
    stub = server_process.children()[0]
    for process, name in ((stub, "a model's process"), (server_process, "Triton")):
        process.suspend()
        while process.status() != psutil.STATUS_STOPPED:
            time.sleep(0.01)
        assert running.ask("/v2/health/ready")[0] == running.ask("/v2/models/dit/ready")[0] == 503
        assert running.infer("dit", request(seed=1)) == (503, f"{name} is stopped")
        process.resume()
        assert running.ask("/v2/health/ready")[0] == running.infer("dit", request(seed=1))[0] == 200
    stub.kill()
    assert running.process.wait(60) == 1
    assert running.text().splitlines()[-1] == "dipgo: a model's process was ended by SIGKILL; start the server again"
    assert not server_process.is_running()


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_the_end_of_triton_is_told_as_it_was(server, bundles, tmp_path, sent):
    write_repository(bundles / "dit", tmp_path / "models", Deployment(name="dit", link=True))
    running = Server(server.binary, [*SERVE, tmp_path / "models", *PLACE, str(free_port())], tmp_path / "log")
    assert running.is_up(), running.text()
    psutil.Process(running.process.pid).children()[0].send_signal(sent)
    assert running.process.wait(60) == 1
    how = "was ended by SIGKILL" if sent == signal.SIGKILL else "ended by itself, code 0"
    assert running.text().splitlines()[-1].startswith(f"dipgo: Triton {how}")


def test_only_what_the_kernel_counts_is_want_of_memory(monkeypatch):
    """Tried by hand with a real one, in a control group whose limit was lowered."""
    process = object.__new__(triton.Triton)
    process._oom_kills = 3
    for count, reason in ((3, "was ended by SIGKILL"), (4, "was ended by the kernel, for want of memory: SIGKILL")):
        monkeypatch.setattr(processes, "oom_kills", lambda count=count: count)
        assert process._end(-9) == reason


def test_triton_ends_with_the_process_that_watches_it(server, bundles, tmp_path):
    write_repository(bundles / "dit", tmp_path / "models", Deployment(name="dit", link=True))
    running = Server(server.binary, [*SERVE, tmp_path / "models", *PLACE, str(free_port())], tmp_path / "log")
    assert running.is_up(), running.text()
    processes = psutil.Process(running.process.pid).children(recursive=True)
    running.process.kill()
    assert len(processes) == 2
    assert not psutil.wait_procs(processes, 60)[1]


def test_with_nginx_before_it(up):
    """The real nginx, with the configuration that is shipped."""
    if not shutil.which("nginx"):
        pytest.skip("nginx is not installed")
    head = b"POST /v2/models/dit/infer HTTP/1.1\r\nHost: a\r\nContent-Length: 500\r\n\r\n{"
    alone = up.infer("dit", request("cat", 3))[1]["image"]
    with nginx(up.port) as port, contextlib.ExitStack() as stack:
        front = Server.__new__(Server)
        front.port = port
        assert np.array_equal(front.infer("dit", request("cat", 3))[1]["image"], alone)
        assert front.infer("dit", request(number=-1))[0] == 400
        assert front.ask("/v2/health/ready")[0] == front.ask("/v2")[0] == 200
        for path, body, expected in (
            ("/v2/models/dit/infer", b"x" * 2_000_000, (413, "the body is over the limit")),
            ("/v2/repository/index", b"{}", (404, "no such path; see /v2/models/NAME, and POST /v2/models/NAME/infer")),
        ):
            status, content, _ = front.ask(path, body)
            assert (status, json.loads(content)["error"]) == expected
        for _ in range(40):  # none of them has its body yet: nobody else waits, but of this client it is enough
            client = socket.create_connection(("127.0.0.1", port), source_address=("127.0.0.2", 0))
            stack.enter_context(client).sendall(head)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60, source_address=("127.0.0.2", 0))
        connection.request("POST", "/v2/models/dit/infer", json.dumps(inference(request(seed=1))))
        answer = connection.getresponse()
        assert (answer.status, answer.headers["Retry-After"]) == (503, "1")
        assert "too many requests under way" in json.loads(answer.read())["error"]
        connection.close()
        assert front.infer("dit", request(seed=1))[0] == 200


def test_a_model_that_does_not_load_is_one_line(server, bundles, tmp_path):
    model = write_repository(bundles / "dit", tmp_path / "models", Deployment(name="dit"))
    weights = next((model / "1" / "bundle").glob("transformer/*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    running = Server(server.binary, [*SERVE, tmp_path / "models", *PLACE, str(free_port())], tmp_path / "log")
    assert running.process.wait(60) == 1
    last = running.text().splitlines()[-1]
    assert last.startswith("dipgo: Triton ended by itself")
    assert f"{weights.name}: altered since the bundle was made" in last


def test_a_port_in_use_is_one_line(server, up, bundles, tmp_path):
    command = [*SERVE, bundles / "models", "--host", "127.0.0.1", "--metrics-port", str(free_port())]
    running = Server(server.binary, [*command, "--http-port", str(up.port)], tmp_path / "log")
    assert running.process.wait(60) == 1
    assert f"dipgo: 127.0.0.1:{up.port}: cannot be listened on" in running.text().splitlines()[-1]
