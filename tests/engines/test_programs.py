"""Several programs in one bundle: each is what a bundle of its own would be, and requests choose."""

from dataclasses import replace

import numpy as np
import pytest

import dipgo
from dipgo.schedule.schedule import Schedule
from dipgo.schedule.search_record import SearchRecord
from dipgo.schedule.subnet import make_subnet
from engines.serving.limits import Limits
from engines.serving.repository import _inputs
from engines.serving.requests import read_rows, render
from export.bundle import open_bundle
from export.compiler import compile_subnet
from export.sources import normalise
from tests import command, models, zoo
from tests.checks import error, misused
from tests.engines.dropin import compiled

CHOICES = [(4, 0.5), (4, 0.9), (3, 0.5)]  # steps, and how many gates are open


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One bundle of three programs, and what the pipeline is called with for each."""
    base, subnets = compiled("sd"), []
    for number, (steps, keep) in enumerate(CHOICES):
        task = zoo.task("sd", steps)
        drawn = models.random_subnet(task.trace, task.sampler, number, keep, terms=2, channels=1)
        subnets.append(normalise(drawn, task.trace))
    folder = tmp_path_factory.mktemp("programs") / "bundle"
    compile_subnet(subnets, zoo.model("sd"), folder)
    return [replace(base, subnet=subnet, folder=folder) for subnet in subnets]


def asked(subnet):
    return {"num_inference_steps": subnet.sampler.steps, "budget": round(subnet.cost.ratio, 2)}


def test_each_program_makes_the_images_of_its_gates(made):
    with dipgo.load(made[0].folder) as pipe:
        for own in made:
            steps = {"num_inference_steps": own.subnet.sampler.steps}
            expected = own.expected(**steps, guidance_scale=2.5)
            assert error(own.call(pipe, **asked(own.subnet), guidance_scale=2.5), expected) <= 1e-4
        first = made[0].expected()
        assert error(made[0].call(pipe, num_inference_steps=None), first) <= 1e-4
        assert error(made[0].call(pipe), first) <= 1e-4  # its first of four steps


def test_an_attached_bundle_goes_by_the_steps_of_a_call(made):
    for own in made:
        steps = {"num_inference_steps": own.subnet.sampler.steps}
        expected = own.expected(**steps)
        with dipgo.attach(own.pipe, own.folder, budget=asked(own.subnet)["budget"]) as pipe:
            assert error(own.call(pipe, **steps), expected) <= 1e-4


def test_programs_share_weights_and_equal_graphs(tmp_path):
    """Whole steps: one graph computes all that a step computes, however many steps there are."""
    subnets = []
    for steps in (4, 6, 8):
        task = zoo.task("dit", steps)
        gates = np.repeat(np.arange(task.sampler.calls) % 2 == 0, len(task.trace.sites))
        schedule = Schedule(gates.reshape(task.sampler.calls, -1))
        subnets.append(make_subnet(task.trace, task.sampler.identity(4.0), schedule, SearchRecord()))
    alone = compile_subnet(subnets[0], zoo.model("dit"), tmp_path / "alone")
    together = compile_subnet(subnets, zoo.model("dit"), tmp_path / "together")
    assert together.graphs.keys() == alone.graphs.keys()
    assert len(together.further) == 2
    size = [sum(file.bytes for file in record.files.values()) for record in (alone, together)]
    assert size[1] <= 1.1 * size[0]


def test_what_is_not_there_is_refused_with_what_is(made):
    ratios = [own.subnet.cost.ratio for own in made]
    holds = f"the bundle holds 4 steps at {ratios[0]:.1%} of the MACs, 4 steps at {ratios[1]:.1%} of the MACs, 3 steps"
    with dipgo.load(made[0].folder) as pipe:
        with misused(f"num_inference_steps = 7, {holds}"):
            pipe("a red fox", num_inference_steps=7)
        with misused(f"num_inference_steps = 3 and budget = 0.01, {holds}"):
            pipe("a red fox", num_inference_steps=3, budget=0.01)


def test_requests_of_several_programs_are_answered_together(made):
    with dipgo.load(made[0].folder) as program:
        assert {"steps", "budget"} <= {each.name for each in _inputs(open_bundle(made[0].folder).record)}
        choices = [asked(own.subnet) for own in made]
        given = {"prompt": np.array([[b"a red fox"]] * 3, object), "seed": np.full((3, 1), 3)}
        given["steps"] = np.array([[each["num_inference_steps"]] for each in choices], np.int32)
        given["budget"] = np.array([[each["budget"]] for each in choices], np.float32)
        images = render(read_rows(program, given, Limits()))
        for own, image in zip(made, images, strict=True):
            steps = {"num_inference_steps": own.subnet.sampler.steps}
            expected = own.expected(prompt="a red fox", **steps)[0]
            assert np.abs(image[0] / 255 - expected).max() <= 0.6 / 255


def test_the_command_line_chooses(made, tmp_path):
    target = tmp_path / "a.png"
    ratio = asked(made[1].subnet)["budget"]
    options = ("--prompt", "a red fox", "--steps", 4, "--budget", ratio, "-o", target)
    assert command.dipgo("run", made[0].folder, *options).code == 0
    assert target.exists()
    assert "parity holds" in command.dipgo("verify", made[0].folder, "-n", 1).out
    text = command.dipgo("inspect", made[0].folder).out
    assert all(f"{own.subnet.sampler.steps} steps at {own.subnet.cost.ratio:.1%}" in text for own in made)


def test_subnets_that_do_not_go_together_are_refused(made, tmp_path):
    task = zoo.task("sd", 5, guidance=1.0)
    single = models.random_subnet(task.trace, task.sampler, 0)
    for subnets, message in (
        ([made[0].subnet, made[0].subnet], "requests could not tell them apart"),
        ([made[0].subnet, single], "SubNet 2 of 2 has other passes of guidance"),
    ):
        with misused(message):
            compile_subnet(subnets, zoo.model("sd"), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
