"""What others publish, read into SubNets: by an independent computation where it says what to compute, and no code."""

import collections
import contextlib
import json
import os
import pickle
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dipgo.base.errors import DipgoError, UsageError
from dipgo.eager.gating import gated
from dipgo.importers import dipgo_gates
from dipgo.importers.deepcache import full_steps, read_deepcache
from dipgo.importers.importer import apply, import_subnet, read_schedule
from dipgo.model.sampler import make_scheduler, tabulate
from dipgo.schedule.search_record import Cost
from dipgo.schedule.subnet import load_subnet
from tests import zoo
from tests.checks import error, refused
from tests.command import dipgo
from tests.dipgo.test_sampler import BASE

KEYS = [
    *(("down", "block", depth, 0) for depth in range(3)),
    ("mid", "mid_block", 0, 0),
    *(("up", "block", depth, 0) for depth in (2, 1, 0)),
]
MODULES = ["down_blocks.0", "down_blocks.1", "down_blocks.2", "mid_block", "up_blocks.0", "up_blocks.1", "up_blocks.2"]


@pytest.fixture(scope="module")
def unet():
    return zoo.model("sd")


@pytest.fixture(scope="module")
def branches():
    return zoo.trace("sd", "up_blocks.*.attentions.*,up_blocks.1.upsamplers.0", 1.0)


@pytest.fixture(scope="module")
def layers():
    return zoo.trace("dit", "layer", 1.0)


def sampler(steps, name="ddim"):
    return tabulate(make_scheduler(name, BASE), steps)


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def tensors(gates):
    """The public code's structure: a list of dicts of one-hot tensors."""
    rows = [[torch.eye(2)[int(gate)].clone() for gate in row] for row in gates]
    return [dict(zip(KEYS, row, strict=True)) for row in rows]


def some_gates(seed=0, steps=6):
    gates = np.random.default_rng(seed).random((steps, len(KEYS))) < 0.7
    gates[0] = gates[:, -1] = True  # the last up block too, so that no step is empty
    return gates


def by_name(subnet):
    return {site.name: subnet.gates[:, index].tolist() for index, site in enumerate(subnet.sites)}


# DiP-GO gates


def test_gates_pickled_by_torch(tmp_path):
    gates = some_gates()
    whole = torch.stack([torch.stack(list(step.values())) for step in tensors(gates)]).half()
    shared = [dict(zip(KEYS, row, strict=True)) for row in whole]  # all in one storage
    for steps, protocol in ((tensors(gates), 3), (tensors(gates), 4), (tensors(gates), 5), (shared, 4)):
        schedule = read_schedule(write(tmp_path / "gates.pkl", pickle.dumps(steps, protocol)))
        assert schedule.keys == tuple(KEYS)
        assert schedule.modules == MODULES
        assert np.array_equal(schedule.gates, gates)


def test_both_forms_give_one_subnet_and_what_nobody_reads_is_off(tmp_path, blocks):
    gates = some_gates()
    sheet = {"block_order": ["/".join(map(str, key)) for key in KEYS], "keep": gates.astype(int).tolist()}
    for content in (sheet, pickle.dumps(tensors(gates))):
        subnet = apply(read_schedule(write(tmp_path / "gates", content)), blocks, sampler(6))
        for module, column in by_name(subnet).items():
            wanted = gates[:, MODULES.index(module)]
            assert (column <= wanted).all()
        for step, row in enumerate(subnet.gates):
            given = gates[step, [MODULES.index(site.name) for site in subnet.sites]]
            assert blocks.live_sites(row) == blocks.live_sites(given)
            assert set(np.flatnonzero(row)) <= blocks.live_sites(row, range(len(row)))
        assert subnet.cost == Cost.of(subnet.schedule, blocks.macs)


