"""Files that are handed in may be anything, and errors that quote them stay one line."""

import os
import signal

import numpy as np
import pytest
from safetensors.numpy import save_file

from benchmarks.bench.suite import load_suite
from benchmarks.studies.prompts import prompts_of
from dipgo.base.errors import DipgoError, not_imported
from dipgo.base.inputs import DEEPEST, parse_yaml, read_json, read_tensors, read_text
from dipgo.base.safetensors_index import read_file
from dipgo.base.text import LONGEST, printable
from dipgo.cli import main as command_line
from dipgo.cli.recipe_file import read_recipe
from dipgo.importers.importer import read_schedule
from dipgo.model.prompts import read_prompts
from dipgo.schedule.subnet import load_subnet
from tests.command import dipgo

READERS = {
    "json": lambda path: read_json(path, "thing"),
    "tensors": lambda path: read_tensors(path, "thing", "make it again"),
    "schedule": read_schedule,
    "SubNet": load_subnet,
    "prompts": read_prompts,
    "captions.json": prompts_of,
    "table.tsv": prompts_of,
    "recipe.yaml": read_recipe,
    "suite.yaml": lambda path: load_suite(str(path)),
    "header": read_file,
}


@pytest.fixture
def patience():
    """Fail a test that waits for a pipe, or reads without end."""

    def end(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("reader", list(READERS))
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "sparse file", "link to itself"])
def test_only_regular_files_of_limited_size_are_read(reader, kind, tmp_path, patience):
    path = tmp_path / reader
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to itself":
        path.symlink_to(path.name)
    else:
        with path.open("wb") as stream:
            stream.truncate(50 * 2**30)
    with pytest.raises(DipgoError, match=reader) as caught:
        READERS[reader](path)
    assert str(tmp_path) in str(caught.value)


def test_files_that_say_they_are_empty_are_read_no_further_either():
    with pytest.raises(DipgoError, match="larger than any thing"):
        read_text("/proc/self/status", "thing", largest=100)


@pytest.mark.parametrize("depth", [DEEPEST, DEEPEST + 2, 500, 200_000])
def test_values_are_nested_so_deep_and_no_deeper(depth, tmp_path):
    (tmp_path / "x.json").write_text("[" * depth + "]" * depth)
    if depth <= DEEPEST:
        assert read_json(tmp_path / "x.json", "thing")
    else:
        with pytest.raises(DipgoError, match=r"x\.json: not a readable thing \(nested more than 64 levels deep\)"):
            read_json(tmp_path / "x.json", "thing")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("&a [*a]", "aliases"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]", "aliases"),
        ("2024-13-45", "month must be in 1..12"),
        ("!!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("[" * 20_000, "levels deep|expected"),
        ("{[a]: {}}", "unhashable"),
    ],
)
def test_settings_are_plain_values(text, message):
    with pytest.raises(ValueError, match=message):
        parse_yaml(text)


@pytest.mark.parametrize("kind", ["BF16", "F8_E4M3", "F4", "I64", "U8", "C64"])
def test_tensors_are_real_numbers_that_numpy_has(kind, tmp_path):
    save_file({"a": np.ones(4, np.float32)}, tmp_path / "t")
    data = (tmp_path / "t").read_bytes()
    size = {"BF16": 8, "F8_E4M3": 16, "F4": 32, "I64": 2, "U8": 16, "C64": 2}[kind]
    header = f'{{"a":{{"dtype":"{kind}","shape":[{size}],"data_offsets":[0,16]}}}}'.encode()
    (tmp_path / "t").write_bytes(len(header).to_bytes(8, "little") + header + data[-16:])
    with pytest.raises(DipgoError, match=f"of the type {kind}, not one of F64, F32, F16; save it again"):
        read_tensors(tmp_path / "t", "weights", "save it again")


@pytest.mark.parametrize(
    "text", ["\x1b[2Jgone", "a\r\nb", "\u202egnp.exe", "\ud800", "\x07" * 10**6, "x" * 10**6, "\x85\x9b31m"]
)
def test_errors_are_one_line_that_can_be_shown(text):
    for line in (printable(text), str(DipgoError(f"s.json: {text}; search again"))):
        assert len(line) <= LONGEST
        assert line.isprintable()
    assert str(DipgoError(f"s.json: {text}; search again")).startswith("s.json: ")
    assert str(DipgoError(f"s.json: {text}; search again")).endswith("search again")


def test_a_package_that_cannot_be_loaded_is_not_said_to_be_missing():
    missing = ModuleNotFoundError("No module named 'x'", name="x")
    assert str(not_imported("x", missing, "run: pip install x")) == "x is not installed; run: pip install x"
    short = ImportError("libx.so: failed to map segment from shared object")
    assert str(not_imported("x", short, "run: pip install x")).startswith("x cannot be imported: out of memory; ")
    other = ImportError("libx.so: undefined symbol: y")
    assert str(not_imported("x", other, "")) == "x cannot be imported: libx.so: undefined symbol: y"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (MemoryError(), "dipgo: out of memory; end other programs"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "dipgo: out of memory; "),
        (KeyError("\x1b[31m" * 10**5), "dipgo: a fault of dipgo's own: KeyError at test_inputs.py:"),
        (OSError(36, "File name too long", "x\x1b"), r"dipgo: x\x1b: File name too long"),
    ],
)
def test_whatever_fails_is_one_line(error, line, monkeypatch):
    def fails(**_):
        raise error

    monkeypatch.setattr(command_line, "application", lambda: fails)
    code, _, printed = dipgo("models")
    assert code == 1
    assert printed.startswith(line)
    assert printed.count("\n") == 1
    assert len(printed) <= LONGEST + len("dipgo: \n")
    assert printed[:-1].isprintable()
