"""The SubNet artifact: what is written is what is read, and nothing wrong is accepted."""

import json
from dataclasses import replace

import jsonschema
import numpy as np
import pytest

from dipgo.base.records import ModelIdentity, SamplerIdentity
from dipgo.graph.sites import Site
from dipgo.schedule.schedule import Schedule, backup_name, site_of_backup
from dipgo.schedule.search_record import Cost, SearchRecord
from dipgo.schedule.subnet import SCHEMA_FILE, SubNet, json_schema, load_subnet, save_subnet
from tests.checks import misused, refused


@pytest.fixture
def subnet():
    generator = np.random.default_rng(0)
    gates = generator.random((5, 3)) < 0.5
    gates[0] = True
    sites = tuple(Site(f"blocks.{k}", 100 * k, 10, 2) for k in range(3))
    return SubNet(
        model=ModelIdentity(name="m", class_name="M", config_sha256="c", weights_sha256=None),
        sampler=SamplerIdentity(class_name="S", config={"a": 1}, steps=5, timesteps=[5, 4, 3, 2, 1], guidance_scale=4),
        sites=sites,
        schedule=Schedule(
            gates, {backup_name(site.name): generator.normal(size=(5, 2, 4)).astype(np.float32) for site in sites}
        ),
        cost=Cost(full=1000, subnet=500, ratio=0.5),
        search=SearchRecord(method="test"),
    )


def with_backups(subnet, backups):
    return replace(subnet, schedule=Schedule(subnet.gates, backups))


@pytest.mark.parametrize("learned", [True, False])
def test_round_trip(subnet, tmp_path, learned):
    if not learned:
        subnet = with_backups(subnet, {})
    save_subnet(subnet, tmp_path / "s.json")
    read = load_subnet(tmp_path / "s.json")
    for part in ("model", "sampler", "sites", "cost", "search"):
        assert getattr(read, part) == getattr(subnet, part)
    assert np.array_equal(read.gates, subnet.gates)
    assert read.schedule.history == subnet.schedule.history
    assert read.schedule.backups.keys() == subnet.schedule.backups.keys()
    for name, array in subnet.schedule.backups.items():
        assert np.array_equal(read.schedule.backups[name], array)
    document = json.loads((tmp_path / "s.json").read_text())
    assert json.loads(SCHEMA_FILE.read_text()) == json_schema()
    jsonschema.validate(document, json_schema())
    assert (document["backup"] is None) == (not learned)


def test_a_search_record_keeps_what_this_version_does_not_know(subnet, tmp_path):
    said = {"method": "dipgo", "cost": {"kind": "macs", "more": 1}, "settings": {"moves": 3}, "best_policy": None}
    said |= {"held_out_psnr_db": {"a": 30.0}, "chosen": "a", "new": [1]}
    save_subnet(subnet, tmp_path / "s.json")
    edit(tmp_path / "s.json", lambda document: document.update(search=said))
    read = load_subnet(tmp_path / "s.json")
    assert read.search.psnr_db == 30.0
    save_subnet(read, tmp_path / "s.json", force=True)
    assert json.loads((tmp_path / "s.json").read_text())["search"] == said


def edit(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(schema="dipgo.subnet/9"), "schema is 'dipgo.subnet/9'"),
        (lambda d: d["gates"].pop(), r"gates are \[4, 3\], expected \[5 timesteps, 3 sites\]"),
        (lambda d: d["gates"][2].pop(), "gates are"),
        (lambda d: d["gates"][0].__setitem__(1, 0), "step 0 skips a site"),
        (lambda d: d["gates"][1].__setitem__(1, 7), "gates.1.1"),
        (lambda d: d.pop("sampler"), "sampler: Field required"),
        (lambda d: d.update(extra=1), "extra"),
        (lambda d: d["backup"].update(terms=3), r"expected \[5, 3\]"),
        (lambda d: d["backup"].update(sha256="0"), "not the weights"),
        (lambda d: d["backup"].update(file="../s.safetensors"), "not beside it"),
    ],
)
def test_wrong_files_are_refused_in_one_line(subnet, tmp_path, change, message):
    path = tmp_path / "s.json"
    save_subnet(subnet, path)
    edit(path, change)
    with refused(f"{path.parent}.*{message}"):
        load_subnet(path)


def test_broken_files_are_refused_and_nan_is_never_written(subnet, tmp_path):
    with refused("no such SubNet"):
        load_subnet(tmp_path / "none.json")
    broken = {name: array.copy() for name, array in subnet.schedule.backups.items()}
    broken["backup.blocks.1"][2, 0, 1] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        save_subnet(with_backups(subnet, broken), tmp_path / "s.json")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "half.json").write_text('{"schema": ')
    with refused("not a readable SubNet"):
        load_subnet(tmp_path / "half.json")
    save_subnet(subnet, tmp_path / "s.json")
    (tmp_path / "s.safetensors").unlink()
    with refused("not beside it"):
        load_subnet(tmp_path / "s.json")


def test_weights_by_pass_are_those_of_the_guidance(subnet, tmp_path):
    passes = {name: np.stack([array, 2 * array], axis=2) for name, array in subnet.schedule.backups.items()}
    save_subnet(with_backups(subnet, passes), tmp_path / "s.json")
    for name, array in load_subnet(tmp_path / "s.json").schedule.backups.items():
        assert np.array_equal(array, passes[name])
    thirds = {name: np.concatenate([array, array[:, :, :1]], axis=2) for name, array in passes.items()}
    with pytest.raises(ValueError, match="has weights for 3 passes of guidance, but guidance 4 has 2"):
        save_subnet(with_backups(subnet, thirds), tmp_path / "t.json")
    sampler = subnet.sampler.model_copy(update={"guidance_scale": 1.0})
    unguided = replace(with_backups(subnet, passes), sampler=sampler)
    with pytest.raises(ValueError, match="guidance 1 has 1"):
        save_subnet(unguided, tmp_path / "t.json")
    assert not (tmp_path / "t.json").exists()


def test_every_output_of_a_site_has_a_name_of_its_own():
    names = [backup_name("down_blocks.0", output) for output in range(4)]
    assert names == [f"backup.down_blocks.0{end}" for end in ("", "#1", "#2", "#3")]
    assert {site_of_backup(name) for name in names} == {"down_blocks.0"}
    assert site_of_backup("down_blocks.0") is None


def test_names_with_dots_keep_their_own_weights(subnet, tmp_path):
    """``b0.35`` and ``b0.25`` are two SubNets, and one may be called ``s.safetensors``."""
    names = ("b0.35", "b0.25", "s.safetensors")
    for number, name in enumerate(names):
        save_subnet(with_backups(subnet, {k: w + number for k, w in subnet.schedule.backups.items()}), tmp_path / name)
    for number, name in enumerate(names):
        found = load_subnet(tmp_path / name).schedule.backups
        assert all(np.array_equal(found[key], array + number) for key, array in subnet.schedule.backups.items())


def test_existing_output_is_kept(subnet, tmp_path):
    save_subnet(subnet, tmp_path / "s.json")
    before = (tmp_path / "s.json").read_bytes()
    with misused("--force"):
        save_subnet(replace(subnet, search=SearchRecord()), tmp_path / "s.json")
    assert (tmp_path / "s.json").read_bytes() == before
