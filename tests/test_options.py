"""Keyword arguments find the options they belong to."""

from dataclasses import dataclass

import pytest

from cloudckpt.errors import UsageError
from cloudckpt.options import overridden, refuse_unknown


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    fast: bool = False
    limit: int = 3

    def __post_init__(self) -> None:
        if self.limit < 0:
            msg = "limit must not be negative"
            raise UsageError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    region: str = "here"


def test_an_override_replaces_its_field_and_is_taken_away():
    overrides = {"limit": 5, "region": "there"}
    assert overridden(Speed(fast=True), overrides) == Speed(fast=True, limit=5)
    assert overrides == {"region": "there"}


def test_options_without_overrides_stay_themselves():
    options = Speed()
    assert overridden(options, {"region": "there"}) is options


def test_an_override_of_none_is_an_override():
    assert overridden(Place(), {"region": None}).region is None


def test_an_override_is_checked_as_the_option_is():
    with pytest.raises(UsageError, match="negative"):
        overridden(Speed(), {"limit": -1})


def test_the_options_given_are_not_changed():
    options = Speed()
    overridden(options, {"limit": 9})
    assert options.limit == 3


def test_nothing_left_over_is_no_error():
    refuse_unknown({}, Speed(), Place())


def test_what_no_options_took_is_refused_with_all_that_is_known():
    with pytest.raises(UsageError) as caught:
        refuse_unknown({"zeta": 1, "alpha": 2}, Speed(), Place())
    assert str(caught.value) == "unknown option(s) alpha, zeta; known are fast, limit, region"
