"""LoRAs of a request: the images of the gated diffusers pipeline with the same adapters."""

import subprocess
import sys
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import dipgo
from export.compiler import write_bundle
from export.config import ExportConfig
from tests import zoo
from tests.checks import error, misused, refused
from tests.engines.dropin import GUIDANCE, STEPS, compiled
from tests.zoo import once

FIRST, SECOND = (
    ["to_q", "to_k", "to_v", "to_out.0"],
    {
        "sd": ["to_q", "ff.net.2", "proj_in", "time_emb_proj"],
        "sdxl": ["to_q", "ff.net.2", "proj_in"],
        "flux": ["to_q", "norm1.linear", "proj_mlp"],
    },
)


@cache
def adapted(kind):
    """A pipeline and its bundle with branches of rank 6; adapters of ranks 4 and 2 as files ``a`` and ``b``."""
    plain = compiled(kind)
    traced = zoo.trace(kind, "branch" if kind == "sdxl" else None, open_guidance=True)
    task = zoo.task(kind, STEPS, sites="branch" if kind == "sdxl" else None)
    prepared = zoo.converted(traced)
    config = ExportConfig(lora_rank=6)
    folder = once(
        f"bundles/lora-{kind}",
        lambda folder: write_bundle(prepared, plain.subnet, task.sampler, folder, True, config),
    )
    files = once(f"loras/{kind}", lambda folder: _save(kind, plain.component, folder))
    pipe = zoo.model(kind).pipeline()
    pipe.scheduler = plain.pipe.scheduler
    pipe.set_progress_bar_config(disable=True)
    arguments = plain.arguments | {"guidance_scale": GUIDANCE}
    return replace(plain, pipe=pipe, folder=folder, arguments=arguments), files


def _save(kind, component, folder):
    for seed, (name, rank, layers) in enumerate((("a", 4, FIRST), ("b", 2, SECOND[kind]))):
        pipe = zoo.model(kind).pipeline()
        denoiser = getattr(pipe, component)
        denoiser.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))
        torch.manual_seed(seed)
        for key, parameter in denoiser.named_parameters():
            if "lora_" in key:
                parameter.data = 0.3 * torch.randn_like(parameter)
        own = {f"{component}_lora_layers": get_peft_model_state_dict(denoiser)}
        pipe.save_lora_weights(folder, weight_name=f"{name}.safetensors", **own)


def call(made, pipe, **changes):
    images = made.call(pipe, **changes, **{"output_type": made.arguments.get("output_type", "np")})
    return np.asarray(images)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "flux"])
@pytest.mark.parametrize("backend", ["onnxruntime", "torch-cpu"])
def test_images_are_those_of_the_pipeline_with_the_same_adapters(kind, backend):
    made, files = adapted(kind)
    made.pipe.unload_lora_weights()
    with dipgo.load(made.folder, backend=backend) as pipe, made.gates() as theirs:
        pipe.set_progress_bar_config(disable=True)
        plain, seen = call(made, pipe), {}
        assert error(plain, call(made, theirs)) <= 1e-4

        def agrees(what):
            seen[what] = call(made, pipe)
            assert pipe.get_active_adapters() == theirs.get_active_adapters()
            assert error(seen[what], call(made, theirs)) <= 1e-4
            assert error(seen[what], plain) > 1e-3

        for name in "ab":
            for each in (pipe, theirs):
                each.load_lora_weights(files, weight_name=f"{name}.safetensors", adapter_name=name)
            agrees(name)
        for each in (pipe, theirs):
            each.set_adapters(["a", "b"], [0.7, 0.4])
        agrees("both")
        pipe.set_adapters("a")
        assert np.array_equal(call(made, pipe), seen["a"])
        pipe.disable_lora()
        assert np.array_equal(call(made, pipe), plain)
        pipe.enable_lora()
        assert np.array_equal(call(made, pipe), seen["a"])
        pipe.delete_adapters("a")
        assert pipe.get_list_adapters() == {made.component: ["b"]}
        pipe.unload_lora_weights()
        assert np.array_equal(call(made, pipe), plain)
    made.pipe.unload_lora_weights()


