"""Arrays and streams on CUDA, on a stand-in for its runtime; and that the real bindings have what it stands for."""

import gc
import inspect

import numpy as np
import pytest

from engines.cuda.runtime import CudaError, Device, find_device, open_device
from engines.cuda.stream import Stream
from tests.checks import refused
from tests.engines.fake_cuda import FakeCuda


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    monkeypatch.setattr("engines.cuda.runtime.bindings", lambda: fake)
    return fake


def test_values_go_to_the_device_and_back(cuda):
    stream = Stream()
    array = stream.zeros([3, 4], "float16")
    assert array.shape == (3, 4)
    assert array.bytes == 24
    assert np.array_equal(stream.read(array), np.zeros((3, 4), np.float16))
    values = np.arange(12.0).reshape(3, 4)
    stream.write(array, values)
    values[:] = -1
    assert np.array_equal(stream.read(array), np.arange(12).reshape(3, 4).astype(np.float16))
    other = stream.zeros([3, 4], "float16")
    stream.copy(other, array)
    stream.write(array, np.float64(5))
    assert np.array_equal(stream.read(other), np.arange(12).reshape(3, 4).astype(np.float16))
    assert np.array_equal(stream.read(array), np.full((3, 4), 5, np.float16))
    with pytest.raises(ValueError, match="cannot be copied"):
        stream.copy(array, stream.zeros([3, 4], "float32"))
    half = stream.zeros([3], "bfloat16")  # rounded to nearest, and read as float32
    assert half.bytes == 6
    stream.write(half, np.array([1.0, 1 + 2**-8 + 2**-12, -(2.0**120)]))
    assert stream.read(half).dtype == np.float32
    assert stream.read(half).tolist() == [1.0, 1 + 2**-7, -(2.0**120)]


def test_views_are_those_of_numpy(cuda):
    stream = Stream()
    array, values = stream.zeros([2, 3, 4], "int64"), np.arange(24).reshape(2, 3, 4)
    stream.write(array, values)
    assert np.array_equal(stream.read(array[1]), values[1])
    assert np.array_equal(stream.read(array[-1][2]), values[-1][2])
    assert np.array_equal(stream.read(array.reshape(4, -1)[3]), values.reshape(4, -1)[3])
    stream.write(array[0][1], np.full(4, 9))
    assert stream.read(array)[0, 1].tolist() == [9] * 4
    for shape in ((5, -1), (25,)):
        with pytest.raises(ValueError, match="cannot reshape"):
            array.reshape(*shape)
    with pytest.raises(IndexError):
        array[2]


def test_memory_lives_as_long_as_a_view(cuda):
    stream = Stream()
    row = stream.zeros([2, 3], "float32")[1]
    gc.collect()
    assert len(cuda.live) == 1
    assert stream.read(row).tolist() == [0, 0, 0]
    del row
    gc.collect()
    assert cuda.live == {}


def test_captured_work_runs_when_it_is_launched_and_a_failed_capture_leaves_the_stream_usable(cuda):
    stream = Stream()
    source, target = stream.zeros([2], "float32"), stream.zeros([2], "float32")
    launch = stream.capture(lambda: stream.copy(target, source))
    stream.write(source, np.array([1, 2]))
    assert stream.read(target).tolist() == [0, 0]
    launch()
    assert stream.read(target).tolist() == [1, 2]
    with refused("capturing", CudaError):
        stream.capture(lambda: stream.write(source, np.zeros(2)))  # waits, which no capture can hold
    with pytest.raises(KeyError):
        stream.capture(lambda: {}["nothing"])
    stream.write(source, np.array([3, 4]))
    assert stream.read(source).tolist() == [3, 4]


def test_the_device_says_what_it_is_and_that_it_is_full(cuda):
    cuda.capability = (12, 1)
    assert open_device() == Device("Fake GPU", 121, 10**9)
    cuda.capacity = 3 * 10**9
    with refused(r"GPU's memory is full: 4.00 GB needed, 3.00 of 3.00 GB free; export with"):
        Stream().zeros([10**9], "float32")


def test_the_real_bindings_take_addresses_as_numbers():
    """Where there is no driver, a call of the right types is refused for that, one of wrong types is a TypeError."""
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings: pip install cuda-bindings")
    if find_device():
        pytest.skip("there is a GPU")
    kind = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
    mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeRelaxed
    for name, *arguments in (
        ("cudaMalloc", 8),
        ("cudaFree", 4096),
        ("cudaMemsetAsync", 4096, 0, 8, 4096),
        ("cudaMemcpyAsync", 4096, 4096, 8, kind, 4096),
        ("cudaStreamSynchronize", 4096),
        ("cudaStreamBeginCapture", 4096, mode),
        ("cudaStreamEndCapture", 4096),
        ("cudaMemGetInfo",),
    ):
        assert getattr(runtime, name)(*arguments)[0] == runtime.cudaError_t.cudaErrorInsufficientDriver


def test_the_real_bindings_have_these_names_and_parameters():
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings: pip install cuda-bindings")
    for name, function in inspect.getmembers(FakeCuda, inspect.isfunction):
        if not name.startswith("cuda"):
            continue
        real = getattr(runtime, name).__doc__.strip().splitlines()[0]
        inside = real[real.index("(") + 1 : real.rindex(")")]
        parameters = [part for part in inside.split(",") if part.strip()]
        assert len(parameters) == len(inspect.signature(function).parameters) - 1, real
    for kind in (FakeCuda.cudaMemcpyKind, FakeCuda.cudaStreamCaptureMode):
        real = runtime.cudaMemcpyKind if kind is FakeCuda.cudaMemcpyKind else runtime.cudaStreamCaptureMode
        assert {name: int(getattr(real, name)) for name in vars(kind)} == vars(kind)