class Reduced:
    """Pickles as a call of ``function``."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def legacy_file(stored):
    system = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [0x1950A86A20F9469CFC6C, 1001, system, stored, ["1"]]
    return b"".join(pickle.dumps(part, 2) for part in parts) + bytes(16)


def in_a_tensor(storage):
    return [
        {KEYS[0]: Reduced(torch._utils._rebuild_tensor_v2, storage, 0, (2,), (1,), False, collections.OrderedDict())}
    ]


class State:
    def __reduce__(self):
        return (collections.OrderedDict, (), {"x": 1})


def harmful(command):
    """Objects whose pickles run ``command`` when they are unpickled."""
    call = Reduced(os.system, command)
    rebuild, parts = torch.zeros(2).__reduce_ex__(4)
    return {
        "a call at the top": call,
        "a call in the place of a gate": [{KEYS[0]: call}],
        "a call in a storage": in_a_tensor(Reduced(torch.storage._load_from_bytes, legacy_file(call))),
        "eval": Reduced(eval, f"__import__('os').system({command!r})"),
        "a call in a tensor's hooks": [{KEYS[0]: Reduced(rebuild, *parts[:5], call)}],
    }


@pytest.mark.parametrize("name", list(harmful("")))
def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(name, tmp_path):
    marker = tmp_path / "marker"
    path = write(tmp_path / "gates.pkl", pickle.dumps(harmful(f"touch {marker}")[name]))
    with contextlib.suppress(Exception):  # torch may find, after the command ran, that its result is no storage
        pickle.loads(path.read_bytes())
    assert marker.exists(), "unpickled as it is, this file is harmful"
    marker.unlink()

    code, _, err = dipgo("import", path, "-o", tmp_path / "out.json")
    assert code == 1
    (line,) = [line for line in err.splitlines() if line.startswith("dipgo: ")]
    assert "nothing was run" in line
    assert "known formats: DiP-GO gates" in line
    assert sorted(tmp_path.iterdir()) == [path]


def test_text_pickles_are_no_way_round(tmp_path):
    marker = tmp_path / "marker"
    for content in (
        f"cos\nsystem\n(S'touch {marker}'\ntR.".encode(),
        f"(S'touch {marker}'\nios\nsystem\n.".encode(),
        f"\x80\x02(S'touch {marker}'\nios\nsystem\n.".encode("latin-1"),
        f"\x80\x02(cos\nsystem\nS'touch {marker}'\no.".encode("latin-1"),
    ):
        pickle.loads(content)
        assert marker.exists(), "unpickled as it is, this file is harmful"
        marker.unlink()
        with pytest.raises(DipgoError, match="known formats"):
            read_schedule(write(tmp_path / "gates.pkl", content))
        assert not marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps([{KEYS[0]: torch.tensor([0.3, 0.7])}]), "a gate in it is \\[0.3"),
        (pickle.dumps([{KEYS[0]: torch.zeros(3)}]), "not a tensor of two values"),
        (pickle.dumps([{KEYS[0]: 1}]), "not a tensor of two values"),
        (pickle.dumps([{("down", "resnet", 0, 0): torch.tensor([0.0, 1.0])}]), "down/resnet/0/0 is no block key"),
        (pickle.dumps([{"x": 1}, {"y": 2}]), "do not have the same blocks"),
        (pickle.dumps({"x": 1}), "not a list of dicts"),
        (pickle.dumps([{(1, (2,)): 1}]), "a key of a dict in the pickle"),
        (pickle.dumps([{KEYS[0]: bytearray(3)}]), "names 'builtins.bytearray'"),
        (pickle.dumps(State()), "uses the opcode BUILD"),
        (pickle.dumps(tensors(some_gates()))[:2000], "the pickle is damaged"),
        (pickle.dumps(in_a_tensor(Reduced(torch.storage._load_from_bytes, legacy_file([1])))), "something else than"),
        (pickle.dumps(in_a_tensor(Reduced(torch.storage._load_from_bytes, b"PK\3\4"))), "the pickle is damaged"),
        (b"\x80\x04a.", "the pickle is damaged"),
        (b"\x80", "the pickle is damaged"),
        (b"\x80\x04" + b"(" * 10_000 + b"t" * 10_000 + b".", "not a list of dicts"),
    ],
)
def test_wrong_pickles_are_refused(content, message, tmp_path):
    with refused(f"{message}.*known formats"):
        read_schedule(write(tmp_path / "gates.pkl", content))


def a_step(payload):
    """Opcodes of a step of one gate, whose storage is given as opcodes; the step is memo 1."""
    storage = b"ctorch.storage\n_load_from_bytes\n" + payload + b"\x85R"
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\0K\2\x85K\1\x85\x89NtR"
    return b"}q\1(X\2\0\0\0upX\5\0\0\0blockK\0K\0t" + tensor + b"s"


def gate_of_storage(key):
    """A pickle of one gate, whose storage has a key that is given as opcodes, in both places where it stands."""
    stored = b"(X\7\0\0\0storagectorch\nFloatStorage\n" + key + b"X\3\0\0\0cpuK\2NtQ"
    system = pickle.dumps({"little_endian": True}, 2)
    payload = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + system
    payload += b"\x80\2" + stored + b".\x80\2]" + key + b"a." + (2).to_bytes(8, "little") + np.float32([0, 1]).tobytes()
    return b"\x80\3]" + a_step(b"B" + len(payload).to_bytes(4, "little") + payload) + b"a."


LARGE = {
    "one value along 2^45 ways": gate_of_storage(b")" + b"".join(b"q%ch%c\x86" % (k, k) for k in range(45))),
    "a list that holds itself": gate_of_storage(b"]q\0h\0a"),
    "a flood of None": b"\x80\2" + b"N" * 4_000_000 + b".",
    "a flood of lists": b"\x80\2](" + (b"]" * 90_000 + b"e(") * 20 + b"e.",
    "a long key often": b"\x80\2}q\1(" + b"K\1" * 90_000 + b"tq\2" + b"h\1h\2Ns" * 700_000 + b".",
    "long arguments often": b"\x80\2](" + b"N" * 90_000 + b"eq\2" + b"ccollections\nOrderedDict\nh\2R" * 90_000,
    "one step often": b"\x80\3](" + a_step(b"C\3abc") + b"h\1" * 90_000 + (b"e(" + b"h\1" * 90_000) * 15 + b"e.",
    "above the limit": b"\x80\2" + b"}" * 64_000_000,
}


@pytest.mark.parametrize("name", list(LARGE))
def test_pickles_take_time_and_memory_linear_in_their_length(name, tmp_path):
    start = time.process_time()
    with refused(r"known formats|larger than any schedule file"):
        read_schedule(write(tmp_path / "gates.pkl", LARGE[name]))
    assert time.process_time() - start < 10, "hangs do not end within a minute"


def test_a_payload_that_gates_share_is_read_once(tmp_path, monkeypatch):
    gates = some_gates(steps=200)
    both = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])]
    rows = [dict(zip(KEYS, [both[int(gate)] for gate in row], strict=True)) for row in gates]
    calls = []
    read = dipgo_gates._storage
    monkeypatch.setattr(dipgo_gates, "_storage", lambda payload: calls.append(payload) or read(payload))
    published = read_schedule(write(tmp_path / "gates.pkl", pickle.dumps(rows)))
    assert np.array_equal(published.gates, gates)
    assert len(calls) <= 2


# DeepCache


def test_full_steps_are_deepcache_s():
    for settings, expected in (
        ((10, 3, None), [0, 3, 6, 9]),
        ((4, 1, None), [0, 1, 2, 3]),
        ((20, 5, (2.0, 20)), [0, 9, 15, 19]),
        ((50, 5, (1.4, 15)), [0, 5, 9, 13, 17, 21, 26, 31, 37, 43]),
        ((50, 10, (1.2, 20)), [0, 11, 20, 28, 38]),
    ):
        assert full_steps(*settings) == expected


@pytest.mark.parametrize("branch", [0, 1, pytest.param(3, marks=pytest.mark.slow)])
def test_deepcache_computes_what_deepcache_computes(branch, unet, branches):
    """Against the package in the diffusers pipeline itself."""
    helpers = pytest.importorskip("DeepCache")
    settings = {"cache_interval": 3, "cache_branch_id": branch}
    subnet, pipe = apply(read_deepcache(settings), branches, sampler(7)), unet.pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = make_scheduler("ddim", BASE)

    def latents():
        options = {"num_inference_steps": 7, "guidance_scale": 1.0, "output_type": "latent"}
        return pipe("a red fox", generator=torch.Generator().manual_seed(0), **options).images

    with gated(pipe.unet, subnet):
        actual = latents()
    assert error(actual, latents()) > 1e-2, "the gates do something"
    helper = helpers.DeepCacheSDHelper(pipe=pipe)
    helper.set_params(**settings)
    helper.enable()
    assert error(actual, latents()) <= 1e-5
    assert subnet.cost.ratio < 0.9


def test_deepcache_s_two_numberings():
    for settings, branch in (
        ({}, 0),
        ({"cache_branch_id": 5}, 5),
        ({"skip_mode": "uniform", "cache_block_id": 1, "cache_layer_id": 2}, 5),
        ({"uniform": True, "cache_layer_id": 0, "cache_block_id": 0}, 1),
        ({"uniform": True, "cache_layer_id": 0, "cache_block_id": 2}, 3),
    ):
        assert read_deepcache({"cache_interval": 2, **settings}).branch == branch


def test_what_only_the_kept_feature_reads_falls_away(blocks):
    subnet = apply(read_deepcache({"cache_interval": 2, "cache_branch_id": 1}), blocks, sampler(4))
    assert by_name(subnet) == {name: [True, name in ("down_blocks.0", "up_blocks.2")] * 2 for name in MODULES}


# Step masks and SmoothCache


def test_a_step_mask_costs_its_share(layers, tmp_path):
    """Calls at one timestep share a row."""
    mask = [1, 0, 1, 1, 0, 0, 1, 0]
    subnet = apply(read_schedule(write(tmp_path / "mask.json", mask)), layers, sampler(8))
    assert np.array_equal(subnet.gates, np.repeat(np.array(mask, bool)[:, None], len(layers.sites), axis=1))
    assert subnet.cost.ratio == 0.5
    subnet = apply(read_schedule(write(tmp_path / "mask.json", [1, 0, 1, 1, 0, 1])), layers, sampler(6, "pndm"))
    assert subnet.gates[:, 0].tolist() == [True, False, False, True, True, False, True]
    assert len(set(subnet.sampler.timesteps)) == 6


def test_a_mask_may_have_one_entry_a_call(tiny_dit, tmp_path):
    """PNDM's 6 steps are 7 calls; without --steps the same file is for 7 steps, an entry a distinct timestep."""
    mask = [1, 0, 1, 1, 0, 0, 1]
    path = write(tmp_path / "mask.json", mask)
    subnet = import_subnet(path, tiny_dit, steps=6, sampler="pndm")
    assert subnet.gates.all(axis=1).tolist() == [bool(entry) for entry in mask]
    assert subnet.sampler.steps == 6
    assert import_subnet(path, tiny_dit, sampler="pndm").sampler.steps == 7


