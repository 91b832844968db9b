"""Every error travels between ranks as it is."""

import inspect
import pickle

import pytest

from cloudckpt import errors
from cloudckpt.errors import CheckpointError, MissingKeyError, StoreError, leaves, unwrap

CLASSES = [c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, Exception)]
LOWEST = pickle.DEFAULT_PROTOCOL - 2


@pytest.mark.parametrize("protocol", [LOWEST, pickle.DEFAULT_PROTOCOL])
@pytest.mark.parametrize("kind", CLASSES, ids=lambda c: c.__name__)
def test_every_error_survives_pickle_with_its_message_and_notes(kind, protocol):
    error = kind("s3://bucket/key: it's gone")
    error.add_note("rank 3 on host a")
    error.add_note("bytes 0 to 10")
    back = pickle.loads(pickle.dumps(error, protocol))
    assert type(back) is kind
    assert str(back) == str(error) == "s3://bucket/key: it's gone"
    assert back.args == error.args
    assert back.__notes__ == ["rank 3 on host a", "bytes 0 to 10"]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda c: c.__name__)
def test_every_error_is_a_checkpoint_error_without_an_init_of_its_own(kind):
    assert issubclass(kind, CheckpointError)
    assert "__init__" not in vars(kind)
    assert kind.__doc__


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (errors.ReservedNameError, ValueError),
        (errors.UsageError, ValueError),
        (errors.TooLargeError, MemoryError),
        (errors.DeadlineError, TimeoutError),
        (errors.RanksLostError, errors.RanksFailedError),
        (errors.BarrierTimeoutError, TimeoutError),
        (errors.UnsupportedUrlError, ValueError),
        (errors.UnstorableError, TypeError),
        (errors.MissingKeyError, KeyError),
        (errors.ShapeMismatchError, ValueError),
        (errors.DtypeMismatchError, TypeError),
        (errors.ObjectNotFoundError, StoreError),
        (errors.StoreUnavailableError, StoreError),
        (errors.StaleCredentialsError, errors.CredentialsError),
        (errors.ChecksumsNotKnownError, errors.NotImplementedByStoreError),
        (errors.ThrottledError, errors.StoreUnavailableError),
        (errors.NotCommittedError, errors.CheckpointNotFoundError),
        (errors.UnsupportedVersionError, errors.ManifestError),
    ],
    ids=lambda c: c.__name__,
)
def test_an_error_is_caught_by_the_class_its_handler_expects(kind, builtin):
    with pytest.raises(builtin):
        raise kind("no")


def test_the_message_of_a_missing_key_is_not_a_repr():
    assert str(MissingKeyError("no entry 'a\\b'\nsee keys()")) == "no entry 'a\\b'\nsee keys()"
    assert str(pickle.loads(pickle.dumps(MissingKeyError("plain")))) == "plain"


def test_how_long_the_store_asks_to_be_left_alone_survives_pickle():
    error = errors.ThrottledError("busy")
    assert error.retry_after_s is None
    error.retry_after_s = 2.5
    assert pickle.loads(pickle.dumps(error)).retry_after_s == 2.5


def test_an_error_outside_a_group_is_itself():
    error = StoreError("no")
    assert unwrap(error) is error
    assert not hasattr(error, "__notes__")


def test_a_group_of_one_shows_its_only_error_without_a_note():
    error = StoreError("no")
    assert unwrap(ExceptionGroup("g", [error])) is error
    assert not hasattr(error, "__notes__")


def test_a_nested_group_shows_its_first_error_and_notes_the_others_in_order():
    first, second, third = StoreError("one"), ValueError("two"), KeyboardInterrupt("three")
    group = BaseExceptionGroup("g", [ExceptionGroup("h", [ExceptionGroup("i", [first]), second]), third])
    assert list(leaves(group)) == [first, second, third]
    assert unwrap(group) is first
    assert first.__notes__ == ["meanwhile also: ValueError: two", "meanwhile also: KeyboardInterrupt: three"]


def test_the_notes_an_error_had_come_before_those_of_its_group():
    first = StoreError("one")
    first.add_note("rank 0")
    unwrap(ExceptionGroup("g", [first, ValueError("two")]))
    assert first.__notes__ == ["rank 0", "meanwhile also: ValueError: two"]
