"""What ONNX Runtime's TensorRT provider keeps between runs, as far as it can be told without a GPU."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from engines.onnxrt.cuda import tensorrt_options


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def options(sha256, dtype="float32"):
        return tensorrt_options(SimpleNamespace(sha256=sha256, dtype=dtype))

    return options


def test_bundles_share_timings_but_no_engines(options):
    """Two bundles of the same graphs with other weights: ONNX Runtime gives their engines one name."""
    first, second = options("a" * 64), options("b" * 64)
    engines = {given["trt_engine_cache_path"] for given in (first, second)}
    timings = {given["trt_timing_cache_path"] for given in (first, second)}
    assert (len(engines), len(timings)) == (2, 1)
    assert all(Path(folder).is_dir() for folder in engines | timings)
    assert options("a" * 64) == first


def test_precision_is_the_bundle_s(options):
    found = {dtype: options("a" * 64, dtype) for dtype in ("float32", "float16", "bfloat16")}
    given = {dtype: (each["trt_fp16_enable"], each["trt_bf16_enable"]) for dtype, each in found.items()}
    assert given == {"float32": ("0", "0"), "float16": ("1", "0"), "bfloat16": ("0", "1")}
