"""Reads a YAML recipe with `key=value` overrides into a checked RunConfig. Each mistake is one line.

What a spelling means (`1e-3`, `off`, 2024-05-01) is decided in yaml_text.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from dmae_ds.config.own_code import look_in
from dmae_ds.config.own_file import with_numbers_of_own_file
from dmae_ds.config.run import RunConfig
from dmae_ds.config.saved import with_paths_from_here
from dmae_ds.config.shipped import find_file
from dmae_ds.config.yaml_text import OverrideText, Plain, read_yaml, settle
from dmae_ds.errors import UserError
from dmae_ds.output.local_path import refuse_url

# Keys that may hold a URL. Every other key with one is refused, but for the options of an own objective.
TAKES_URL = re.compile(
    r"data\.train|data\.val|teachers?(\.\w+)?\.(license|cache)|(students\.\w+\.)?objective\..*"
)
IS_EVALUATION = re.compile("^weights:", re.MULTILINE)  # of saved configs, those of evaluations alone have it

Schema = TypeVar("Schema", bound=BaseModel)


def load_config(
    recipe: str,
    overrides: list[str] = (),
    *,
    schema: type[Schema] = RunConfig,
    kind: str = "recipe",
    below: dict | None = None,
    context: dict | None = None,
) -> Schema:
    """Read a recipe (path or shipped name) and apply overrides such as `objective.mask_ratio=0.9`.

    schema: the root schema; kind: of its shipped recipes (shipped.py)
    below: values that are used where the recipe gives none
    context: of pydantic's validators; None: the recipe's own folder may be imported from
    Raises UserError with one line for every key that is unknown, missing or out of range.
    """
    path = find_file(kind, recipe)
    if context is None:
        look_in(path.parent)
    try:
        values = read_yaml(path.read_text(encoding="utf-8"), where=str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not readable as YAML: {error}; save it as UTF-8") from None
    if not isinstance(values, dict):
        found = type(values.value if isinstance(values, Plain) else values).__name__
        raise UserError(f"{path}: found {found}, expected sections such as `student:`")
    return build_config(_lay_over(below or {}, values), overrides, schema=schema, context=context)


def build_config(
    values: dict, overrides: list[str], *, schema: type[Schema], context: dict | None = None
) -> Schema:
    """Apply overrides to the values of a recipe and check the result, as `load_config` does."""
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise UserError(
                f"'{override}' is not an override; write key=value, for example objective.mask_ratio=0.9"
            )
        _set(values, key, OverrideText(key, text))
    try:
        config = schema.model_validate(settle(values, [schema]), context=context)
    except ValidationError as error:
        raise UserError("\n".join(_explain(item, schema, values) for item in error.errors())) from None
    check_places(config)
    return with_numbers_of_own_file(config) if isinstance(config, RunConfig) else config


def override_words(overrides: Mapping[str, object] | Iterable[str]) -> list[str]:
    """Overrides as they are typed, `key=value`, from such words or from {key: value}."""
    if not isinstance(overrides, Mapping):
        return list(overrides)
    return [
        f"{key}={value if isinstance(value, str | Path) else json.dumps(value)}"
        for key, value in overrides.items()
    ]


def check_places(config: BaseModel) -> None:
    """Raise UserError where a key holds a URL and means a file or folder of this machine."""
    for key, value in flatten(config.model_dump(mode="json")).items():
        if not isinstance(value, str) or TAKES_URL.fullmatch(key):
            continue
        instead = "copy it here, and give its path"
        if key == "run.dir":
            instead = (
                "checkpoints are renamed, locked and synced, which a bucket can't do: give a folder on a "
                "disk that outlives the job, and copy it meanwhile with a command such as "
                f"`aws s3 sync FOLDER {value}`"
            )
        elif key == "data.cache_dir":
            instead = "give a folder on a local disk"
        problem = refuse_url(key, value, instead=instead)
        if problem is not None:
            raise UserError(problem)


def _lay_over(below: dict, above: dict) -> dict:
    """Merge two nested mappings; where both have a value, take that of `above`."""
    both = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            both[key] = _lay_over(below[key], above[key])
    return both


def dump_config(config: BaseModel) -> str:
    """Write a config as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _set(values: dict, dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        child = values.get(parent)
        if isinstance(child, OverrideText):  # objective={name: mae} objective.mask_ratio=.9
            child = values[parent] = child.as_yaml()
        if isinstance(child, Plain):
            child = child.value
        if child is None:
            child = values[parent] = {}
        if not isinstance(child, dict):
            raise UserError(f"override {dotted}: '{parent}' is {child!r}, not a section")
        values = child
    values[last] = value


def _explain(item: dict, schema: type[BaseModel], values: dict) -> str:
    # A discriminated union puts the chosen name into the location: objective.dmae.head -> objective.head.
    location = [str(part) for part in item["loc"]]
    # Likewise that of one of several students: students.small.objective.dmae.head.
    start = 2 if location[:1] == ["students"] else 0
    if len(location) > start + 1 and location[start] in ("objective", "head"):
        del location[start + 1]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        known = _known_keys(item["loc"][:-1], schema)
        near = get_close_matches(location[-1], known, n=1, cutoff=0.5)
        prefix = ".".join(location[:-1])
        hint = (
            f"did you mean {'.'.join(filter(None, [prefix, near[0]]))}?"
            if near
            else f"known here: {', '.join(known)}"
        )
        return f"{key} is unknown; {hint}"
    if item["type"] == "missing":
        return f"{key} is missing; set it in the recipe or as {key}=...{_other_names(location, values)}"
    if item["type"] in ("union_tag_not_found", "union_tag_invalid"):
        if "tag" not in item["ctx"]:
            return f"{key}.name is missing; set it in the recipe or as {key}.name=..."
        return f"{key}.name {item['ctx']['tag']!r}: choose {item['ctx']['expected_tags']}"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{key}: {message}" if key else message  # without a key, the message names the keys itself
    return f"{key}: found {item['input']!r}; {message[0].lower()}{message[1:]}"


def _other_names(location: list[str], values: dict) -> str:
    """What a message about a network without `name` adds: the names of the recipe's other networks."""
    section, *rest = location
    if section not in ("students", "teachers") or len(rest) != 2:
        return ""
    others = [name for name in values[section] if name != rest[0]]
    return f", or write one of {', '.join(others)} for {rest[0]}" if others else ""


def _known_keys(location: tuple, schema: type[BaseModel]) -> list[str]:
    """Names of the fields of the section at a location, from the schema's annotations."""
    models: list[type[BaseModel]] = [schema]
    for part in location:
        children = [
            child
            for model in models
            if part in model.model_fields
            for child in models_in(model.model_fields[part].annotation)
        ]
        # Part of a location may be the tag of a discriminated union or the name of a teacher, no fields.
        tagged = [
            model for model in models if part in get_args(model.model_fields.get("name", _NoField).annotation)
        ]
        models = children or tagged or models
    return sorted({field for model in models for field in model.model_fields})


class _NoField:
    annotation = None


def models_in(annotation: Any) -> list[type[BaseModel]]:
    """Schemas of sections in an annotation; [] for a single value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in models_in(argument)]


def read_saved_config(run_dir: Path, *, student_only: bool = False) -> RunConfig:
    """Read the config of a run folder, its paths as found from here. Raises UserError where there is none.

    student_only: the code of an own objective need not be here; its section is read as it is
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise UserError(
            f"'{run_dir}' is not a run folder: it has no config.yaml; name a folder that `dmae-ds train` "
            "wrote"
        )
    if IS_EVALUATION.search(path.read_text(encoding="utf-8", errors="replace")):
        raise UserError(
            f"'{run_dir}' is the folder of an evaluation; name the run folder that `dmae-ds train` wrote, or "
            f"'{run_dir / 'best.safetensors'}'"
        )
    config = load_config(str(path), context={"student_only": student_only})
    if config.students is not None:
        folders = ", ".join(str(run_dir / name) for name in config.students)
        raise UserError(f"'{run_dir}' is the folder of a family; name that of one student: {folders}")
    return with_paths_from_here(config, run_dir)


def student_folders(run_dir: Path) -> list[Path]:
    """The run folders of a run's students: its own, or of a family one for each.

    Raises UserError for a config that cannot be read.
    """
    path = run_dir / "config.yaml"
    if not path.is_file():
        return [run_dir]
    students = load_config(str(path), context={"student_only": True}).students
    return [run_dir] if students is None else [run_dir / name for name in students]


def family_of(run_dir: Path) -> Path | None:
    """The folder of the family in which a run folder is that of one student; None for every other folder."""
    run_dir = run_dir.expanduser().resolve()
    is_run = (run_dir / "config.yaml").is_file()
    return run_dir.parent if is_run and run_dir.name in _saved_students(run_dir.parent) else None


def _saved_students(run_dir: Path) -> dict:
    """The section `students` of a run folder, as it was written; {} where there is none."""
    try:
        values = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
        return dict(values.get("students") or {})
    except (OSError, AttributeError, TypeError, ValueError, yaml.YAMLError):
        return {}


def flatten(values: dict, prefix: str = "") -> dict[str, object]:
    """Flatten nested dicts, {"optim": {"base_lr": 1}} to {"optim.base_lr": 1}; lists stay as they are."""
    flat: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
