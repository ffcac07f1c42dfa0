"""A checker for the part of JSON Schema that docs/report.schema.json uses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "number": (int, float),
    "integer": (int,),
    "boolean": (bool,),
    "null": (type(None),),
}
_KNOWN = {
    "$schema", "$ref", "$defs", "title", "description", "type", "enum", "const", "properties", "required",
    "additionalProperties", "items", "minItems", "maxItems", "anyOf", "oneOf",
}  # fmt: skip


def problems(value: Any, schema: dict[str, Any], root: dict[str, Any], where: str = "") -> Iterator[str]:
    """Says where a value does not fit a schema. Fails for a keyword that it does not know."""
    assert schema.keys() <= _KNOWN, schema.keys() - _KNOWN
    if "$ref" in schema:
        yield from problems(value, root["$defs"][schema["$ref"].removeprefix("#/$defs/")], root, where)
    kinds = schema.get("type", list(_TYPES))
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not any(isinstance(value, _TYPES[kind]) and (kind == "boolean" or type(value) is not bool) for kind in kinds):
        yield f"{where}: {value!r} is not of {kinds}"
        return
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        yield f"{where}: {value!r} is not among {schema.get('enum', schema.get('const'))}"
    for several, number in (("anyOf", range(1, 99)), ("oneOf", range(1, 2))):
        fits = [list(problems(value, each, root, where)) for each in schema.get(several, ())]
        if fits and sum(not each for each in fits) not in number:
            yield f"{where}: fits {[each[:3] for each in fits]}"
    if isinstance(value, dict):
        known, more = schema.get("properties", {}), schema.get("additionalProperties", True)
        yield from (f"{where}: lacks {key}" for key in schema.get("required", ()) if key not in value)
        for key, each in value.items():
            if key in known:
                yield from problems(each, known[key], root, f"{where}/{key}")
            elif more is False:
                yield f"{where}: has {key}"
            elif isinstance(more, dict):
                yield from problems(each, more, root, f"{where}/{key}")
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            yield f"{where}: has {len(value)} items"
        for place, each in enumerate(value if "items" in schema else ()):
            yield from problems(each, schema["items"], root, f"{where}/{place}")