def test_smoothcache_by_layer_type_and_by_block(layers, tiny_dit, tmp_path):
    schedule = {"attn": [1, 0, 0, 1], "mlp": [1, 1, 0, 1], "mlp-1": [1, 0, 1, 0]}
    subnet = apply(read_schedule(write(tmp_path / "50.json", schedule)), layers, sampler(4))
    expected = {f"transformer_blocks.{k}.attn1": schedule["attn"] for k in (0, 1)} | {"proj_out_2": [1] * 4}
    expected |= {"transformer_blocks.0.ff": schedule["mlp"], "transformer_blocks.1.ff": schedule["mlp-1"]}
    assert by_name(subnet) == expected
    path = write(tmp_path / "diffuser_schedule.json", {"attn1": [1, 0, 1]})
    subnet = import_subnet(path, tiny_dit, guidance_scale=1.0)  # with the sites that it needs
    assert [site.name for site in subnet.sites] == ["transformer_blocks.0.attn1", "transformer_blocks.1.attn1"]
    assert (subnet.sampler.class_name, subnet.sampler.steps) == ("DDIMScheduler", 3)


# The command


def test_the_examples_of_the_documentation_are_read(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "reference" / "formats.md").read_text()
    examples = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    formats = [read_schedule(write(tmp_path / "x.json", example.encode())).format for example in examples]
    lists = ["a step mask", "a list of steps", "a list of steps"]
    assert formats == ["DiP-GO gates", "DeepCache", "DeepCache", *lists, "SmoothCache", "InvarDiff"]


