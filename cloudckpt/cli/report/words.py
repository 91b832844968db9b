"""Texts of others, short enough to stand on a page.

Law: pure.
"""

_MOST = 200
"""Characters of a name."""


def cut(text: str, most: int = _MOST) -> str:
    """The text, or both its ends where it is longer than ``most`` characters."""
    half = most // 2
    return text if len(text) <= most else f"{text[:half]} … {text[-half:]}"
