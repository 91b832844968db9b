"""Addresses in what is shown to people: a user, a password and a signature are left out of them.

Law: pure.
"""

import re

_MOST_CHARACTERS = 1000
_USER = re.compile(r"""//[^\s"'<>]*@""")
_SIGNATURE = re.compile(r"""(//[^\s"'<>?#]*)[?#][^\s"'<>]*""")


def shown(text: object) -> str:
    """A text of others, without what its URLs hold before their host and behind their path; of bounded length.

    What is left out is rather more than is needed: a path that has an ``@`` in it goes as far as that.
    """
    told = _SIGNATURE.sub(r"\1", _USER.sub("//", str(text)))
    return told if len(told) <= _MOST_CHARACTERS else f"{told[:_MOST_CHARACTERS]}..."
