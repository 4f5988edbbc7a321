"""Lists what can be trained and what can be set: the shipped recipes, and every key with its comment.

A key's comment is the one that stands next to its field in the schemas (behind it, or in the lines above),
so that there is one text for who reads the code and who reads `dmae-ds recipes --all`.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import tokenize
from functools import cache
from types import ModuleType
from typing import Any, Iterator, Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from dmae_ds.config.detection import DetectConfig
from dmae_ds.config.evaluation import FinetuneConfig, LinearConfig
from dmae_ds.config.load import models_in
from dmae_ds.config.objectives import ObjectiveSection
from dmae_ds.config.run import RunConfig
from dmae_ds.config.segmentation import SegmentConfig
from dmae_ds.config.shipped import shipped_objectives
from dmae_ds.errors import UserError

# {what a group of keys is for: its root schema}
ROOTS = {
    "dmae-ds train": RunConfig,
    "dmae-ds eval finetune": FinetuneConfig,
    "dmae-ds eval linear": LinearConfig,
    "dmae-ds eval segment": SegmentConfig,
    "dmae-ds eval detect": DetectConfig,
}
# Sections that a root shares with this one are listed there; with RunConfig where none is named.
LISTED_IN = {RunConfig: None, DetectConfig: SegmentConfig}


class Key(NamedTuple):
    """A key of a recipe: its default as YAML (None: it must be given), its choices, and its comment."""

    name: str
    default: str | None
    choices: tuple[str, ...]
    comment: str

    def __str__(self) -> str:
        value = "(required)" if self.default is None else self.default
        choices = f"one of {', '.join(map(str, self.choices))}" if self.choices else ""
        return f"{self.name} = {value}  # {'; '.join(filter(None, [choices, self.comment]))}"


def all_keys(word: str | None = None) -> str:
    """Every key of every recipe, a line each under the heading of its section.

    word: only the lines that contain it, in any case
    Raises UserError where no line does.
    """
    lines: list[str] = []
    for command, root in ROOTS.items():
        for heading, keys in _sections(root, LISTED_IN.get(root, RunConfig)):
            found = [str(key) for key in keys if word is None or word.lower() in str(key).lower()]
            if found:
                lines += ["", f"# {command}{heading}", *found]
    if not lines:
        raise UserError(
            f"no key, default or comment of a recipe contains '{word}'; list them with --all alone"
        )
    return "\n".join(lines[1:])


def _sections(root: type[BaseModel], known: type[BaseModel] | None) -> Iterator[tuple[str, list[Key]]]:
    """Yield (heading, keys) of a root schema: its single keys, its sections, and each objective.

    known: another root schema, whose sections are left out where they are the same or have further keys
    """
    single = [name for name, field in root.model_fields.items() if not models_in(field.annotation)]
    yield "", [_key(root, name, name) for name in single]
    for name, field in root.model_fields.items():
        schemas = models_in(field.annotation)
        listed = known is not None and name in known.model_fields
        if listed and _has_keys_of(models_in(known.model_fields[name].annotation), schemas):
            continue
        if len(schemas) > 1:
            choices = (
                shipped_objectives() if name == "objective" else {_choice(each): each for each in schemas}
            )
            for choice, schema in choices.items():
                yield f", {name}.name={choice}: {_first_line(schema)}", list(keys_of(schema, f"{name}."))
        elif schemas:
            names = dict in map(get_origin, (field.annotation, *get_args(field.annotation)))
            if names:  # sections by name, of which only the keys are listed that one section has not
                own = [key for key in inspect.get_annotations(schemas[0]) if key in schemas[0].model_fields]
                keys = [_key(schemas[0], key, f"{name}.NAME.{key}") for key in own]
                yield f", {name}.NAME: {_first_line(schemas[0])} (may be left out)", keys
                continue
            optional = (
                "" if type(None) not in get_args(field.annotation) else " (the section may be left out)"
            )
            yield f", {name}: {_first_line(schemas[0])}{optional}", list(keys_of(schemas[0], f"{name}."))


def _has_keys_of(listed: list[type[BaseModel]], schemas: list[type[BaseModel]]) -> bool:
    """Whether a section of another root has every key of this one, with the same meaning."""
    return len(listed) == len(schemas) and all(map(issubclass, listed, schemas))


def keys_of(schema: type[BaseModel], prefix: str = "") -> Iterator[Key]:
    """Yield every key of a schema and of the sections in it."""
    for name, field in schema.model_fields.items():
        if name == "name" and issubclass(schema, ObjectiveSection):
            continue  # it chooses the schema
        inner = models_in(field.annotation)
        if inner:
            if type(None) in get_args(field.annotation):
                yield Key(f"{prefix}{name}", "null", (), _first_line(inner[0]))
            yield from keys_of(inner[0], f"{prefix}{name}.")
        else:
            yield _key(schema, name, f"{prefix}{name}")


def _key(schema: type[BaseModel], name: str, full_name: str) -> Key:
    field = schema.model_fields[name]
    return Key(full_name, _default(field), _choices(field.annotation), comment_of(schema, name))


def _default(field: FieldInfo) -> str | None:
    if field.is_required():
        return None
    value = field.get_default(call_default_factory=True)
    return value if isinstance(value, str) else json.dumps(value)


def _choices(annotation: Any) -> tuple[str, ...]:
    """Words that a key may have; () where it is no choice of words."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(word for argument in get_args(annotation) for word in _choices(argument))


def comment_of(schema: type[BaseModel], name: str) -> str:
    """The comment at a field, in its schema or in the nearest base class that has one; otherwise ""."""
    for cls in schema.__mro__:
        if name in inspect.get_annotations(cls):
            comment = _comments(inspect.getmodule(cls)).get((cls.__name__, name))
            if comment:
                return comment
    return ""


@cache
def _comments(module: ModuleType) -> dict[tuple[str, str], str]:
    """{(class, field): comment} of a module's source."""
    source = inspect.getsource(module)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    by_line = {token.start[0]: token for token in tokens if token.type == tokenize.COMMENT}
    comments = {}
    for cls in ast.parse(source).body:
        for statement in cls.body if isinstance(cls, ast.ClassDef) else ():
            if not isinstance(statement, ast.AnnAssign):
                continue
            above, line = [], statement.lineno - 1
            while line in by_line and by_line[line].line.lstrip().startswith("#"):
                above.insert(0, by_line[line].string)
                line -= 1
            behind = [
                by_line[n].string for n in range(statement.lineno, statement.end_lineno + 1) if n in by_line
            ]
            text = " ".join(comment.removeprefix("#").strip() for comment in above + behind)
            comments[cls.name, statement.target.id] = text
    return comments


def _choice(schema: type[BaseModel]) -> str:
    """The name by which a section of several kinds is chosen."""
    return get_args(schema.model_fields["name"].annotation)[0]


def _first_line(schema: type[BaseModel]) -> str:
    return schema.__doc__.splitlines()[0]
