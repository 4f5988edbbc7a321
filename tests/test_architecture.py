"""Who may import whom, which files need torch, tables equal their schemas; read from the syntax trees."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest

from dmae_ds.config import detection as detection_schemas
from dmae_ds.config import evaluation as evaluation_schemas
from dmae_ds.config import networks as network_schemas
from dmae_ds.config import objectives as objective_schemas
from dmae_ds.config import segmentation as segmentation_schemas
from dmae_ds.config.objectives import Section

REPOSITORY = Path(__file__).resolve().parents[1]

# From the ground up: a room may import rooms of lower floors, and none of its own floor.
FLOORS = [
    {"errors", "output"},
    {"distributed", "config"},
    {"models", "data"},
    {"weights"},
    {"teacher"},
    {"objectives"},
    {"plan"},
    {"evaluate"},
    {"train"},
    {"finetune"},
    {"dense"},
    {"report", "bench", "tools", "export", "doctor"},
    {"distill"},
    {"cli"},
    {"__main__"},
]
KNOWS_DEEPSPEED = {
    "dmae_ds/train/engine.py",
    "dmae_ds/train/checkpoint/deepspeed_files.py",
    "dmae_ds/train/checkpoint/full_state.py",
    "dmae_ds/train/checkpoint/reshard.py",
    "dmae_ds/tools/checkpoint_convert.py",
    "dmae_ds/bench/pipeline_engine.py",
    "dmae_ds/distributed/deepspeed_import.py",
}
COMMUNICATES = {
    "dmae_ds/distributed/async_flags.py",
    "dmae_ds/distributed/collectives.py",
    "dmae_ds/distributed/process_group.py",
    "dmae_ds/distributed/heartbeat.py",
    "dmae_ds/distributed/own_gpu.py",
    "dmae_ds/distributed/rendezvous.py",
    "dmae_ds/teacher/pipeline.py",
    "dmae_ds/teacher/sharded.py",
    "dmae_ds/train/full_parameters.py",
    "dmae_ds/bench/pipeline_engine.py",
    "dmae_ds/doctor/meeting.py",  # before the ranks are started
}
TORCH_FREE = [
    "dmae_ds/cli",
    "dmae_ds/config",
    "dmae_ds/data/batch_spec.py",
    "dmae_ds/data/corrupt.py",
    "dmae_ds/data/dense_members.py",
    "dmae_ds/data/order.py",
    "dmae_ds/data/pixels.py",
    "dmae_ds/data/reader.py",
    "dmae_ds/data/shard_set.py",
    "dmae_ds/data/storage.py",
    "dmae_ds/data/unindexed.py",
    "dmae_ds/distill/resolve.py",
    "dmae_ds/distill/start.py",
    "dmae_ds/distributed/world.py",
    "dmae_ds/doctor",
    "dmae_ds/errors.py",
    "dmae_ds/evaluate/results.py",
    "dmae_ds/evaluate/source.py",
    "dmae_ds/evaluate/subsets.py",
    "dmae_ds/output",
    "dmae_ds/tools/checkpoint_inspect.py",
    "dmae_ds/train/checkpoint/folder.py",
    "dmae_ds/train/preflight.py",
    "data_prep",
    *sorted(map(str, REPOSITORY.glob("dmae_ds/*/early.py"))),
]
HEAVY = {"torch", "timm", "deepspeed", "accelerate", "webdataset", "torchvision"}

# of dmae_ds/data
TOOL_KNOWS = ("arrays", "dense_members", "shards", "shard_set", "pixels", "reader", "refusals", "storage")
SOURCES = sorted(path for folder in ("dmae_ds", "data_prep") for path in (REPOSITORY / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(REPOSITORY))


def imports_of(path: Path, *, top_level_only: bool = False) -> set[str]:
    """Dotted names of everything a file imports; `from a import b` counts as a.b."""
    names = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if top_level_only and node not in tree.body:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(dotted: str) -> str | None:
    """dmae_ds.train.loop.train -> train; None for the package itself (its version) and for other packages."""
    parts = dotted.split(".")
    if parts[0] != "dmae_ds" or len(parts) < 2 or parts[1].startswith("__version"):
        return None
    return parts[1]


def floor_of(room: str) -> int:
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


@pytest.mark.parametrize("path", [path for path in SOURCES if "dmae_ds" in path.parts], ids=name_of)
def test_imports_point_down(path):
    importing = path.relative_to(REPOSITORY / "dmae_ds").parts[0].removesuffix(".py")
    if importing == "__init__":
        assert not {room_of(name) for name in imports_of(path)} - {None}
        return
    for name in imports_of(path):
        room = room_of(name)
        if room is not None and room != importing:
            assert floor_of(room) < floor_of(importing), f"{name_of(path)} imports {name}"


@pytest.mark.parametrize("path", [path for path in SOURCES if "data_prep" in path.parts], ids=name_of)
def test_the_shard_tool_knows_the_shard_format_alone(path):
    known = (*(f"dmae_ds.data.{name}." for name in TOOL_KNOWS), "dmae_ds.output.")
    if path.name == "bench_reading.py":  # it measures the reader
        known = ("dmae_ds.data.",)
    assert all(name.startswith(known) for name in imports_of(path) if name.startswith("dmae_ds"))


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_few_files_know_deepspeed_and_fewer_communicate(path):
    names = imports_of(path)
    if any(name.split(".")[0] == "deepspeed" for name in names):
        assert name_of(path) in KNOWS_DEEPSPEED or name_of(path).startswith("dmae_ds/teacher/")
    communicates = "torch.distributed" in path.read_text() or any(
        name.startswith("torch.distributed") for name in names
    )
    assert not communicates or name_of(path) in COMMUNICATES


def test_what_a_recipe_is_checked_with_is_imported_without_torch():
    """Imported one after the other in a process of their own, with everything that they import."""
    paths = [REPOSITORY / entry for entry in TORCH_FREE]
    files = [file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])]
    modules = [name_of(file.with_suffix("")).replace("/", ".") for file in files if file.stem != "__main__"]
    assert len(modules) > 50
    program = (
        "import importlib, sys\n"
        "heavy, *modules = sys.argv[1:]\n"
        "for name in modules:\n"
        "    importlib.import_module(name.removesuffix('.__init__'))\n"
        "    imported = set(heavy.split()) & set(sys.modules)\n"
        "    assert not imported, f'{name} imports {imported}'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, " ".join(HEAVY), *modules],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


SCHEMA_NAMES = "adapt data dense detection evaluation features imitation networks objective_base objectives"
SCHEMA_MODULES = [f"dmae_ds.config.{name}" for name in [*SCHEMA_NAMES.split(), "run", "segmentation"]]


def schema_classes() -> set[type[Section]]:
    classes, todo = set(), [Section]
    while todo:
        children = todo.pop().__subclasses__()
        classes |= set(children)
        todo += children
    return {cls for cls in classes if cls.__module__ in SCHEMA_MODULES}


def test_every_config_field_is_read_somewhere():
    read = set()
    for path in SOURCES:
        if "config" not in path.relative_to(REPOSITORY).parts:
            read |= {
                node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)
            }
    overrides = set(network_schemas.ModelConfig.model_fields) - {"name"}  # `overrides` passes all of them on
    assert "overrides" in read
    fields = {field for cls in schema_classes() for field in cls.model_fields}
    assert len(fields) > 30 and not fields - overrides - read


def test_the_tables_are_the_schemas():
    from dmae_ds.config.shipped import shipped_objectives
    from dmae_ds.dense.detector import PYRAMIDS
    from dmae_ds.dense.segmenter import HEADS as HEADS_OF_SEGMENTERS
    from dmae_ds.finetune.network import GLOBAL_POOLS
    from dmae_ds.finetune.tasks import TASKS
    from dmae_ds.objectives import OBJECTIVES
    from dmae_ds.objectives.align import DISTANCES, HEADS
    from dmae_ds.teacher.frozen import DTYPES
    from dmae_ds.weights.formats import FORMATS

    def choices(cls, field):
        return set(get_args(cls.model_fields[field].annotation))

    named = [
        cls
        for cls in schema_classes()
        if issubclass(cls, objective_schemas.ObjectiveSection) and "name" in cls.model_fields
    ]
    names = {name for cls in named for name in choices(cls, "name")}
    assert set(OBJECTIVES) == names == set(shipped_objectives())
    assert set(HEADS) == choices(objective_schemas.DmaeConfig, "head")
    assert set(DISTANCES) == choices(objective_schemas.DmaeConfig, "distance")
    assert set(FORMATS) == set(network_schemas.TEACHER_FORMATS)
    assert set(DTYPES) == choices(network_schemas.TeacherConfig, "dtype")
    assert set(TASKS) == choices(evaluation_schemas.DistillConfig, "method")
    heads = (segmentation_schemas.UperNetConfig, segmentation_schemas.LinearHeadConfig)
    assert set(HEADS_OF_SEGMENTERS) == {name for cls in heads for name in choices(cls, "name")}
    assert set(PYRAMIDS) == choices(detection_schemas.DetectorConfig, "pyramid")
    assert set(GLOBAL_POOLS) == choices(evaluation_schemas.ClassifierConfig, "pool")


# Every room but `objectives` and `config` wires or shows what an objective declares (objectives/base.py).
# Exempt are two files about papers: the rows of published tables name the methods that they are about.
NAME_NO_OBJECTIVE = [
    path
    for path in SOURCES
    if path.parts[-2] not in ("objectives", "config")
    and name_of(path) not in ("dmae_ds/report/published.py", "dmae_ds/report/results_page.py")
]


@pytest.mark.parametrize("path", NAME_NO_OBJECTIVE, ids=name_of)
def test_no_room_names_an_objective(path):
    """No name is in a string, an identifier or an import.

    Plain MAE is exempt: it is a teacher format and the baseline of bench step.
    """
    from dmae_ds.objectives import OBJECTIVES

    # Features, of teachers and students, are in most rooms: imports alone tell that objective from them.
    names = set(OBJECTIVES) - {"mae", "features"}
    in_text = names - {"dmae"} | {"g2sd"}  # as a word of a longer string dmae is this program
    identifiers = {name.replace("_", "") for name in in_text | {"dmae"}}
    tree = ast.parse(path.read_text())
    documentation = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            words = set(re.findall(r"[a-z0-9_]+", node.value.lower()))
            assert node.value not in names and not in_text & words, f"{name_of(path)}: {node.value!r}"
        for field in ("id", "attr", "name", "arg"):
            identifier = getattr(node, field, None)
            if isinstance(identifier, str):
                assert identifier.lower().replace("_", "") not in identifiers, (
                    f"{name_of(path)}: {identifier}"
                )
    files = {objective.__module__ for name, objective in OBJECTIVES.items() if name != "mae"}
    imported = {name.rpartition(".")[0] for name in imports_of(path)} & files
    assert not imported, f"{name_of(path)} imports {imported}"


@pytest.fixture(scope="module")
def shared_by_all_objectives() -> set[str]:
    """Attributes of every objective and of every objective's section of a recipe."""
    import torch

    from dmae_ds.models.vit import build_student
    from dmae_ds.objectives.base import Objective

    network = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 1, "num_heads": 1}
    student = build_student("vit_tiny_patch16_224", network, generator=torch.Generator())
    return set(dir(Objective(student))) | set(dir(objective_schemas.ObjectiveSection)) | {"name"}


