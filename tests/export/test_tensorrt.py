"""TensorRT's own parser takes every graph; where tensorrt-rtx is installed, no GPU is needed for that."""

import pytest
import torch

from export.compiler import write_bundle
from export.config import ExportConfig
from export.plan.layouts import LAYOUTS
from tests import zoo
from tests.models import random_subnet

trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx: pip install -e '.[tensorrt-rtx]'")


def problems(path):
    """Return what the parser says against a graph; nothing where it takes it."""
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, trt.Logger(trt.Logger.ERROR))
    if parser.parse_from_file(str(path)):
        return []
    return [f"{parser.get_error(k).node_operator()}: {parser.get_error(k).desc()}" for k in range(parser.num_errors)]


@pytest.mark.parametrize(
    ("kind", "dtype"),
    zoo.some(
        [(kind, dtype) for kind in ("dit", "sd", "sdxl", "pixart") for dtype in (torch.float32, torch.float16)],
        {("dit", torch.float16), ("sd", torch.float16), ("sdxl", torch.float32), ("pixart", torch.float32)},
    ),
)
def test_no_node_is_unsupported(tmp_path, kind, dtype):
    traced, sampler = zoo.trace(kind, dtype=dtype), zoo.sampler(kind, 4)
    prepared = zoo.converted(traced)
    for seed, layout in enumerate(LAYOUTS):
        subnet = random_subnet(traced, sampler, seed, 0.5, 2, 2)
        write_bundle(prepared, subnet, sampler, tmp_path / "b", force=True, config=ExportConfig(graphs=layout))
        graphs = sorted((tmp_path / "b").glob("*.onnx"))
        assert graphs
        for path in graphs:
            assert problems(path) == [], path.name
