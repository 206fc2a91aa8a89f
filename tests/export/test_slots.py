"""Slots hold what is needed, and nothing is overwritten while it is still to be read."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export.plan.launches import Launch
from export.plan.slots import allocate, bytes_of, prune
from export.records.graphs import TensorRecord

NAMES = ["a", "b", "c", "d"]
TENSORS = {name: TensorRecord(name=name, dtype="float32", shape=[2, 3 + k % 2]) for k, name in enumerate(NAMES)}


def random_launches(seed, count):
    """Each launch writes some values and reads some that were written before it."""
    random = np.random.default_rng(seed)
    written, launches = [], []
    for step in range(count):
        reads = {f"in{k}": written[index] for k, index in enumerate(random.choice(len(written), 2))} if written else {}
        writes = {name: (name, step) for name in NAMES if random.random() < 0.6}
        launches.append(Launch(step, "g", reads, writes))
        written += writes.values()
    return launches


@given(seed=st.integers(0, 2**31), count=st.integers(2, 14))
def test_every_read_finds_what_was_written(seed, count):
    launches = random_launches(seed, count)
    kept = {launches[-1].writes[name]: count for name in launches[-1].writes}
    launches = prune(launches, kept)
    allocation = allocate(launches, TENSORS, (), kept)
    held = {}
    for launch in launches:
        reads = {allocation.slot_of[value]: value for value in launch.reads.values()}
        for slot, value in reads.items():
            assert held[slot] == value
            assert allocation.slots[slot].shape == TENSORS[value[0]].shape
        writes = {allocation.slot_of[value]: value for value in launch.writes.values()}
        assert len(writes) == len(launch.writes)
        assert not reads.keys() & writes.keys()
        held.update(writes)
    for value in kept:
        assert held[allocation.slot_of[value]] == value


def test_what_nobody_reads_is_not_written():
    launches = [Launch(0, "g", {}, {"a": ("a", 0), "b": ("b", 0)}), Launch(1, "g", {"x": ("a", 0)}, {})]
    assert [sorted(launch.writes) for launch in prune(launches, {})] == [["a"], []]
    assert [sorted(launch.writes) for launch in prune(launches, {("b", 0): 0})] == [["a", "b"], []]


def test_disjoint_lives_share_a_slot():
    chain = [Launch(step, "g", {"x": ("a", step - 1)} if step else {}, {"a": ("a", step)}) for step in range(6)]
    allocation = allocate(chain, TENSORS, (), {("a", 5): 6})
    assert len(allocation.slots) == 2  # what is read, and what is written meanwhile
    assert sum(slot.bytes for slot in allocation.slots) == 2 * bytes_of(TENSORS["a"])


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2), ("int64", 8)])
def test_bytes_are_those_of_the_dtype(dtype, size):
    assert bytes_of(TensorRecord(name="a", dtype=dtype, shape=["batch", 3]), {"batch": 5}) == 15 * size


def test_given_values_are_there_before_the_first_launch():
    launches = [Launch(0, "g", {"x": ("a", 0)}, {"a": ("a", 1)}), Launch(1, "g", {"x": ("a", 1)}, {})]
    allocation = allocate(launches, TENSORS, [("a", 0)])
    assert allocation.slot_of["a", 0] != allocation.slot_of["a", 1]
