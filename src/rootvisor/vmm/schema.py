# SPDX-License-Identifier: Apache-2.0
"""Tables that describe configuration documents, and the check of documents against them.

A :class:`Table` is a list of :class:`Field`: name, kind of value, default, what it is for. Everything that deals with
configuration reads these tables: the check of JSON bodies (here), option strings (`options`), the OpenAPI document
(`openapi`) and the help of the command. A checked document is a plain dict with every default filled in; fields without
a default that were not given are absent.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    Document = dict[str, Any]
    #: Checks what fields have to do with each other, and fills in defaults that depend on others. Called with the
    #: checked document, and a function from field name to the name under which the user knows it.
    Check = Callable[[Document, Callable[[str], str]], None]

MAX_PATH_BYTES = 4095
_UNITS = {"K": 10, "M": 20, "G": 30, "T": 40}


class ConfigError(ValueError):
    """A configuration that cannot be: ``str()`` is one line, the field's path and what is wrong with it.

    ``path`` names the field as the user wrote it (``disks[0].readonly``; empty: the document itself), ``problem`` is
    the rest. ``conflict``: the configuration would be right if another device did not have that identifier.
    """

    def __init__(self, path: str, problem: str, *, conflict: bool = False) -> None:
        super().__init__(f"{path}: {problem}" if path else problem)
        self.path = path
        self.problem = problem
        self.conflict = conflict


def shown(value: object) -> str:
    """A value in a message: JSON's spelling, cut where it is long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value) if isinstance(value, str) else str(value) if _is_short(value) else "a huge number"
    return text if len(text) <= 60 else text[:56] + "...'"


def _is_short(value: object) -> bool:
    return not isinstance(value, int) or value.bit_length() < 200


def size_text(size: int) -> str:
    """Bytes as option strings write them: 512M, 2G, 100."""
    for unit, shift in reversed(_UNITS.items()):
        if size and not size & ((1 << shift) - 1):
            return f"{size >> shift}{unit}"
    return str(size)


class Kind:
    """What a value may be. `check` takes JSON, `parse` the text of an option; both give the value as JSON has it."""

    __slots__ = ()
    placeholder = "VALUE"

    def check(self, value: object, path: str, text: bool) -> object:
        """The value as the configuration holds it. ConfigError when it is none of this kind."""
        raise NotImplementedError

    def parse(self, text: str, path: str) -> object:
        """The JSON value that an option's text stands for; its limits are `check`'s business."""
        raise NotImplementedError

    def schema(self) -> Document:
        """The kind as an OpenAPI 3.0 schema."""
        raise NotImplementedError


class Flag(Kind):
    """true or false; on, off, true, false in options."""

    __slots__ = ()
    placeholder = "on|off"

    def check(self, value: object, path: str, text: bool) -> object:
        """A bool."""
        if isinstance(value, bool):
            return value
        raise ConfigError(path, f"{shown(value)} is neither true nor false")

    def parse(self, text: str, path: str) -> object:
        """on, true, off or false, in any case of letters."""
        word = text.lower()
        if word not in ("on", "true", "off", "false"):
            raise ConfigError(path, f"{shown(text)} is neither on nor off")
        return word in ("on", "true")

    def schema(self) -> Document:
        """Boolean."""
        return {"type": "boolean"}


class Integer(Kind):
    """A whole number within limits; ``power_of_two`` where only those go."""

    __slots__ = ("maximum", "minimum", "power_of_two")
    placeholder = "N"

    def __init__(self, minimum: int, maximum: int, *, power_of_two: bool = False) -> None:
        self.minimum = minimum
        self.maximum = maximum
        self.power_of_two = power_of_two

    def check(self, value: object, path: str, text: bool) -> object:
        """An int within the limits."""
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(path, f"{shown(value)} is not a whole number")
        if not self.minimum <= value <= self.maximum:
            raise ConfigError(path, f"{shown(value)} is out of range; {self._range()}")
        if self.power_of_two and value & (value - 1):
            raise ConfigError(path, f"{value} is not a power of two; {self._range()}")
        return value

    def parse(self, text: str, path: str) -> object:
        """Decimal digits."""
        number = _digits(text)
        if number is None:
            raise ConfigError(path, f"{shown(text)} is not a whole number; {self._range()}")
        return number

    def schema(self) -> Document:
        """Integer with limits; powers of two as the list of them."""
        schema: Document = {"type": "integer", "format": "int64"}
        if self.power_of_two:
            return schema | {
                "enum": [1 << bit for bit in range(64) if self.minimum <= 1 << bit <= self.maximum]
            }
        return schema | {"minimum": self.minimum, "maximum": self.maximum}

    def _range(self) -> str:
        if self.minimum == self.maximum:
            return f"only {self.minimum} is supported"
        return f"write {self.minimum} to {self.maximum}"