def test_the_command_writes_a_subnet_that_loads(tiny_dit, tmp_path):
    path, output = write(tmp_path / "mask.json", [1, 0, 1, 0]), tmp_path / "out" / "subnet.json"
    code, out, err = dipgo("import", path, "--model", tiny_dit, "-o", output)
    assert code == 0, err
    assert "a step mask: 10 of 20 gates, 2 signatures, 2 empty steps; keeps 50.00%" in out
    subnet = load_subnet(output)
    assert subnet.sampler.guidance_scale == 4.0
    assert subnet.search.file == "mask.json"
    code, out, err = dipgo("import", path, "--model", tiny_dit, "-o", output)
    assert (code, "--force" in err) == (2, True)


REFUSED = {
    "not UTF-8": (b"\xff\xfe[1]", "neither UTF-8 text nor a pickle of gates"),
    "not JSON": (b"1, 0, 1", "neither JSON nor"),
    "deep JSON": (b"[" * 100_000, "neither JSON nor"),
    "other JSON": ({"schedule": "fast"}, "a format that is not known"),
    "a SubNet": ({"schema": "dipgo.subnet/1", "gates": [[1]]}, "a format that is not known"),
    "empty": (b"", "neither JSON nor"),
    "an empty list": ([], "a format that is not known"),
    "soft gates": ([1, 0.5, 1], "a format that is not known"),
    "ragged SmoothCache": ({"attn1": [1, 0], "ff": [1]}, "different lengths: attn1 2, ff 1"),
    "ragged gates": ({"block_order": ["down/block/0/0"], "keep": [[1], [1, 0]]}, "'keep' of step 1"),
    "one layer twice": ({"attn": [1, 0], "attn1": [1, 1]}, "'attn1' says again what another key says of attn1"),
    "a center far off": ({"cache_interval": 2, "uniform": False, "pow": 1.4, "center": 10**400}, "center is 1000"),
    "no interval": ({"cache_interval": 0}, "cache_interval is 0"),
    "unknown setting": ({"cache_interval": 2, "speed": 3}, "no setting 'speed'"),
    "two meanings": ({"cache_interval": 2, "cache_layer_id": 0, "cache_block_id": 0}, "give cache_branch_id"),
    "a curve without effect": ({"cache_interval": 2, "pow": 1.4}, "no effect unless uniform is false"),
    "half a curve": ({"cache_interval": 2, "uniform": False, "center": 3}, "needs 'pow'"),
    "unknown mode": ({"cache_interval": 2, "skip_mode": "random"}, "skip_mode 'random' is unknown"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_files_of_no_known_format_are_refused_in_one_line(name, tmp_path):
    content, message = REFUSED[name]
    path = write(tmp_path / "file", content)
    code, _, err = dipgo("import", path, "--model", "sd-1.5", "-o", tmp_path / "out.json")
    (line,) = [line for line in err.splitlines() if line.startswith("dipgo: ")]
    assert code == 1
    assert message in line
    assert "known formats: DiP-GO gates (pickle or JSON), DeepCache's settings, a step mask" in line
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_file_is_one_line(tmp_path):
    with refused("no such schedule file"):
        read_schedule(tmp_path / "none.json")
    with refused(r"not a readable schedule file \(a folder"):
        read_schedule(tmp_path)


@pytest.mark.parametrize(
    ("content", "options", "kind", "message"),
    [
        ([1, 0, 1], {"steps": 4}, DipgoError, "has 3 entries, but the sampler makes 4 calls; give the --steps"),
        ([0, 1, 1], {}, DipgoError, "step 0 is not computed in full"),
        ({"attn1": [0, 1]}, {}, DipgoError, "step 0 is not computed in full"),
        ({"attn2": [1, 1]}, {}, DipgoError, "'attn2' is no layer in the transformer blocks of DiTTransformer2DModel"),
        ({"ff-7": [1, 1]}, {}, DipgoError, "'ff-7' is no layer"),
        ({"cache_interval": 2}, {}, UsageError, "give --steps"),
        ({"cache_interval": 2}, {"steps": 4}, DipgoError, "DeepCache is for UNets, and DiTTransformer2DModel is none"),
        ({"ff": [1, 1]}, {"sites": "proj_out_2"}, UsageError, "gates 'transformer_blocks.0.ff', which is no site"),
        ([1, 0, 1], {"model": None}, UsageError, "give --model"),
        ([1], {}, UsageError, "at least 2"),
    ],
)
def test_schedules_that_do_not_fit_are_refused(content, options, kind, message, tiny_dit, tmp_path):
    with refused(message) as caught:
        import_subnet(write(tmp_path / "x.json", content), **{"model": tiny_dit, **options})
    assert type(caught.value) is kind
    assert str(tmp_path) in str(caught.value) or kind is UsageError


def test_deepcache_settings_that_do_not_fit_are_refused(unet):
    for settings, message in (
        ({"cache_branch_id": 9}, "branch 9 lies in block 3, but the UNet has 3"),
        ({"uniform": False, "pow": 1.01, "center": 25}, "no schedule of 25 steps out of 50 with pow 1.01"),
    ):
        schedule = read_deepcache({"cache_interval": 2, **settings})
        with pytest.raises(ValueError, match=message):
            schedule.columns([], unet.empty_denoiser(), range(50))
