# SPDX-License-Identifier: Apache-2.0
"""Documents held against the schemas of an OpenAPI 3.0 document, and documents made from them: what the API's own
description says, read by other eyes than those of the server.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]


class Schemas:
    def __init__(self, document: Schema) -> None:
        self._document = document

    def resolve(self, schema: Schema) -> Schema:
        while "$ref" in schema or "allOf" in schema:
            if "allOf" in schema:
                (schema,) = schema["allOf"]
                continue
            target: Any = self._document
            for part in schema["$ref"].removeprefix("#/").split("/"):
                target = target[part]
            schema = target
        return schema

    def faults(self, value: object, schema: Schema, path: str = "") -> Iterator[str]:
        """Every place where a value is not what the schema says."""
        if value is None:
            if not schema.get("nullable") and None not in schema.get("enum", ()):
                yield f"{path}: null"
            return
        schema = self.resolve(schema)
        kind = schema.get("type")
        if "enum" in schema and not any(value == one and type(value) is type(one) for one in schema["enum"]):
            yield f"{path}: {value!r} is none of {schema['enum']}"
        if kind == "object":
            yield from self._object_faults(value, schema, path)
        elif kind == "array":
            if not isinstance(value, list):
                yield f"{path}: no list"
            else:
                if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 1 << 60):
                    yield f"{path}: {len(value)} items"
                for index, item in enumerate(value):
                    yield from self.faults(item, schema["items"], f"{path}[{index}]")
        elif kind == "string":
            if not isinstance(value, str):
                yield f"{path}: no string"
            elif not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", 1 << 60):
                yield f"{path}: {len(value)} characters"
            elif not re.search(schema.get("pattern", ""), value):
                yield f"{path}: pattern"
        elif kind == "integer":
            if not isinstance(value, int) or isinstance(value, bool):
                yield f"{path}: no integer"
            elif not schema.get("minimum", value) <= value <= schema.get("maximum", value):
                yield f"{path}: {value} out of range"
            elif value % schema.get("multipleOf", 1):
                yield f"{path}: {value} is no multiple"
        elif kind == "boolean" and not isinstance(value, bool):
            yield f"{path}: no boolean"

    def _object_faults(self, value: object, schema: Schema, path: str) -> Iterator[str]:
        if not isinstance(value, dict):
            yield f"{path}: no object"
            return
        for name in schema.get("required", ()):
            if name not in value:
                yield f"{path}.{name}: missing"
        if len(value) > schema.get("maxProperties", 1 << 60):
            yield f"{path}: {len(value)} properties"
        known = schema.get("properties", {})
        for name, member in value.items():
            if name in known:
                yield from self.faults(member, known[name], f"{path}.{name}")
            elif schema.get("additionalProperties") is False:
                yield f"{path}.{name}: unknown"
            elif isinstance(schema.get("additionalProperties"), dict):
                yield from self.faults(member, schema["additionalProperties"], f"{path}.{name}")

    def example(self, schema: Schema, chance: random.Random) -> Any:
        """A value that the schema allows. Strings have no slash: they may become paths."""
        if schema.get("nullable") and chance.random() < 0.2:
            return None
        schema = self.resolve(schema)
        if "enum" in schema:
            return chance.choice(schema["enum"])
        match schema.get("type"):
            case "object":
                required = schema.get("required", ())
                density = chance.choice([0.05, 0.4])
                return {
                    name: self.example(member, chance)
                    for name, member in schema.get("properties", {}).items()
                    if name in required or chance.random() < density
                }
            case "array":
                count = chance.randrange(min(schema.get("maxItems", 3), 3) + 1)
                return [self.example(schema["items"], chance) for _ in range(count)]
            case "string":
                if schema.get("pattern", "").startswith("^[0-9a-fA-F]"):
                    return f"52:54:00:{chance.randbytes(3).hex(':')}"
                length = chance.choice(
                    [max(schema.get("minLength", 0), 1), min(schema.get("maxLength", 9), 20), 5]
                )
                return "".join(chance.choice("abcXYZ019 .-äß€😀") for _ in range(length))[
                    : schema["maxLength"] // 4
                ]
            case "integer":
                low, high = schema["minimum"], schema["maximum"]
                value = chance.choice([low, low, low, min(low + 1, high), high, chance.randint(low, high)])
                return value - value % schema.get("multipleOf", 1)
            case "boolean":
                return chance.random() < 0.5
        return None

    def spoilt(self, value: Any, chance: random.Random) -> Any:
        """The value with something changed somewhere inside, mostly for the worse."""
        if isinstance(value, dict) and value and chance.random() < 0.8:
            name = chance.choice(list(value))
            changed = dict(value)
            match chance.randrange(5):
                case 0:
                    del changed[name]
                case 1:
                    changed[chance.choice(["zork", "", "Kernel", "id ", "x" * 300, "\0"])] = value[name]
                case _:
                    changed[name] = self.spoilt(value[name], chance)
            return changed
        if isinstance(value, list) and value and chance.random() < 0.8:
            index = chance.randrange(len(value))
            return [self.spoilt(item, chance) if at == index else item for at, item in enumerate(value)]
        return chance.choice(
            [
                None, True, False, 0, -1, 1, 3, 1 << 31, 1 << 63, 1 << 64, -(1 << 63), 10**300, 0.5, 1e300, -0.0,
                "", "x", "\0", "a\nb", "ä" * 5000, "\ud800", "__rng", "off", "Raw", [], [None], [[]], {},
                {"id": "x"}, {"": None},
            ]
        )  # fmt: skip
