"""Slots hold what is needed, and nothing is overwritten while it is still to be read."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from dipgo.liveness import plan
from export.bundle import TensorRecord
from export.slots import allocate, naive_bytes

SITES = 4
TENSORS = [[TensorRecord(name="f", dtype="float32", shape=[2, 3 + site % 2])] for site in range(SITES)]


def live_sites(row, wanted):
    return set(range(SITES))


@given(seed=st.integers(0, 2**31), steps=st.integers(2, 12), terms=st.integers(1, 3), keep=st.floats(0, 1))
def test_every_read_finds_what_was_stored(seed, steps, terms, keep):
    gates = np.random.default_rng(seed).random((steps, SITES)) < keep
    gates[0] = True
    plans = plan(gates, terms, live_sites)
    allocation = allocate(plans, TENSORS)
    held = {}
    for step, entry in enumerate(plans):
        reads = {
            allocation.slot_of[source, site, 0]: (source, site)
            for site, sources in entry.served.items()
            for source in sources
        }
        for slot, feature in reads.items():
            assert held[slot] == feature
        writes = {allocation.slot_of[step, site, 0]: (step, site) for site in entry.stored}
        assert not reads.keys() & writes.keys()
        held.update(writes)
    assert sum(slot.bytes for slot in allocation.slots) <= naive_bytes(TENSORS, terms + 1)


def test_disjoint_lives_share_a_slot():
    gates = np.ones((6, SITES), bool)
    gates[1, 0] = gates[4, 2] = False  # sites 0 and 2 have one shape, their features live in steps 0-1 and 3-4
    allocation = allocate(plan(gates, 1, live_sites), TENSORS)
    assert len(allocation.slots) == 1
    assert allocation.slots[0].bytes == 24
