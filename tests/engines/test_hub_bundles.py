"""Bundles of the hub, out of its own offline cache, and what code written for diffusers finds at a bundle."""

import hashlib
import shutil

import huggingface_hub
import numpy as np
import pytest
import torch

import dipgo
from export.bundle import open_bundle
from export.card import card_of
from tests import command
from tests.checks import refused
from tests.engines.dropin import compiled

REVISION = "0123456789012345678901234567890123456789"


def cached(cache, name, files):
    """Put files into a cache as the hub does: blobs by digest, a snapshot of links, a reference."""
    repository = cache / f"models--{name.replace('/', '--')}"
    for path, content in files.items():
        blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
        link = repository / "snapshots" / REVISION / path
        for each in (blob, link):
            each.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(blob)
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(REVISION)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_a_bundle_of_the_hub_is_opened_by_its_id(hub):
    made = compiled("dit")
    names = [*open_bundle(made.folder).record.files, "bundle.json"]
    cached(hub, "somebody/digits", {name: (made.folder / name).read_bytes() for name in names})
    with dipgo.load("somebody/digits") as pipe, dipgo.load(made.folder) as own:
        assert np.array_equal(made.call(pipe), made.call(own))
        assert str(hub) in repr(pipe)
    with dipgo.load("somebody/digits") as pipe:  # again, from what was copied
        assert pipe.config["model"] == own.config["model"]


def test_what_is_no_bundle_is_said(hub):
    with refused("nobody/nothing: no such folder, and the hub says: "):
        dipgo.load("nobody/nothing")
    with refused("no such bundle"):
        dipgo.load("nothing")
    assert command.dipgo("push", compiled("dit").folder, "nothing").err.startswith("dipgo: 'nothing' is no id")
    assert "the hub says" in command.dipgo("push", compiled("dit").folder, "a/b").err


def test_the_card_tells_the_programs():
    record = open_bundle(compiled("dit").folder).record
    card = card_of(record, "somebody/digits")
    assert card.startswith("---\nlibrary_name: dipgo\n")
    assert f"| 4 | {record.budget:.1%} | DDIMScheduler | 4 |" in card
    assert 'pipe = dipgo.load("somebody/digits")' in card


def test_what_diffusers_users_look_at(tmp_path):
    made = compiled("dit")
    pipe = dipgo.load(made.folder)
    assert pipe.device == torch.device("cpu")
    assert pipe.dtype == torch.float32
    assert pipe.components == {"scheduler": pipe.scheduler}
    assert pipe.config["programs"] == [{"num_inference_steps": 4, "budget": pipe.record.budget}]
    assert "4 steps at " in repr(pipe)
    assert not hasattr(pipe, "transformer")
    with pytest.raises(AttributeError, match="a bundle has no 'fuse_lora': a bundle's weights are fixed"):
        pipe.fuse_lora()
    pipe.save_pretrained(tmp_path / "saved")
    again = type(pipe).from_pretrained(tmp_path / "saved")
    assert np.array_equal(made.call(again), made.call(pipe))
    shutil.rmtree(tmp_path / "saved")
