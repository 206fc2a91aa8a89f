"""The solver as a recurrence gives what the scheduler's table gives, for every sampler and any silent steps."""

import numpy as np
import pytest
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from dipgo.model.sampler import Sampler, make_scheduler, tabulate
from export.plan.solver import by_launch, recurrence

BASE = DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
HISTORY = {"ddim": 1, "euler": 1, "dpm++2m": 2, "heun": 2, "unipc": 3, "pndm": 4, "LMSDiscreteScheduler": 4}


def run(found, noise, epsilons):
    latents = [noise]
    for launch in range(len(found.latents)):
        known = min(found.history, launch + 1)
        latents.append(
            sum(
                found.latents[launch, term] * latents[launch - term]
                + found.outputs[launch, term] * epsilons[launch - term]
                for term in range(known)
            )
        )
    return np.stack(latents)


@pytest.mark.parametrize("name", list(HISTORY))
@pytest.mark.parametrize("steps", [5, 20, 50])
def test_every_sampler_has_a_short_memory(name, steps):
    sampler = tabulate(make_scheduler(name, BASE), steps)
    found = recurrence(sampler, range(sampler.calls))
    assert found is not None
    assert found.history <= HISTORY[name]
    random = np.random.default_rng(0)
    noise, epsilons = random.normal(size=64), random.normal(size=(sampler.calls, 64))
    expected = sampler.rows @ np.vstack([noise, epsilons])
    actual = run(found, sampler.rows[0, 0] * noise, epsilons)
    assert np.abs(actual - expected).max() <= 1e-4 * np.abs(expected).max()


@settings(deadline=None)
@given(seed=st.integers(0, 2**31), name=st.sampled_from(list(HISTORY)))
def test_silent_steps_are_part_of_the_launch_before_them(seed, name):
    sampler = tabulate(make_scheduler(name, BASE), 12)
    random = np.random.default_rng(seed)
    launched = [0, *np.flatnonzero(random.random(sampler.calls - 1) < 0.5) + 1]
    found = recurrence(sampler, launched)
    if found is None:  # then the host applies the table, as for any sampler with a long memory
        assert name in ("heun", "unipc", "pndm", "LMSDiscreteScheduler")
        return
    noise, computed = random.normal(size=64), random.normal(size=(len(launched), 64))
    owner = np.searchsorted(launched, np.arange(sampler.calls), side="right") - 1
    expected = sampler.rows @ np.vstack([noise, computed[owner]])
    actual = run(found, sampler.rows[0, 0] * noise, computed)
    assert np.abs(actual[-1] - expected[-1]).max() <= 1e-4 * np.abs(expected[-1]).max()
    assert by_launch(sampler, launched).shape == (len(launched) + 1, len(launched) + 1)


def test_a_sampler_that_remembers_everything_stays_on_the_host():
    calls = 10
    rows = np.tril(np.random.default_rng(0).normal(size=(calls + 1, calls + 1)))
    sampler = Sampler("Forgetless", {}, calls, tuple(range(calls)), np.ones(calls), rows)
    assert recurrence(sampler, range(calls)) is None
