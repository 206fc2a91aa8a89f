"""Every operator of the torch backend against ONNX Runtime, in each way in which exports use it."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from engines.torchrt.loader import module_from_graph
from engines.torchrt.operators import OPERATORS
from engines.torchrt.weights import Weights
from tests.checks import refused

RANDOM = np.random.default_rng(0)
A, B, ROW = (RANDOM.standard_normal(shape).astype(np.float32) for shape in [(2, 3, 4), (2, 3, 4), (4,)])
POSITIVE, TRUTH, OTHER = abs(A) + 0.1, A > 0, B > 0
PICTURE, QUERY, KEY, VALUE = (
    RANDOM.standard_normal(shape).astype(np.float32)
    for shape in [(2, 4, 6, 5), (2, 3, 5, 8), (2, 3, 7, 8), (2, 3, 7, 8)]
)
KERNEL, WIDE, BIAS = (RANDOM.standard_normal(shape).astype(np.float32) for shape in [(8, 4, 3, 3), (8, 1, 3, 3), (8,)])
MATRIX, MASK, NUMBERS = (RANDOM.standard_normal(shape).astype(np.float32) for shape in [(6, 4), (5, 7), (3, 5, 7)])
WHOLE = np.array([[7, -7, 3], [2, -9, 0]])
INFINITE = np.array([1, np.inf, -np.inf, np.nan], np.float32)


def ints(*values):
    return np.array(values, np.int64)


def floats(*values):
    return np.array(values, np.float32)


SAME = {"pads": [1, 1, 1, 1], "strides": [1, 1], "dilations": [1, 1], "kernel_shape": [3, 3], "auto_pad": "NOTSET"}
RESIZE = {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
NORM = {"epsilon": 1e-6, "stash_type": 1}
CASES = [
    *(("Attention", [QUERY, KEY, VALUE], options) for options in [{}, {"is_causal": 1}, {"scale": 1.0}]),
    ("Attention", [QUERY, KEY, VALUE, MASK], {"scale": 0.3}),
    ("Attention", [QUERY, KEY, VALUE, np.broadcast_to(MASK, (2, 1, 5, 7))], {}),
    ("Attention", [QUERY, KEY, VALUE, MASK > -1], {}),
    ("Attention", [np.concatenate([QUERY, QUERY[:, :1]], 1), KEY[:, :2], VALUE[:, :2]], {}),
    ("Conv", [PICTURE, KERNEL, BIAS], SAME),
    ("Conv", [PICTURE, KERNEL], SAME | {"strides": [2, 2]}),
    ("Conv", [PICTURE, KERNEL, BIAS], SAME | {"pads": [0, 0, 1, 1], "strides": [2, 2]}),
    ("Conv", [PICTURE, WIDE, BIAS], SAME | {"group": 4}),
    ("Conv", [PICTURE, KERNEL[..., :1, :1], BIAS], {"kernel_shape": [1, 1]}),
    ("Conv", [PICTURE[:, :, 0], KERNEL[:, :, 0], BIAS], {"pads": [2, 2], "dilations": [2]}),
    ("Gemm", [MATRIX, MATRIX[:5], BIAS[:5]], {"transB": 1}),
    ("Gemm", [MATRIX, MATRIX[:5]], {"transB": 1}),
    ("Gemm", [MATRIX[:4], MATRIX[:4], BIAS[:4]], {"transA": 1}),
    ("GroupNormalization", [PICTURE, BIAS[:4], BIAS[4:]], {"num_groups": 2} | NORM),
    ("LayerNormalization", [A, ROW, BIAS[:4]], {"axis": -1} | NORM),
    ("LayerNormalization", [A, ROW], {"axis": -1} | NORM),
    ("LayerNormalization", [A, A[0]], {"axis": 1} | NORM),
    ("RMSNormalization", [A, ROW], {"axis": -1} | NORM),
    ("RMSNormalization", [A, A[0]], {"axis": 1} | NORM),
    ("Resize", [PICTURE, None, floats(1, 1, 2, 2)], RESIZE),
    ("Resize", [PICTURE, None, None, ints(2, 4, 9, 10)], RESIZE),
    ("DepthToSpace", [PICTURE], {"blocksize": 2, "mode": "CRD"}),
    *(("Gelu", [A], {"approximate": way}) for way in ("none", "tanh")),
    *(("Gather", [A, index], {"axis": axis}) for index in (ints(2, -1, 0), ints(-2)[0], WHOLE % 3) for axis in (1, -2)),
    ("GatherND", [A, ints([0, 1], [1, -1])], {}),
    ("ScatterND", [A, ints([[0, 1]], [[1, -1]]), A[:, :1]], {}),
    ("Slice", [A, ints(1), ints(2**62), ints(-1), ints(2)], {}),
    ("Slice", [A, ints(0, -2), ints(1, -1)], {}),
    ("Split", [A], {"axis": 1, "num_outputs": 2}),
    ("Split", [A, ints(1, 3)], {"axis": 2}),
    ("Pad", [A, ints(0, 1, 2, 0, 0, 1)], {}),
    ("Pad", [A, ints(1, 2), floats(7)[0], ints(-2)], {"mode": "constant"}),
    ("Reshape", [A, ints(0, -1)], {"allowzero": 0}),
    ("Transpose", [A], {"perm": [2, 0, 1]}),
    ("Transpose", [A], {}),
    ("Unsqueeze", [A, ints(0, -1)], {}),
    ("Squeeze", [A[:1], ints(0)], {}),
    ("Squeeze", [A[:1, :1]], {}),
    ("Expand", [ROW, ints(2, 1, 1)], {}),
    ("Expand", [A, ints(1)], {}),
    ("Tile", [A, ints(1, 3, 2)], {}),
    ("Concat", [A, B, A], {"axis": -2}),
    *(("Cast", [A * 3], {"to": to}) for to in (1, 6, 7, 9, 10, 11)),
    ("Cast", [TRUTH], {"to": 1}),
    ("Div", [A, POSITIVE], {}),
    ("Div", [WHOLE, ints(2, 4, 5)], {}),
    ("Pow", [POSITIVE, floats(0.5)[0]], {}),
    ("Pow", [A, ints(2)], {}),
    ("Clip", [A, floats(-0.5)[0], floats(0.5)[0]], {}),
    ("Clip", [A, None, floats(0.5)[0]], {}),
    ("ArgMax", [ints([3, 5, 5], [1, 1, 0]).astype(np.int32)], {"axis": -1, "keepdims": 0, "select_last_index": 0}),
    ("IsInf", [INFINITE], {}),
    ("Softmax", [A], {"axis": -1}),
    *((name, [A, ints(-1)], {"keepdims": 1, "noop_with_empty_axes": 0}) for name in ("ReduceMean", "ReduceMax")),
    *((name, [A], {"keepdims": 0}) for name in ("ReduceMean", "ReduceMax")),
    ("Shape", [A], {"start": 1}),
    ("Range", [ints(2)[0], ints(9)[0], ints(3)[0]], {}),
    ("Where", [TRUTH, A, ROW], {}),
    *((name, [A, B, ROW], {}) for name in ("Max", "Min")),
    *((name, [A, ROW], {}) for name in ("Add", "Sub", "Mul", "Greater", "Less")),
    ("MatMul", [A, MATRIX.T], {}),
    ("MatMul", [QUERY, KEY.swapaxes(2, 3)], {}),
    ("Equal", [WHOLE, ints(7, 1, 0)], {}),
    *((name, [TRUTH, OTHER], {}) for name in ("And", "Or")),
    ("Not", [TRUTH], {}),
    *((name, [POSITIVE], {}) for name in ("Log", "Reciprocal", "Sqrt")),
    *((name, [A], {}) for name in ("Abs", "Cos", "Exp", "Identity", "Neg", "Relu", "Sigmoid", "Sin", "Tanh")),
]


def saved(path, name, inputs, attributes, held=(), outputs=1):
    """Save a model of one node; the inputs at positions ``held`` are constants of the graph."""
    names = ["" if values is None else f"x{k}" for k, values in enumerate(inputs)]
    kinds = [None if values is None else helper.np_dtype_to_tensor_dtype(values.dtype) for values in inputs]
    node = helper.make_node(name, names, [f"y{k}" for k in range(outputs)], **attributes)
    given = [
        helper.make_tensor_value_info(names[k], kinds[k], values.shape)
        for k, values in enumerate(inputs)
        if values is not None and k not in held
    ]
    constants = [numpy_helper.from_array(inputs[k], names[k]) for k in held if k < len(inputs) and names[k]]
    results = [helper.make_empty_tensor_value_info(f"y{k}") for k in range(outputs)]
    graph = helper.make_graph([node], "one", given, results, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), path)
    return {value.name: np.asarray(inputs[names.index(value.name)]) for value in given}


def lifted(path):
    return module_from_graph(path, Weights(path.parent, torch.device("cpu")))


def test_every_operator_has_a_case():
    assert {name for name, _, _ in CASES} == set(OPERATORS)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_equals_onnx_runtime(tmp_path, case, half):
    name, inputs, attributes = case
    held = OPERATORS[name].numbers
    if half:
        floating = [k for k, values in enumerate(inputs) if values is not None and values.dtype == np.float32]
        chosen = [k for k in floating if k not in held or name == "Pad"]
        inputs = [values.astype(np.float16) if k in chosen else values for k, values in enumerate(inputs)]
    outputs = {"Split": attributes.get("num_outputs", 2)}.get(name, 1)
    feeds = saved(tmp_path / "one.onnx", name, inputs, attributes, held, outputs)
    expected = onnxruntime.InferenceSession(tmp_path / "one.onnx", providers=["CPUExecutionProvider"]).run(None, feeds)
    made = lifted(tmp_path / "one.onnx")
    actual = made.module(*(torch.from_numpy(feeds[given.name].copy()) for given in made.inputs))
    assert len(actual) == len(expected)
    tolerance = 2e-2 if half else 1e-5
    for one, other in zip(actual, expected, strict=True):
        assert one.numpy().dtype == other.dtype
        assert one.shape == other.shape
        np.testing.assert_allclose(one.double().numpy(), other.astype(np.float64), tolerance, tolerance)


def test_what_no_export_makes_is_refused(tmp_path):
    path = tmp_path / "one.onnx"
    for name, inputs, attributes, message in (
        ("Cosh", [A], {}, "operator Cosh is unknown"),
        ("Resize", [PICTURE, None, floats(1, 1, 2, 2)], {"mode": "cubic"}, "Resize with cubic"),
        ("DepthToSpace", [PICTURE], {"blocksize": 2, "mode": "DCR"}, "DepthToSpace with mode DCR"),
        ("Attention", [QUERY, KEY, VALUE], {"softcap": 2.0}, "Attention with three axes, a soft cap"),
        ("LayerNormalization", [A, ROW], {"stash_type": 10}, "without statistics in float32"),
        ("Slice", [A, ints(3), ints(0), ints(-1), ints(-1)], {}, "Slice backwards"),
    ):
        saved(path, name, inputs, attributes, OPERATORS[name].numbers if name in OPERATORS else ())
        with refused(rf"one.onnx: .*{message}.*; use another backend"):
            lifted(path)
    saved(path, "Reshape", [A, ints(24)], {})
    with refused("Reshape with 'x1' computed by the graph"):
        lifted(path)


def test_open_sizes_are_given(tmp_path):
    """A graph of any number of rows, whose Reshape computes its sizes from its input's."""
    nodes = [
        helper.make_node("Shape", ["x"], ["sizes"], end=1),
        helper.make_node("Concat", ["sizes", "rest"], ["wanted"], axis=0),
        helper.make_node("Reshape", ["x", "wanted"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 3, 4])
    graph = helper.make_graph(
        nodes, "open", [x], [helper.make_empty_tensor_value_info("y")], [numpy_helper.from_array(ints(-1), "rest")]
    )
    path = tmp_path / "open.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), path)
    with refused("shape of input 'x' is open; give it"):
        lifted(path)
    for rows in (1, 5):
        made = module_from_graph(path, Weights(tmp_path, torch.device("cpu")), {"x": (rows, 3, 4)})
        assert made.module(torch.ones(rows, 3, 4))[0].shape == (rows, 12)
        assert [node.target for node in made.module.graph.nodes if node.op == "call_function"] == [
            OPERATORS["Reshape"].run
        ]


@pytest.mark.parametrize(
    ("location", "offset", "message"),
    [("w.bin", 8, "lies outside the file"), ("../w.bin", 0, "no weights file of this bundle")],
)
def test_weights_elsewhere_are_refused(tmp_path, location, offset, message):
    folder = tmp_path / "bundle"
    folder.mkdir()
    for place in (tmp_path, folder):
        (place / "w.bin").write_bytes(ROW.tobytes())
    saved(folder / "one.onnx", "Add", [A, ROW], {}, held=[1])
    model = onnx.load(folder / "one.onnx")
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": str(offset), "length": "16"}.items():
        weight.external_data.add(key=key, value=value)
    onnx.save(model, folder / "one.onnx")
    with refused(message):
        lifted(folder / "one.onnx")
