"""A report as one page of HTML that asks for nothing.

Law: pure but for reading what lies beside this file. Text of others enters the page as data, never as HTML.
"""

import hashlib
from base64 import b64encode
from html import escape
from importlib.resources import files

import msgspec

from cloudckpt.cli.report.gathering import Report

_SCRIPTS = ("elements.js", "treemap.js", "timeline.js", "tables.js", "changes.js", "page.js")


def as_json(report: Report) -> bytes:
    """The report as one JSON object."""
    return msgspec.json.encode(report)


def render(report: Report) -> bytes:
    """The page.

    Its policy (https://www.w3.org/TR/CSP3/) forbids it to load, send or run anything but its own style and script,
    which are named by their hashes.
    """
    script = "{\n" + "\n".join(map(_asset, _SCRIPTS)) + "}\n"
    style = _asset("page.css")
    parts = {
        "policy": f"default-src 'none'; style-src {_hash_of(style)}; script-src {_hash_of(script)}; "
        "base-uri 'none'; form-action 'none'",
        "title": escape(f"{report.url.rpartition('/')[2]} · cloudckpt"),
        "style": style,
        "data": _harmless(as_json(report)).decode(),
        "script": script,
    }
    first, *others = _asset("page.html").split("{{")
    made = [first]
    for other in others:
        name, _, rest = other.partition("}}")
        made += [parts[name], rest]
    return "".join(made).encode(errors="replace")


def _harmless(data: bytes) -> bytes:
    """JSON that no HTML parser finds a tag in."""
    for char in b"<>&":
        data = data.replace(bytes([char]), b"\\u%04x" % char)
    return data


def _hash_of(text: str) -> str:
    return f"'sha256-{b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _asset(name: str) -> str:
    return files(__package__).joinpath(name).read_text()
