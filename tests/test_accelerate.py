"""Accelerate, with the recipe of the page about frameworks and the real package."""

from secrets import token_hex

import pytest

from recipes import Lost, lost_after, recipe

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")


def test_a_run_that_was_lost_in_mid_epoch_goes_on_to_the_same_losses():
    bucket = f"memory://{token_hex(6)}/"
    names, _ = recipe("Accelerate", bucket)
    undisturbed = names["train"](f"{bucket}undisturbed", 24)
    with pytest.raises(Lost), lost_after(19):
        names["train"](f"{bucket}lost", 24)
    resumed = names["train"](f"{bucket}lost", 24)
    assert list(resumed) == list(range(17, 25))
    assert resumed == {step: undisturbed[step] for step in resumed}