class Size(Kind):
    """A number of bytes within limits, a multiple of ``multiple``; 512M or 2G in options."""

    __slots__ = ("maximum", "minimum", "multiple")
    placeholder = "SIZE"

    def __init__(self, minimum: int, maximum: int, multiple: int = 1) -> None:
        self.minimum = minimum
        self.maximum = maximum
        self.multiple = multiple

    def check(self, value: object, path: str, text: bool) -> object:
        """An int within the limits."""
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(path, f"{shown(value)} is not a number of bytes")
        if not self.minimum <= value <= self.maximum:
            size = size_text(value) if _is_short(value) else "the number"
            raise ConfigError(
                path,
                f"{size} is out of range; write {size_text(self.minimum)} to {size_text(self.maximum)}",
            )
        if value % self.multiple:
            raise ConfigError(path, f"{value} is not a multiple of {size_text(self.multiple)}")
        return value

    def parse(self, text: str, path: str) -> object:
        """Digits and K, M, G or T (powers of 1024); no unit: bytes."""
        word = text.upper().removesuffix("IB")
        shift = _UNITS.get(word[-1:], 0)
        number = _digits(word[:-1] if shift else word)
        if number is None or (word != text.upper() and not shift):
            raise ConfigError(path, f"{shown(text)} is not a size; write for example 512M or 2G")
        return number << shift

    def schema(self) -> Document:
        """Integer with limits."""
        schema: Document = {
            "type": "integer",
            "format": "int64",
            "minimum": self.minimum,
            "maximum": self.maximum,
        }
        if self.multiple > 1:
            schema["multipleOf"] = self.multiple
        return schema


class Text(Kind):
    """A string of ``minimum`` to ``maximum`` bytes in UTF-8, without NUL and line ends."""

    __slots__ = ("maximum", "minimum", "placeholder")

    def __init__(self, maximum: int, placeholder: str = "STRING", *, minimum: int = 1) -> None:
        self.maximum = maximum
        self.minimum = minimum
        self.placeholder = placeholder

    def check(self, value: object, path: str, text: bool) -> object:
        """A str of the right length."""
        if not isinstance(value, str):
            raise ConfigError(path, f"{shown(value)} is not a string")
        try:
            length = len(value.encode("utf-8", "surrogateescape"))
        except UnicodeEncodeError:
            raise ConfigError(path, f"{shown(value)} is not Unicode text") from None
        if length < self.minimum:
            raise ConfigError(path, "is empty")
        if length > self.maximum:
            raise ConfigError(path, f"has {length} bytes; at most {self.maximum} are possible")
        if "\0" in value or "\n" in value or "\r" in value:
            raise ConfigError(path, "is one line of text; it cannot hold line ends or NUL bytes")
        return value

    def parse(self, text: str, path: str) -> object:
        """The text."""
        return text

    def schema(self) -> Document:
        """String with limits (OpenAPI counts characters; bytes are what the limit is about)."""
        return {
            "type": "string",
            "minLength": self.minimum,
            "maxLength": self.maximum,
            "pattern": "^[^\\x00\\r\\n]*$",
        }


class Path(Text):
    """The path of a file or socket."""

    __slots__ = ()

    def __init__(self, placeholder: str = "FILE") -> None:
        super().__init__(MAX_PATH_BYTES, placeholder)


class Identifier(Text):
    """A device's name: given by the user, or ``_disk0``. Two leading underscores are the VMM's own names."""

    __slots__ = ("own",)

    def __init__(self, own: str = "") -> None:
        super().__init__(64, "NAME")
        self.own = own

    def check(self, value: object, path: str, text: bool) -> object:
        """A str that is no name of the VMM's own, except that of this very device."""
        name = super().check(value, path, text)
        if str(name).startswith("__") and name != self.own:
            raise ConfigError(path, f"{shown(name)} is no name for a device: those with __ are the VMM's own")
        return name

    def schema(self) -> Document:
        """String; the VMM's own names are left out of the pattern."""
        return super().schema() | {
            "pattern": "^(?!__)[^\\x00\\r\\n]*$" if not self.own else f"^(?!__)|^{self.own}$"
        }


class MacAddress(Kind):
    """An Ethernet address of one station: six bytes in hexadecimal, colons between."""

    __slots__ = ()
    placeholder = "MAC"

    def check(self, value: object, path: str, text: bool) -> object:
        """A str that is an address, in small letters; no multicast address."""
        parts = value.split(":") if isinstance(value, str) else []
        if len(parts) != 6 or not all(len(part) == 2 and _is_hexadecimal(part) for part in parts):
            raise ConfigError(
                path, f"{shown(value)} is not a MAC address; write for example 52:54:00:12:34:56"
            )
        if int(parts[0], 16) & 1:
            raise ConfigError(
                path, f"{shown(value)} is a multicast address; the first byte of a station's is even"
            )
        return ":".join(parts).lower()

    def parse(self, text: str, path: str) -> object:
        """The text."""
        return text

    def schema(self) -> Document:
        """String with a pattern."""
        return {"type": "string", "pattern": "^[0-9a-fA-F][02468aceACE](:[0-9a-fA-F]{2}){5}$"}


