"""Codecs: what a round trip may cost, for any finite rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from edge_sdk.updates.codecs import CODECS


def rows_within(limit):
    sizes = st.tuples(st.integers(1, 5), st.integers(1, 40))
    return arrays.arrays(np.float32, sizes, elements=st.floats(-limit, limit, width=32))


def round_trip(name, rows):
    return CODECS[name].decode(CODECS[name].encode(rows))


@settings(max_examples=100, deadline=None)
@given(rows_within(2.0**100))
def test_fp32_changes_nothing(rows):
    np.testing.assert_array_equal(round_trip("fp32", rows), rows)


@settings(max_examples=100, deadline=None)
@given(rows_within(2.0**15))
def test_fp16_is_within_half_a_unit_of_its_last_place(rows):
    error = np.abs(round_trip("fp16", rows) - rows)
    assert (error <= np.maximum(np.abs(rows) * 2.0**-11, 2.0**-25)).all()


@settings(max_examples=200, deadline=None)
@given(rows_within(2.0**100))
def test_int8_is_within_half_a_step_of_its_row(rows):
    encoded = CODECS["int8"].encode(rows)
    decoded = CODECS["int8"].decode(encoded)
    assert np.abs(encoded.values.astype(int)).max() <= 127
    step = np.abs(rows).max(axis=1, keepdims=True).astype(np.float64) / 127
    # below the smallest normal float32 a scale loses its own precision
    assert (np.abs(decoded.astype(np.float64) - rows) <= 0.5001 * step + 1e-43 * 127).all()
    again = CODECS["int8"].encode(decoded)
    np.testing.assert_allclose(CODECS["int8"].decode(again), decoded, rtol=1e-5, atol=1e-42)


@pytest.mark.parametrize("name", sorted(CODECS))
def test_payload_bytes_are_those_of_the_arrays(name):
    encoded = CODECS[name].encode(np.ones((3, 7), np.float32))
    assert encoded.values.dtype.itemsize * 8 == CODECS[name].form.bits
    scales = 0 if encoded.scales is None else encoded.scales.nbytes
    assert CODECS[name].form.payload_bytes(3, 7) == encoded.values.nbytes + scales
