"""Latency as the cost: a profile measured on a real program, as costs of the traced graph."""

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.latency import measure_latency
from dipgo.graph.latency import LatencyProfile, SiteLatency, read_profile
from dipgo.schedule.search_record import Cost
from dipgo.schedule.subnet import load_subnet, save_subnet
from dipgo.searching.search import search
from tests import zoo
from tests.checks import refused

STEPS = 8


def made_up(task, nanoseconds):
    """A profile of so many nanoseconds a site."""
    names = [site.name for site in task.trace.sites]
    sites = [SiteLatency(name=name, nanoseconds=ns) for name, ns in zip(names, nanoseconds, strict=True)]
    given = {"engine": "none", "machine": "none", "guidance_scale": task.guidance_scale, "base_nanoseconds": 7}
    return LatencyProfile(model=task.model.identity(), sites=sites, **given)


def test_measured_profile_has_every_site_and_takes_time(task, tmp_path):
    profile = measure_latency(task, repeats=5, threads=1)
    assert [site.name for site in profile.sites] == [site.name for site in task.trace.sites]
    assert profile.base_nanoseconds + sum(site.nanoseconds for site in profile.sites) > 10_000
    path = tmp_path / "profile.json"
    path.write_text(profile.text())
    assert read_profile(path) == profile
    path.write_text(json.dumps({"search": {"cost": {"kind": "macs"}}}))
    with refused("searched by MACs, so it holds no latency profile; give one that was searched with"):
        read_profile(path)


def test_costs_add_up_what_is_computed(task):
    count = len(task.trace.sites)
    costs = made_up(task, [10**k for k in range(1, count + 1)]).costs(task.trace)
    outputs = task.trace.output_sites()
    for row in np.random.default_rng(0).random((20, count)) < 0.5:
        row[outputs] = True  # else nothing inside is read, and computing it would be dead work
        assert costs.call(row) == 7 + sum(10 ** (k + 1) for k in np.flatnonzero(row))


def test_budget_is_a_share_of_the_time(task, tmp_path):
    """Where one site takes nearly all the time, the budget is about that site's gates alone."""
    nanoseconds = [1] * len(task.trace.sites)
    nanoseconds[0] = 1_000_000
    profile = made_up(task, nanoseconds)
    subnet = search(task, zoo.search_config(STEPS, 0.51), profile=profile)
    assert subnet.search.cost.kind == "latency"
    assert subnet.search.cost.profile == profile
    assert subnet.gates[:, 0].sum() == 4
    assert subnet.search.cost.ratio == pytest.approx(0.5, abs=0.01)
    assert subnet.cost == Cost.of(subnet.schedule, task.trace.macs), "the record still counts MACs"
    save_subnet(subnet, tmp_path / "s.json")
    assert load_subnet(tmp_path / "s.json").search == subnet.search
    assert read_profile(tmp_path / "s.json") == profile


def test_foreign_profile_is_refused(task):
    profile = made_up(task, [1] * len(task.trace.sites))
    other = replace(task.trace, sites=task.trace.sites[1:])
    with refused("other sites"):
        profile.costs(other)
    foreign = profile.model_copy(update={"model": profile.model.model_copy(update={"config_sha256": "0" * 64})})
    with refused("another model"):
        foreign.costs(task.trace)