class Choice(Kind):
    """One of a few words. Options write them in small letters, or as ``spellings`` says."""

    __slots__ = ("placeholder", "spellings")

    def __init__(self, *words: str, spellings: dict[str, str] | None = None) -> None:
        self.spellings = {word: (spellings or {}).get(word, word.lower()) for word in words}
        self.placeholder = "|".join(spelling for spelling in self.spellings.values() if spelling)

    def check(self, value: object, path: str, text: bool) -> object:
        """One of the words, spelled as JSON has it."""
        if isinstance(value, str) and value in self.spellings:
            return value
        words = self.placeholder.replace("|", ", ") if text else ", ".join(self.spellings)
        raise ConfigError(path, f"{shown(value)} is none of {words}")

    def parse(self, text: str, path: str) -> object:
        """A word, in any case of letters."""
        for word, spelling in self.spellings.items():
            if spelling and spelling == text.lower():
                return word
        raise ConfigError(path, f"{shown(text)} is none of {self.placeholder.replace('|', ', ')}")

    def schema(self) -> Document:
        """Enumeration."""
        return {"type": "string", "enum": list(self.spellings)}


class Listed(Kind):
    """A list of values of one kind, at most ``maximum``."""

    __slots__ = ("item", "maximum")

    def __init__(self, item: Kind, maximum: int) -> None:
        self.item = item
        self.maximum = maximum

    def check(self, value: object, path: str, text: bool) -> object:
        """A list, every item checked."""
        if not isinstance(value, list):
            raise ConfigError(path, f"{shown(value)} is not a list")
        if len(value) > self.maximum:
            raise ConfigError(path, f"has {len(value)} items; at most {self.maximum} are possible")
        return [self.item.check(item, f"{path}[{index}]", text) for index, item in enumerate(value)]

    def schema(self) -> Document:
        """Array."""
        return {"type": "array", "items": self.item.schema(), "maxItems": self.maximum}


class Nested(Kind):
    """An object that a table describes."""

    __slots__ = ("table",)

    def __init__(self, table: Table) -> None:
        self.table = table

    def check(self, value: object, path: str, text: bool) -> object:
        """A dict, checked against the table."""
        return self.table.check(value, path, text=text)

    def schema(self) -> Document:
        """A reference to the table's schema."""
        return {"$ref": f"#/components/schemas/{self.table.name}"}


class Unsupported(Kind):
    """Something that Cloud Hypervisor has and Rootvisor has not: only its absence is accepted.

    ``reason`` says what to do without it. An empty list or object counts as absence, because clients send them.
    """

    __slots__ = ("empty", "reason")
    placeholder = ""

    def __init__(self, reason: str, empty: type | None = None) -> None:
        self.reason = reason
        self.empty = empty

    def check(self, value: object, path: str, text: bool) -> object:
        """Nothing but an empty list or object."""
        if self.empty is not None and isinstance(value, self.empty) and not value:
            return value
        raise ConfigError(path, f"is not supported; {self.reason}")

    def parse(self, text: str, path: str) -> object:
        """Always refused."""
        raise ConfigError(path, f"is not supported; {self.reason}")

    def schema(self) -> Document:
        """What is accepted: nothing, or something empty."""
        if self.empty is list:
            return {"type": "array", "items": {}, "maxItems": 0}
        if self.empty is dict:
            return {"type": "object", "maxProperties": 0}
        return {"enum": [None]}


