"""Replies that botocore's parser takes apart, or refuses: never an error of another kind.

Law: only parsing happens here, so what goes wrong is the reply's doing.
"""

from typing import Any
from xml.etree.ElementTree import Element

from aiobotocore.parsers import AioResponseParserFactory
from botocore.parsers import ResponseParserError


class CarefulParsers(AioResponseParserFactory):  # type: ignore[misc]
    """Stands where botocore looks for its parsers."""

    def create_parser(self, protocol_name: str) -> "_Careful":
        """Called for each reply."""
        return _Careful(super().create_parser(protocol_name))


class _Careful:
    def __init__(self, parser: Any) -> None:
        self._parser = parser

    async def parse(self, response: Any, shape: Any) -> Any:
        try:
            parsed = await self._parser.parse(response, shape)
        except ResponseParserError:
            raise
        except Exception as e:  # an absurd date is a RuntimeError or an OverflowError
            msg = f"{type(e).__name__}: {e}"
            raise ResponseParserError(msg) from e
        _refuse_nodes(parsed)
        return parsed


def _refuse_nodes(parsed: Any) -> None:
    """Where a text is expected and two are there, botocore gives their nodes."""
    if isinstance(parsed, dict | list):
        for value in parsed.values() if isinstance(parsed, dict) else parsed:
            _refuse_nodes(value)
    elif isinstance(parsed, Element):
        msg = f"it has more than one {parsed.tag!r} where there is one"
        raise ResponseParserError(msg)
