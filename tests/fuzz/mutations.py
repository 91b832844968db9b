"""Valid inputs, altered: bytes flipped, cut off and spliced, and JSON whose values are absurd.

Law: strategies alone; what comes out of them is not expected to be wrong.
"""

from hypothesis import settings
from hypothesis import strategies as st

HOSTILE = settings(derandomize=True, deadline=None, database=None, max_examples=200)
"""The same inputs each time, so that a failure in CI is one anywhere."""

_PLACES = st.one_of(st.floats(0, 1), st.floats(0, 0.02), st.floats(0.98, 1))
_EDITS = st.lists(
    st.tuples(
        _PLACES, st.sampled_from(["set", "flip", "cut", "insert", "truncate", "repeat"]), st.binary(max_size=9)
    ),
    min_size=1,
    max_size=5,
)
HUGE = [0, 1, -1, 7, 1 << 31, (1 << 32) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, -(1 << 63), (1 << 64) - 1, 10**400]
ABSURD = st.recursive(
    st.sampled_from(
        [None, True, 1.5, 1e300, "", "x", "AAAA", "../../etc/passwd", "\U0001f600", [], {}, [[]], ["tensor"], *HUGE]
    ),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["", "a", "key", "size"]), inner),
    max_leaves=5,
)
_NUMBERS = st.sampled_from(HUGE) | st.integers(-3, 200)


@st.composite
def altered_bytes(draw, valid):
    """One of ``valid``, edited here and there, or spliced with another."""
    data = bytearray(draw(st.sampled_from(valid)))
    for place, edit, some in draw(_EDITS):
        at = int(place * max(0, len(data) - 1))
        if edit == "set":
            data[at : at + len(some)] = some
        elif edit == "flip" and data:
            data[at] ^= 1 << (len(some) % 8)
        elif edit == "cut":
            del data[at : at + 3 * len(some) + 1]
        elif edit == "insert":
            data[at:at] = some
        elif edit == "truncate":
            del data[at:]
        else:
            data[at:at] = data[at : at + 40]
    if draw(st.integers(0, 7)) == 0:
        other = draw(st.sampled_from(valid))
        data[int(draw(_PLACES) * len(data)) :] = other[int(draw(_PLACES) * len(other)) :]
    return bytes(data)


@st.composite
def altered_tree(draw, valid):
    """JSON of which some values were put out of place, repeated, left out, or swapped with absurd ones."""
    tree = _copied(valid)
    for _ in range(draw(st.integers(1, 3))):
        parent = tree
        while True:
            places = _places(parent)
            if not places:
                break
            place = draw(st.sampled_from(places))
            inner = parent[place]
            if not _places(inner) or draw(st.integers(0, 3)) == 0:
                _alter(draw, parent, place, tree)
                break
            parent = inner
    return tree


def _alter(draw, parent, place, tree):
    kind = draw(st.sampled_from(["number", "absurd", "drop", "repeat", "near"]))
    value = parent[place]
    if kind == "drop":
        del parent[place]
    elif kind == "repeat" and isinstance(parent, list):
        parent.insert(place, _copied(value))
    elif kind == "near" and type(value) is int:
        parent[place] = value + draw(st.sampled_from([-1, 1, 16, -16, 96, 4096]))
    elif kind == "number" and isinstance(value, int | float):
        parent[place] = draw(_NUMBERS)
    else:
        parent[place] = draw(ABSURD)


def _places(tree):
    if isinstance(tree, dict):
        return list(tree)
    return list(range(len(tree))) if isinstance(tree, list) else []


def _copied(tree):
    if isinstance(tree, dict):
        return {name: _copied(value) for name, value in tree.items()}
    return [_copied(value) for value in tree] if isinstance(tree, list) else tree
