"""Schedules of whole steps: InvarDiff's books by an independent computation, lists of steps, what goes out."""

import json

import numpy as np
import pytest
import torch

from dipgo.base.errors import DipgoError, UsageError
from dipgo.eager.gating import gated
from dipgo.importers.importer import apply, import_subnet, read_schedule
from dipgo.importers.invardiff import read_invardiff
from dipgo.importers.writers import cache_dit, deepcache, sglang_dpcache
from dipgo.schedule.subnet import save_subnet
from tests import zoo
from tests.checks import error, refused
from tests.command import dipgo

STEPS = 6
WHOLE = [False, False, True, False, True, False]  # reused


def books(*counts):
    """A book per count of blocks: reused at random, after two steps that are computed."""
    generator = np.random.default_rng(0)
    return [[[bool(step > 1 and generator.random() < 0.5) for _ in range(n)] for step in range(STEPS)] for n in counts]


def invardiff_of(kind):
    if kind == "dit":
        attention, mlp = books(2, 2)
        return {"cache_version": 2, "step_cache_book": WHOLE, "msa_cache_book": attention, "mlp_cache_book": mlp}
    denoiser = zoo.model(kind).empty_denoiser()
    double, single = len(denoiser.transformer_blocks), len(denoiser.single_transformer_blocks)
    names = ("attn", "context_attn", "ff", "context_ff")
    return {
        "step_cache_book": WHOLE,
        "transformer_cache_book": dict(zip(names, books(*[double] * 4), strict=True)),
        "single_transformer_cache_book": dict(zip(("attn", "mlp"), books(single, single), strict=True)),
    }


def reuse(denoiser, document):
    """InvarDiff's own rule, by hooks: a module that is reused hands out what it made last, a step its last features."""
    step, kept = [-1], {}

    def serves(name, reused):
        def hook(module, arguments, output):
            if not WHOLE[step[0]] and not reused(step[0]):
                kept[name] = output
            return kept[name]

        return hook

    def features(module, arguments):
        if not WHOLE[step[0]]:
            kept["features"] = arguments[0]
        return (kept["features"], *arguments[1:])

    def begins(module, arguments):
        step[0] += 1

    def lists():
        if "msa_cache_book" in document:
            yield "transformer_blocks", {"attn1": ["msa_cache_book"], "ff": ["mlp_cache_book"]}, document
        else:
            double = {"attn": ["attn", "context_attn"], "ff": ["ff"], "ff_context": ["context_ff"]}
            yield "transformer_blocks", double, document["transformer_cache_book"]
            single = {"attn": ["attn"], "act_mlp": ["mlp"]}
            yield "single_transformer_blocks", single, document["single_transformer_cache_book"]

    yield denoiser.register_forward_pre_hook(lambda module, *rest: begins(module, rest), with_kwargs=True)
    yield denoiser.norm_out.register_forward_pre_hook(features)
    for blocks, layers, book in lists():
        for number, block in enumerate(getattr(denoiser, blocks)):
            for layer, keys in layers.items():
                reused = lambda at, keys=keys, number=number, book=book: all(book[key][at][number] for key in keys)  # noqa: E731
                yield block.get_submodule(layer).register_forward_hook(serves((blocks, number, layer), reused))


