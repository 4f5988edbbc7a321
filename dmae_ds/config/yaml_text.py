"""Reads YAML so that the schema decides what is a string: `off`, `007` and 2024-05-01 can be folder names.

YAML guesses types from spellings. Here a plain scalar keeps its text next to YAML's value (`Plain`), an
override on the command line is text (`OverrideText`), and `settle` chooses once the whole recipe is known:
where the schema wants a string, the text counts as it stands; elsewhere YAML's value does.
Both `1e-3` and `1.0e-3` are numbers (in YAML 1.1 the first is a string). A key that is given twice is an
error.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from dmae_ds.config.objectives import find_own
from dmae_ds.errors import UserError

NULLS = ("", "null", "Null", "NULL")


@dataclass(frozen=True)
class Plain:
    """A scalar without quotes that YAML takes for a number, a date, true, false or null."""

    value: Any
    text: str


@dataclass(frozen=True)
class OverrideText:
    """What stands behind `key=` on the command line."""

    key: str
    text: str

    def as_yaml(self) -> Any:
        """Read the text as YAML. Raises UserError where it is none."""
        return read_yaml(self.text, where=f"override {self.key}")

    def as_string(self) -> str | None:
        """The text without white space around it and without quotes around the whole; None for null."""
        text = self.text.strip()
        if text in NULLS:
            return None
        if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
            try:
                quoted = yaml.load(text, Loader=yaml.BaseLoader)
            except yaml.YAMLError:
                return text
            return quoted if isinstance(quoted, str) else text
        return text


class _Loader(yaml.SafeLoader):
    """SafeLoader that keeps the text of plain scalars, and refuses keys that are given twice."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _mapping_without_duplicates(loader: _Loader, node: yaml.MappingNode) -> dict:
    keys = [_value_of(loader.construct_object(key, deep=True)) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(
                None, None, f"key '{key}' is given twice", node.start_mark
            )
    mapping = loader.construct_mapping(node, deep=True)
    return {_value_of(key): value for key, value in mapping.items()}


def _value_of(scalar: Any) -> Any:
    return scalar.value if isinstance(scalar, Plain) else scalar


def _keeping_its_text(construct):
    def construct_plain(loader: _Loader, node: yaml.ScalarNode) -> Any:
        try:
            value = construct(loader, node)
        except ValueError:  # looks like a date or a number and is none: 2024-13-45
            return node.value
        return Plain(value, node.value) if node.style is None else value

    return construct_plain


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)
for _tag in ("null", "bool", "int", "float", "timestamp"):
    _tag = f"tag:yaml.org,2002:{_tag}"
    _Loader.add_constructor(_tag, _keeping_its_text(yaml.SafeLoader.yaml_constructors[_tag]))


def read_yaml(text: str, *, where: str) -> Any:
    """Read YAML, with scalars as `Plain`; `where` begins the message. Raises UserError."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(
            f"{where}{line}: not readable as YAML: {getattr(error, 'problem', None) or error}"
        ) from None


def settle(value: Any, annotations: list) -> Any:
    """Replace every `Plain` and `OverrideText` by what the schema wants: its text, or YAML's value.

    annotations: types that the schema allows here; several where a section has several schemas
    Raises UserError for an override that is neither a string nor YAML.
    """
    annotations = _flat(annotations)
    if isinstance(value, OverrideText):
        if _wants_string(annotations):
            return value.as_string()
        value = value.as_yaml()
    if isinstance(value, Plain):
        return value.text if _wants_string(annotations) and value.value is not None else value.value
    if isinstance(value, list):
        inside = [
            item for kind in annotations if get_origin(kind) in (list, tuple) for item in get_args(kind)
        ]
        return [settle(item, inside) for item in value]
    if isinstance(value, dict):
        schemas = _schemas(annotations, value)
        by_name = [get_args(kind)[1] for kind in annotations if get_origin(kind) is dict]
        return {
            key: settle(
                item, [*by_name, *(s.model_fields[key].annotation for s in schemas if key in s.model_fields)]
            )
            for key, item in value.items()
        }
    return value


def _flat(annotations: list) -> list:
    """The types of nested unions and `Annotated`, without None."""
    flat = []
    for kind in annotations:
        if get_origin(kind) is Annotated:
            flat += _flat([get_args(kind)[0]])
        elif get_origin(kind) in (Union, UnionType):
            flat += _flat(list(get_args(kind)))
        elif kind not in (None, type(None), ...):
            flat.append(kind)
    return flat


def _wants_string(annotations: list) -> bool:
    """Whether strings, and nothing else but null, are allowed."""
    return bool(annotations) and all(
        kind is str or (get_origin(kind) is Literal and all(isinstance(word, str) for word in get_args(kind)))
        for kind in annotations
    )


def _schemas(annotations: list, section: dict) -> list[type[BaseModel]]:
    """Schemas of a section; where several are allowed, the one whose `name` the section has."""
    schemas = [kind for kind in annotations if isinstance(kind, type) and issubclass(kind, BaseModel)]
    if len(schemas) < 2 or not all("name" in schema.model_fields for schema in schemas):
        return schemas
    name = section.get("name")
    name = name.as_string() if isinstance(name, OverrideText) else name
    try:
        own = find_own(name) if isinstance(name, str) else None
    except ValueError:
        own = None  # validation says what is wrong with it
    if own is not None:
        return [own.Config] if hasattr(own, "Config") else []
    named = [s for s in schemas if name in get_args(s.model_fields["name"].annotation)]
    return named or schemas
