"""A bundle for other weights: what an export of their own SubNet would be."""

from dataclasses import replace
from pathlib import Path

import torch
from diffusers import DiTPipeline

import dipgo
from dipgo.model.models import find_model
from dipgo.schedule.subnet import load_subnet
from export.bundle import open_bundle
from export.compiler import compile_subnet
from export.config import ExportConfig
from tests import command, models, zoo
from tests.checks import error
from tests.engines.dropin import compiled


def other_weights(folder: Path) -> str:
    """Save the small DiT with the weights of its attention moved, as by a LoRA that was fused into it."""
    pipe = DiTPipeline.from_pretrained(zoo.pipeline("dit"))
    torch.manual_seed(1)
    for name, weight in pipe.transformer.named_parameters():
        if "attn1.to_" in name and weight.ndim == 2:
            weight.data += 0.3 * torch.randn(weight.shape[0], 1) @ torch.randn(1, weight.shape[1])
    pipe.save_pretrained(folder)
    return str(folder)


def test_it_is_the_program_on_the_new_weights(tmp_path):
    task = zoo.task("dit", 4)
    subnet = models.random_subnet(task.trace, task.sampler, 0, terms=2, channels=1)
    compile_subnet(subnet, zoo.model("dit"), tmp_path / "old", ExportConfig(batch="1:2"))
    fused = other_weights(tmp_path / "fused")
    done = command.dipgo("reweight", tmp_path / "old", "--model", fused, "-o", tmp_path / "new")
    assert done.code == 0, done.err
    assert "parity holds" in command.dipgo("verify", tmp_path / "new").out
    own = replace(load_subnet(tmp_path / "old" / "subnet.json"), model=find_model(fused).identity())
    compile_subnet(own, find_model(fused), tmp_path / "own", ExportConfig(batch="1:2"))
    new, expected = (open_bundle(tmp_path / name).record for name in ("new", "own"))
    assert {name: file.sha256 for name, file in new.files.items()} == {
        name: file.sha256 for name, file in expected.files.items()
    }
    made = compiled("dit")
    again = replace(made, pipe=DiTPipeline.from_pretrained(fused), subnet=own)
    with dipgo.load(tmp_path / "new") as pipe:
        assert error(again.call(pipe), again.expected()) <= 1e-4


def test_another_architecture_is_refused(tmp_path):
    done = command.dipgo("reweight", compiled("dit").folder, "--model", zoo.pipeline("sd"), "-o", tmp_path / "b")
    assert done.code == 1
    assert "is no other weights of" in done.err
    assert "its class (UNet2DConditionModel) is not the bundle's (DiTTransformer2DModel)" in done.err
    assert not (tmp_path / "b").exists()