@pytest.mark.parametrize("path", NAME_NO_OBJECTIVE, ids=name_of)
def test_rooms_read_of_an_objective_only_what_every_objective_has(path, shared_by_all_objectives):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and is_objective(node.value):
            assert node.attr in shared_by_all_objectives, f"{name_of(path)}: objective.{node.attr}"
        elif isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("getattr", "hasattr"):
            field = node.args[1].value if isinstance(node.args[1], ast.Constant) else "a computed field"
            assert not is_objective(node.args[0]) or field in shared_by_all_objectives, (
                f"{name_of(path)}: {node.func.id}(objective, {field!r})"
            )


def is_objective(node: ast.AST) -> bool:
    return "objective" in (getattr(node, "attr", None), getattr(node, "id", None))


def test_every_package_is_installed_and_nothing_else_becomes_importable():
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    listed = set(setup["options"]["packages"].split())
    found = {name_of(path.parent).replace("/", ".") for path in SOURCES if path.name == "__init__.py"}
    shipped = {"shipped_launch", "shipped_recipes", "shipped_ds_configs"}
    assert listed == found | {f"dmae_ds.{name}" for name in shipped}


def module_file(dotted: str) -> Path | None:
    """The file of a module of ours, or None; `dmae_ds.train.loop.train` -> dmae_ds/train/loop.py."""
    while dotted:
        base = REPOSITORY / dotted.replace(".", "/")
        for path in (base.with_suffix(".py"), base / "__init__.py"):
            if path.is_file():
                return path
        dotted = dotted.rpartition(".")[0]
    return None


def test_files_import_each_other_in_no_circle():
    """Imports at the top of files, followed from file to file; each file is visited once."""
    imported = {
        path: {module_file(name) for name in imports_of(path, top_level_only=True)} - {None, path}
        for path in SOURCES
    }
    assert sum(map(len, imported.values())) > len(SOURCES)
    done: set[Path] = set()

    def visit(path: Path, way: list[Path]) -> None:
        assert path not in way, " -> ".join(map(name_of, [*way[way.index(path) :], path]))
        if path not in done:
            for target in sorted(imported[path]):
                visit(target, [*way, path])
            done.add(path)

    for path in SOURCES:
        visit(path, [])
