"""Requests whose clients leave: what is rendered for nobody ends, and the others get their images."""

import numpy as np
import pytest

import dipgo
from engines.serving.requests import Row, render
from export.compiler import write_bundle
from tests import zoo
from tests.models import random_subnet

STEPS = 4


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    traced, sampler = zoo.trace("dit"), zoo.sampler("dit", STEPS, None)
    folder = tmp_path_factory.mktemp("requests") / "bundle"
    write_bundle(zoo.converted(traced, 2), random_subnet(traced, sampler, 0), sampler, folder)
    with dipgo.load(folder) as program:
        yield program


def test_a_batch_that_nobody_waits_for_ends_before_the_next_step(program, monkeypatch):
    rows, questions, starts = [Row(program, 1, None, 5, 3), Row(program, 2, None, 6, 1)], [], []
    whole = render(rows)
    denoise = program.denoise
    monkeypatch.setattr(program, "denoise", lambda *arguments: starts.append(len(questions)) or denoise(*arguments))

    def left(row):
        questions.append(row)
        return row == 0 and len(questions) > 3

    images = render(rows, left)
    assert images[0] is None
    assert np.array_equal(images[1], whole[1])
    assert starts == [1, 6]  # a batch of row 0 alone, which ends after two steps, and one for which row 1 waits
    assert questions[:6] == [0, 0, 0, 0, 0, 1]


def test_who_left_before_costs_nothing(program, monkeypatch):
    monkeypatch.setattr(program, "noise", None)
    assert render([Row(program, 1, None, 5, 16)], lambda row: True) == [None]
