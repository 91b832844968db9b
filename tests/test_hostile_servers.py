"""Servers that lie: each call ends with an error of ours or with what was asked for, and writes nowhere else."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fuzz import fuzz_http
from fuzz.mutations import HOSTILE, altered_bytes

pytestmark = pytest.mark.usefixtures("nothing_from_outside")


@settings(HOSTILE, max_examples=250)
@given(altered_bytes(fuzz_http.seeds()))
def test_a_reply_of_altered_bytes_ends_a_call_in_an_error_of_ours_or_well(data):
    fuzz_http.check(data)


@settings(HOSTILE, max_examples=60)
@given(st.integers(0, len(fuzz_http.CALLS) - 1), st.sampled_from(fuzz_http.seeds()))
def test_a_reply_to_another_call_ends_a_call_in_an_error_of_ours_or_well(call, reply):
    fuzz_http.check(bytes([call]) + reply[1:])


@pytest.mark.parametrize("reply", fuzz_http.seeds(), ids=lambda reply: f"{reply[0]} {reply[1:20]}")
def test_the_replies_that_are_altered_are_understood(reply):
    fuzz_http.check(reply)