@pytest.mark.parametrize("kind", ["dit", "flux"])
def test_invardiff_s_book_computes_what_invardiff_computes(kind, tmp_path):
    document = invardiff_of(kind)
    traced = zoo.trace(kind, read_invardiff(document).sites(None), zoo.guidance_of(kind))
    path = tmp_path / "book.json"
    path.write_text(json.dumps(document))
    subnet = apply(read_schedule(path), traced, zoo.sampler(kind, STEPS, None))
    pipe = traced.model.pipeline()
    pipe.set_progress_bar_config(disable=True)
    asks = {"class_labels": [1]} if kind == "dit" else {"prompt": "a red fox", "height": 32, "width": 32}

    def images():
        options = {"num_inference_steps": STEPS, "guidance_scale": zoo.guidance_of(kind), "output_type": "np"}
        return pipe(**asks, **options, generator=torch.Generator().manual_seed(0)).images

    full = images()
    with gated(pipe.transformer, subnet):
        actual = images()
    assert error(actual, full) > 1e-3, "the gates do something"
    hooks = list(reuse(pipe.transformer, document))
    assert error(actual, images()) <= 1e-5
    for hook in hooks:
        hook.remove()
    assert subnet.cost.ratio < 0.8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mlp_cache_book": [[True, False]] * 5}, "other numbers of steps"),
        ({"msa_cache_book": [[True], [True, False]] * 3}, "'msa_cache_book' is no .steps..blocks. of true and false"),
        ({"step_cache_book": [0, 1] * 3}, "'step_cache_book' is no .steps. of true and false"),
        ({"step_cache_book": []}, "'step_cache_book' is no"),
        ({"msa_cache_book": [[False] * 28] * 6}, "for 28 'transformer_blocks' with 'attn1', and .* has 2; give the"),
        ({"step_cache_book": [True] * 6}, "step 0 is not computed in full"),
    ],
)
def test_books_that_do_not_fit_are_refused(changes, message, tiny_dit, tmp_path):
    path = tmp_path / "book.json"
    path.write_text(json.dumps(invardiff_of("dit") | changes))
    with refused(message):
        import_subnet(path, tiny_dit)


def test_a_book_of_another_model_is_refused():
    with pytest.raises(ValueError, match="those for DiT and FLUX"):
        read_invardiff({"step_cache_book": [False, True], "module_cache_book": {}})


def test_lists_of_steps(tiny_dit, tmp_path):
    """MeanCache lists what is computed, BudCache what is not, in JSON or as torch saves it."""
    path = tmp_path / "steps"
    for document in ([0, 1, 3, 6], {"cache_step": [2, 4, 5, 7], "best_loss": 0.25}):
        path.write_text(json.dumps(document))
        subnet = import_subnet(path, tiny_dit, steps=8)
        assert np.flatnonzero(subnet.gates.all(axis=1)).tolist() == [0, 1, 3, 6]
    for loss in (0.25, torch.tensor(0.25)):
        torch.save({"cache_step": [2, 4, 5, 7], "best_loss": loss}, path)
        assert import_subnet(path, tiny_dit, steps=8).gates.tolist() == subnet.gates.tolist()


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([0, 3, 2], "each larger than the last"),
        ([0, None, 2], "each larger than the last"),
        ([0, None], "a format that is not known"),
        ([0, 1, 9], "names step 9 of 8 steps; give the --steps it is for"),
        ({"cache_step": [0, 2]}, "step 0 is not computed in full"),
        ({"cache_step": []}, "whole numbers"),
        ({"cache_step": [True, 2]}, "whole numbers"),
        ({"cache_step": 10**30}, "whole numbers"),
    ],
)
def test_lists_that_do_not_fit_are_refused(document, message, tiny_dit, tmp_path):
    path = tmp_path / "steps.json"
    path.write_text(json.dumps(document))
    with refused(message):
        import_subnet(path, tiny_dit, steps=8)


def test_a_saved_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    for content, message in (
        ({"weights": [1]}, "no 'cache_step'"),
        ([1, 2], "no 'cache_step'"),
        ({"cache_step": [1], "model": torch.nn.Linear(1, 1)}, "names"),
    ):
        torch.save(content, path)
        with refused(message):
            read_schedule(path)
    path.write_bytes(path.read_bytes()[:-60])
    with refused("damaged"):
        read_schedule(path)


# Out


def subnet_of(document, model, tmp_path, **options):
    path = tmp_path / "in.json"
    path.write_text(json.dumps(document))
    return import_subnet(path, model, **options)


def test_cache_dit_takes_the_mask(tiny_dit, tmp_path):
    cache = pytest.importorskip("cache_dit")
    mask = [1, 1, 0, 1, 0, 0]
    written = cache_dit(subnet_of(mask, tiny_dit, tmp_path))
    assert cache.DBCacheConfig(**written).steps_computation_mask == mask
    assert written["num_inference_steps"] == 6