def test_kohyas_names_and_alphas(tmp_path):
    made, files = adapted("sd")
    tensors = {}
    for name, value in load_file(files / "a.safetensors").items():
        layer, _, side = name.removeprefix("unet.").rpartition(".lora_")
        stem = "lora_unet_" + layer.replace(".", "_")
        tensors[f"{stem}.lora_{'down' if side.startswith('A') else 'up'}.weight"] = value.to(torch.bfloat16)
        tensors[f"{stem}.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "kohya.safetensors")
    made.pipe.unload_lora_weights()
    with dipgo.load(made.folder) as pipe, made.gates() as theirs:
        for each in (pipe, theirs):
            each.load_lora_weights(tmp_path, weight_name="kohya.safetensors", adapter_name="k")
        assert error(call(made, pipe), call(made, theirs)) <= 1e-4
    made.pipe.unload_lora_weights()


def test_what_does_not_fit_is_refused(tmp_path):
    made, files = adapted("sd")
    pipe = dipgo.load(made.folder)
    first = load_file(files / "a.safetensors")
    layer = next(iter(first)).rpartition(".lora_")[0]

    def load(changes, name="x"):
        save_file(changes, tmp_path / "x.safetensors")
        pipe.load_lora_weights(tmp_path / "x.safetensors", name)

    with misused("'unet.conv_in.lora_A.weight' fits no linear layer of the bundle"):
        load({**first, "unet.conv_in.lora_A.weight": torch.zeros(1, 4, 3, 3)})
    with misused("changes the text encoder \\('lora_te_text_model_x.alpha'\\)"):
        load({**first, "lora_te_text_model_x.alpha": torch.zeros(1)})
    with misused("give a LoRA of this model"):
        load({**first, f"{layer}.lora_A.weight": torch.zeros(4, 7)})
    with misused("rank 7 at .*, the bundle takes 6 in all"):
        load({f"{layer}.lora_A.weight": torch.zeros(7, 16), f"{layer}.lora_B.weight": torch.zeros(16, 7)})
    with misused("holds one matrix alone"):
        load({f"{layer}.lora_A.weight": torch.zeros(7, 16)})
    (tmp_path / "y.safetensors").write_bytes(b"nothing")
    with refused("y.safetensors"):
        pipe.load_lora_weights(tmp_path / "y.safetensors")
    with misused("no safetensors file, and nothing is unpickled"):
        (tmp_path / "y.bin").touch()
        pipe.load_lora_weights(tmp_path / "y.bin")
    with misused("no such file"):
        pipe.load_lora_weights(tmp_path / "z.safetensors")
    with misused("no adapter 'a'; none is loaded"):
        pipe.set_adapters("a")
    pipe.load_lora_weights(files / "a.safetensors", "a")
    with misused("the adapter 'a' is there already"):
        pipe.load_lora_weights(files / "a.safetensors", "a")
    with misused("2 weights for 1 adapters"):
        pipe.set_adapters(["a"], [1.0, 2.0])
    assert pipe.get_active_adapters() == ["a"]
    with misused("takes no LoRAs; export it with --lora-rank"):
        dipgo.load(compiled("sd").folder).load_lora_weights(files / "a.safetensors")


def test_the_command_line_runs_without_torch(tmp_path):
    made, files = adapted("sd")
    script = f"""
import sys
sys.modules.update(torch=None, diffusers=None)
from dipgo.cli.main import main
sys.argv = ["dipgo", "run", {str(made.folder)!r}, "--prompt", "a red fox", "--lora", sys.argv[1], "-o", sys.argv[2]]
main()
"""
    pictures = []
    for weight in ("", ":0"):
        output = tmp_path / f"{len(pictures)}.png"
        lora = f"{files / 'a.safetensors'}{weight}"
        subprocess.run([sys.executable, "-c", script, lora, str(output)], check=True)
        pictures.append(output.read_bytes())
    assert pictures[0] != pictures[1]