class Field:
    """One field of a table.

    ``text``: its name in option strings when that is another one, None when options do not have it. ``default``: the
    value when it is not given; None: the field is absent then, and null is as good as not given. ``only``: the values
    of its kind that are accepted, and ``reason`` why no others. ``inert``: clients of Cloud Hypervisor send it, any
    value is accepted, nothing depends on it.
    """

    __slots__ = ("default", "description", "inert", "kind", "name", "only", "reason", "required", "text")

    def __init__(
        self,
        name: str,
        kind: Kind,
        description: str = "",
        *,
        default: object = None,
        required: bool = False,
        text: str | None = "",
        only: tuple[object, ...] = (),
        reason: str = "",
        inert: bool = False,
    ) -> None:
        self.name = name
        self.kind = kind
        self.description = description
        self.default = default
        self.required = required
        self.text = name if text == "" else text
        self.only = only
        self.reason = reason
        self.inert = inert

    @property
    def is_offered(self) -> bool:
        """Whether the field does something, so that help should name it."""
        has_choice = not self.reason or len(self.only) > 1
        return has_choice and not self.inert and not isinstance(self.kind, Unsupported)

    @property
    def placeholder(self) -> str:
        """What stands for the value in help."""
        if self.only and isinstance(self.kind, Choice):
            return "|".join(spelling for word in self.only if (spelling := self.kind.spellings[str(word)]))
        return self.kind.placeholder

    def check(self, value: object, path: str, text: bool) -> object:
        """The checked value. ConfigError."""
        result = self.kind.check(value, path, text)
        if self.reason and not any(result == value and type(result) is type(value) for value in self.only):
            raise ConfigError(path, f"{self._in_words(result, text)} is not supported; {self.reason}")
        return result

    def _in_words(self, value: object, text: bool) -> str:
        if text and isinstance(value, bool):
            return "on" if value else "off"
        if text and isinstance(self.kind, Choice):
            return self.kind.spellings[str(value)]
        return shown(value)

    def schema(self) -> Document:
        """The field as an OpenAPI 3.0 schema, with default and description."""
        schema = self.kind.schema()
        if self.reason:
            schema = {"type": schema.get("type", "string"), "enum": list(self.only)}
        if "$ref" in schema:
            return (
                schema if self.default is not None or self.required else {"nullable": True, "allOf": [schema]}
            )
        if self.default is not None:
            schema["default"] = self.default
        elif not self.required:
            schema["nullable"] = True
            if None not in schema.get("enum", [None]):
                schema["enum"] = [*schema["enum"], None]
        schema["description"] = self.explanation()
        return schema

    def explanation(self) -> str:
        """What the field is for, or why nothing is to be had by it."""
        if self.inert:
            return f"No effect: {self.description}" if self.description else "No effect."
        return self.description or f"Not supported: {self.refusal}."

    @property
    def refusal(self) -> str:
        """Why some value or every value is refused."""
        return self.reason or getattr(self.kind, "reason", "")


class Table:
    """A named list of fields; ``check_together`` holds them against each other.

    ``shorthand``: the field that an option's first word without ``=`` is. ``absent_text``: names that option strings of
    Cloud Hypervisor have for things that are not supported, and why.
    """

    __slots__ = (
        "absent_text",
        "by_name",
        "by_text",
        "check_together",
        "description",
        "fields",
        "name",
        "shorthand",
    )

    def __init__(
        self,
        name: str,
        description: str,
        fields: tuple[Field, ...],
        check_together: Check | None = None,
        *,
        shorthand: str = "",
        absent_text: dict[str, str] | None = None,
    ) -> None:
        self.name = name
        self.description = description
        self.fields = fields
        self.check_together = check_together
        self.shorthand = shorthand
        self.absent_text = absent_text or {}
        self.by_name = {field.name: field for field in fields}
        self.by_text = {field.text: field for field in fields if field.text is not None}

    def check(self, document: object, path: str = "", *, text: bool = False) -> Document:
        """The document with every value checked and every default filled in, as a new dict.

        ``path`` is where the document stands in a larger one; with ``text`` fields are named as in option strings.
        ConfigError names the first field that is wrong.
        """
        if not isinstance(document, dict):
            raise ConfigError(path, f"{shown(document)} is not an object")
        for name in document:
            if name not in self.by_name:
                raise ConfigError(_joined(path, str(name)[:60]), f"there is no such field in {self.name}")

        def name_of(name: str) -> str:
            field = self.by_name[name]
            return _joined(path, field.text or name, " ") if text else _joined(path, name)

        checked: Document = {}
        for field in self.fields:
            value = document.get(field.name)
            if value is None and (field.default is None or field.name not in document):
                if field.required:
                    raise ConfigError(name_of(field.name), "is missing")
                if field.default is None:
                    continue
                value = field.default
            checked[field.name] = field.check(value, name_of(field.name), text)
        if self.check_together is not None:
            self.check_together(checked, name_of)
        return checked

    def schema(self) -> Document:
        """The table as an OpenAPI 3.0 schema."""
        schema: Document = {"type": "object", "description": self.description, "additionalProperties": False}
        required = [field.name for field in self.fields if field.required]
        if required:
            schema["required"] = required
        schema["properties"] = {field.name: field.schema() for field in self.fields}
        return schema

    def syntax(self) -> str:
        """The option string with everything that can be in it: ``path=FILE,readonly=on|off``."""
        return ",".join(
            f"{text}={field.placeholder}" for text, field in self.by_text.items() if field.is_offered
        )


def _joined(path: str, name: str, separator: str = ".") -> str:
    return f"{path}{separator}{name}" if path else name


def _digits(text: str) -> int | None:
    """A decimal number of sensible length; None: something else."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 20 else None


def _is_hexadecimal(text: str) -> bool:
    return all(letter in "0123456789abcdefABCDEF" for letter in text)
