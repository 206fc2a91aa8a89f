"""What reaches Triton's parser is written anew; whatever cannot be read strictly is one line."""

import json

import pytest

from dipgo.base.errors import UsageError
from engines.serving.protocol import TICKET, rewritten


def tensor(**changes):
    return {"name": "class", "datatype": "BYTES", "shape": [1, 1], "data": ["3"]} | changes


def request(*inputs, **changes):
    return json.dumps({"inputs": list(inputs)} | changes).encode()


def test_requests_in_order_keep_their_meaning():
    seed = tensor(name="seed", datatype="INT64", data=[-(2**63)])
    outputs = [{"name": "png", "parameters": {"binary_data": True}}]
    message = request(tensor(data=["ünï\n\0"]), seed, id="a1", outputs=outputs, parameters={"timeout": 5})
    body, length, wait_s = rewritten(message, None, "ticket")
    assert (length, wait_s) == (len(body), 5e-6)
    passed_on = json.loads(body)
    assert passed_on["inputs"][0]["data"] == ["ünï\n\0"]
    assert passed_on["inputs"][1]["data"] == [-(2**63)]
    assert (passed_on["id"], passed_on["outputs"], passed_on["parameters"]) == (
        "a1",
        outputs,
        {"timeout": 5, TICKET: "ticket"},
    )


def test_without_outputs_those_that_json_can_hold_are_meant():
    body, _, wait_s = rewritten(request(tensor()), None, "ticket")
    assert wait_s is None
    assert [output["name"] for output in json.loads(body)["outputs"]] == ["image", "seed"]


def test_binary_data_follows_the_new_header():
    head = request({"name": "class", "datatype": "BYTES", "shape": [1, 1], "parameters": {"binary_data_size": 5}})
    tail = b"\x01\0\0\0\xff"
    body, length, _ = rewritten(b" " * 7 + head + tail, str(len(head) + 7), "ticket")
    assert body[length:] == tail
    assert json.loads(body[:length])["inputs"][0]["parameters"] == {"binary_data_size": 5}


@pytest.mark.parametrize(
    ("body", "header", "line"),
    [
        (b"", None, "not valid JSON"),
        (b"{{", None, "not valid JSON"),
        (b"\xff\xfe", None, "not valid JSON"),
        (b'{"inputs": [NaN]}', None, "NaN is no number of JSON"),
        (b"[" * 300_000, None, "nested too deeply"),
        (b'{"inputs":' * 100_000, None, "nested too deeply"),
        (b"[]", None, "request: Input should be"),
        (b"{}", None, "inputs: Field required"),
        (request(tensor(data=None)), None, "give either data or binary_data_size"),
        (request(tensor(data=[3])), None, "inputs.0: data holds 3, which is no BYTES"),
        (request(tensor(data=[["3"]])), None, r'data holds \["3"\], which is no BYTES'),
        (request(tensor(datatype="INT64", data=[True])), None, "data holds true, which is no INT64"),
        (request(tensor(datatype="INT64", data=[1.5])), None, "data holds 1.5, which is no INT64"),
        (request(tensor(datatype="INT32", data=[2**31])), None, "data holds 2147483648, which is no INT32"),
        (b'{"inputs": [' + b"9" * 5000 + b"]}", None, "not valid JSON"),
        (request(tensor(datatype="FP64", data=[1.5])), None, "inputs.0.datatype: Input should be 'BYTES'"),
        (request(tensor(shape=[1, -1])), None, "inputs.0.shape.1: Input should be greater than or equal to 0"),
        (request(tensor(shape=[2**31 - 1] * 4)), None, "data has 1 elements"),
        (request(tensor(shape=[1, 2**70])), None, "inputs.0.shape.1"),
        (request(tensor(parameters={"shared_memory_region": "r"})), None, "shared_memory_region: Extra inputs"),
        (request(tensor(shape=[5000, 1], data=["3"] * 5000)), None, "data: List should have at most 4096 items"),
        (request(*[tensor()] * 17), None, "inputs: List should have at most 16 items"),
        (request(tensor(), id="x" * 200), None, "id: String should have at most 128"),
        (request(tensor(), outputs=[{"name": "png"}]), None, "output png cannot be JSON; ask for it with"),
        (request(tensor(data=["\ud800"])), None, "half a character"),
        (request(tensor()) + b"tail", None, "not valid JSON"),
        (request(tensor()), "-1", "is no number"),
        (request(tensor()), "٣", "is no number"),
        (request(tensor()), "9" * 40, "but the body has"),
        (request(tensor(data=None, parameters={"binary_data_size": 9})), None, "is 9 in all, but 0 bytes follow"),
    ],
)
def test_what_is_malformed_is_one_line(body, header, line):
    with pytest.raises(UsageError, match=line) as error:
        rewritten(body, header, "ticket")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300
