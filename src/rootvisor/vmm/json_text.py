# SPDX-License-Identifier: Apache-2.0
"""JSON, without the cost of it where it is not needed: `json` takes 400 ms to import in a root partition."""

from __future__ import annotations

from .schema import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_quote: list[Callable[[str], str]] = []


def quoted(text: str) -> str:
    """A string as JSON, in ASCII."""
    if not _quote:
        try:
            from _json import encode_basestring_ascii  # what json.encoder uses, in C
        except ImportError:
            from json.encoder import encode_basestring_ascii
        _quote.append(encode_basestring_ascii)
    return _quote[0](text)


def encoded(document: object) -> bytes:
    """A document as JSON."""
    import json

    return json.dumps(document, separators=(",", ":")).encode()


def decoded(text: bytes) -> Any:
    """The document that JSON text (UTF-8) stands for. ConfigError when it is none.

    Stricter than the standard module: no NaN, no Infinity, no name twice in an object.
    """
    import json

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_object, parse_constant=_no_constant)
    except RecursionError:
        raise ConfigError("", "the JSON document is nested too deeply") from None
    except UnicodeDecodeError:
        raise ConfigError("", "the body is not UTF-8 text") from None
    except ConfigError:
        raise
    except ValueError as error:  # JSONDecodeError, or a number with thousands of digits
        reason = " ".join(str(error).split())
        raise ConfigError("", f"the body is not a JSON document: {reason[:200]}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(twice[:60], "is given twice in one object")
    return members


def _no_constant(word: str) -> None:
    raise ConfigError("", f"the body is not a JSON document: {word} is no number")