@pytest.mark.parametrize("branch", [0, 1, 3])
def test_deepcache_goes_out_as_it_came_in(branch, tmp_path):
    settings = {"cache_interval": 3, "cache_branch_id": branch}
    subnet = subnet_of(settings, zoo.pipeline("sd"), tmp_path, steps=7, sampler="ddim")
    again = subnet_of(deepcache(subnet), zoo.pipeline("sd"), tmp_path, steps=7, sampler="ddim")
    assert again.gates.tolist() == subnet.gates.tolist()


REQUEST = {"num_inference_steps": 6, "pipeline": "p", "dtype": "bfloat16"}


def like(subnet, **changes):
    timesteps = [timestep / 1000 for timestep in subnet.sampler.timesteps]
    return {"schema": "sglang-dpcache-schedule-v2", "request": {**REQUEST, "timesteps": timesteps}, **changes}


def test_dpcache_takes_the_steps_and_the_server_s_request(tiny_dit, tmp_path):
    subnet = subnet_of([1, 1, 0, 1, 0, 1], tiny_dit, tmp_path)
    written = sglang_dpcache(subnet, like(subnet, predictor={"order": 1}))
    assert (written["full_steps"], written["num_full_steps"]) == ([0, 1, 3, 5], 4)
    assert (written["mandatory_full_steps"], written["force_last_full"]) == ([0, 1], True)
    assert (written["request"]["pipeline"], written["predictor"]) == ("p", {"order": 1})


def test_what_cannot_be_said_so_is_refused(tiny_dit, tmp_path):
    partial = subnet_of({"ff": [1, 0, 1, 1]}, tiny_dit, tmp_path, sites="layer")
    with refused("step 1 computes 3 of 5 sites, and cache-dit knows whole steps alone"):
        cache_dit(partial)
    with refused("is none"):
        deepcache(partial)
    twice = subnet_of([1, 1, 0, 1, 0, 1], tiny_dit, tmp_path, steps=6, sampler="pndm")
    assert cache_dit(twice)["steps_computation_mask"] == [1, 1, 1, 0, 1, 0, 1]
    with refused("makes 7 calls in 6 steps"):
        sglang_dpcache(twice, like(twice))
    short = subnet_of([1, 0, 1, 1, 0, 1], tiny_dit, tmp_path)
    for given, kind, message in (
        (like(short), DipgoError, "computes the first two"),
        (like(short) | {"schema": "x"}, UsageError, "of schema sglang-dpcache"),
        (like(short) | {"request": {**REQUEST, "timesteps": [9, 8, 7, 3, 2, 1]}}, DipgoError, "timesteps are not"),
        (like(short) | {"request": {"num_inference_steps": 9, "timesteps": []}}, DipgoError, "6 steps, and --like 9"),
    ):
        with refused(message) as caught:
            sglang_dpcache(short, given)
        assert type(caught.value) is kind
    odd = subnet_of([1, 1, 0, 1, 1], zoo.pipeline("sd"), tmp_path, sites="layer")
    with refused("this schedule does not"):
        deepcache(odd)


def test_the_command_writes_what_a_tool_takes(tiny_dit, tmp_path):
    save_subnet(subnet_of([1, 1, 0, 1], tiny_dit, tmp_path), tmp_path / "s.json")
    out = tmp_path / "mask.json"
    done = dipgo("convert", str(tmp_path / "s.json"), "--to", "cache-dit", "-o", str(out))
    assert done.code == 0, done.err
    assert json.loads(out.read_text())["steps_computation_mask"] == [1, 1, 0, 1]
    done = dipgo("convert", str(tmp_path / "s.json"), "--to", "sglang-dpcache", "-o", str(tmp_path / "o.json"))
    assert (done.code, (tmp_path / "o.json").exists()) == (2, False)
    assert "--like" in done.err
