"""What must not be written anywhere: values that are secrets, and characters that a terminal would obey. Imports no torch.

A secret is known by the name of the key or environment variable that holds it, or by its place in a URL.
"""

from __future__ import annotations

import os
import re
from typing import Any

HIDDEN = "(hidden)"
SECRET = re.compile(
    r"(^|[_.-])((api|access|secret|private|auth)[_-]?key|[a-z]*password|passwd|passphrase|pwd|secret|token|credentials?"
    r"|connection_?string)$|[a-z0-9]_key$",
    re.IGNORECASE,
)
_NO_SECRETS = ("PWD", "OLDPWD", "GPG_KEY")  # folders, and the public key of Python's container images
_SHORTEST = 8  # a shorter value occurs in texts that have nothing to do with it
_USER_OF_URL = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)")
_FIELD_OF_URL = re.compile(
    r"(?<=[?&])([\w.-]*(?:key|token|secret|password|signature|credential|sig|auth)=)[^&\s#'\"]+", re.IGNORECASE
)


def names_secret(name: str) -> bool:
    """Whether a key or an environment variable of this name holds a secret."""
    return bool(SECRET.search(name)) and name not in _NO_SECRETS


def hide(text: str) -> str:
    """`text` without the values of environment variables that hold secrets, and without the credentials in URLs."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and value in text and names_secret(name) and not value.startswith("/"):
            text = text.replace(value, HIDDEN)
    if "://" in text:
        text = _FIELD_OF_URL.sub(rf"\g<1>{HIDDEN}", _USER_OF_URL.sub(HIDDEN, text))
    return text


def without_secrets(value: Any) -> Any:
    """A copy of nested dicts and lists: whatever stands under a key that names a secret reads "(hidden)", texts are `hide`d."""
    if isinstance(value, dict):
        return {hide(str(k)): HIDDEN if v and names_secret(str(k)) else without_secrets(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_secrets(v) for v in value]
    return hide(value) if isinstance(value, str) else value


def hide_argument(argument: str) -> str:
    """One word of a command line: `key=(hidden)` where the key names a secret."""
    key, equals, _ = argument.partition("=")
    return f"{key}={HIDDEN}" if equals and names_secret(key) else hide(argument)


def printable(text: str) -> str:
    """One line that is safe on any terminal: line breaks, escape codes and lone surrogates as backslash sequences."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
