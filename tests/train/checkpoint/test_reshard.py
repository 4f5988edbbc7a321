"""A checkpoint goes on at another world size, ZeRO stage or number of teacher stages as if nothing had happened; a broken one or a full disk stop every rank."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dmae_ds.errors import RunFailed, UserError
from dmae_ds.train.checkpoint.deepspeed_files import load_file as load_checkpoint_file
from dmae_ds.train.checkpoint.folder import CheckpointFolder, Written, crc32_of
from tests.train.conftest import free_port, losses, run
from tests.train.test_resume import STREAM

DRIVER = Path(__file__).with_name("reshard_driver.py")
STEPS, SAVED = 6, 3
NEAR = 1e-4  # the acceptance's
# Accumulated everywhere but on 4 ranks; so much decay that a parameter in the other group shows.
LESS = [
    "optim.micro_batch=4",
    "optim.weight_decay=5",
    "data.num_workers=0",
    "log.every_steps=1",
    "checkpoint.every_minutes=null",
]
FORGOTTEN = ("exp_avg", "step")
TMPFS_KIB = {
    "full_at_once": 1500,
    "full_later": 6200,
}  # a save of 2 ranks at stage 2 has 2,600 KiB, the plain files 670


def train(recipe: list[str], folder: Path, *more: str) -> list[str]:
    batch = next(
        int(option.split("=")[1]) for option in reversed(recipe) if option.startswith("optim.global_batch=")
    )
    return [
        "train",
        *recipe,
        *LESS,
        f"optim.epochs={(STEPS * batch - 1) / 1400}",
        "checkpoint.every_steps=3",
        f"run.dir={folder}",
        *more,
    ]


def source(recipe: list[str], folder: Path, stage: int, ranks: int, *more: str) -> list[str]:
    return train(recipe, folder / f"{ranks}x{stage}", f"deepspeed=zero{stage}", *more)


def move(
    recipe: list[str], folder: Path, *, ranks: tuple[int, int], stages: tuple[int, int]
) -> list[list[str]]:
    other = folder / f"{ranks[0]}x{stages[0]}-{ranks[1]}x{stages[1]}"
    return [
        ["take", str(folder / f"{ranks[0]}x{stages[0]}"), SAVED, str(other)],
        train(recipe, other, f"deepspeed=zero{stages[1]}"),
    ]


def start(steps: list[list], *, ranks: int, cwd: Path, script: str = "") -> subprocess.CompletedProcess:
    """script: does the steps as "$@", in a mount namespace of its own."""
    launcher = (
        [sys.executable]
        if ranks == 1
        else ["torchrun", "--nproc_per_node", str(ranks), "--master_port", str(free_port())]
    )  # starts sooner than deepspeed
    command = [*launcher, str(DRIVER), json.dumps(steps)]
    done = run(["unshare", "-m", "bash", "-ec", script, "-", *command] if script else command, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done


def assert_same(found: Path, expected: Path, *, since: int = SAVED) -> None:
    assert losses(found) == pytest.approx(losses(expected)[since:], rel=NEAR)
    one, other = load_file(found / "student.safetensors"), load_file(expected / "student.safetensors")
    for name in other:
        if not name.endswith(
            "qkv.bias"
        ):  # a third of it has rounding noise for a gradient, see test_same_curve
            torch.testing.assert_close(
                one[name], other[name], rtol=NEAR, atol=NEAR * other[name].abs().max().item()
            )


def forget(folder: Path, what: str) -> None:
    """Take something of the optimiser's state out of a checkpoint of stage 0, and seal it again."""
    path = folder / "mp_rank_00_model_states.pt"
    file = load_checkpoint_file(path)
    for state in file["optimizer"]["state"].values():
        state[what].fill_(1 if what == "step" else 0)
    torch.save(file, path)
    state = json.loads((folder / "state.json").read_text())
    state["files"][path.name] = Written(path.stat().st_size, crc32_of(path))._asdict()
    (folder / "state.json").write_text(json.dumps(state))


def can_mount() -> bool:
    return (
        shutil.which("unshare") is not None
        and subprocess.run(
            ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True
        ).returncode
        == 0
    )


@pytest.fixture(scope="module")
def moved(tiny_recipe, tmp_path_factory):
    """(folder of runs, what the ranks said): one rank writes, then two ranks do everything else in one start."""
    folder = tmp_path_factory.mktemp("moved")
    start([source(tiny_recipe, folder, 3, 1), source(tiny_recipe, folder, 0, 1)], ranks=1, cwd=folder)
    for name in FORGOTTEN:
        shutil.copytree(folder / "1x0", folder / f"without-{name}")
        shutil.rmtree(folder / f"without-{name}" / "checkpoints" / f"step-{STEPS:08d}")
        forget(folder / f"without-{name}" / "checkpoints" / f"step-{SAVED:08d}", name)
    steps = move(tiny_recipe, folder, ranks=(1, 2), stages=(3, 2)) + move(
        tiny_recipe, folder, ranks=(1, 2), stages=(0, 3)
    )
    for name in FORGOTTEN:
        steps += [
            ["take", str(folder / f"without-{name}"), SAVED, str(folder / f"went-on-without-{name}")],
            train(tiny_recipe, folder / f"went-on-without-{name}"),
        ]
    steps += [
        source(tiny_recipe, folder, 2, 2),
        ["take", str(folder / "2x2"), SAVED, str(folder / "streamed")],
        train(tiny_recipe, folder / "streamed", *STREAM),
    ]
    damaged = folder / "damaged"
    shutil.copytree(folder / "1x3", damaged)
    file = damaged / "checkpoints" / f"step-{STEPS:08d}" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    steps += [train(tiny_recipe, damaged)]
    script = ""
    if can_mount():
        disks = {folder / name: kib for name, kib in TMPFS_KIB.items()}
        for disk in disks:
            disk.mkdir()
            steps += [train(tiny_recipe, disk)]
        mounts = "\n".join(f"mount -t tmpfs -o size={kib}k tmpfs {disk}" for disk, kib in disks.items())
        script = f'{mounts}\n"$@"\nfind {" ".join(map(str, disks))} -type f > {folder / "listing"}\ncp {folder / "full_later/checkpoints/latest"} {folder / "full_later_latest"}'
    return folder, start(steps, ranks=2, cwd=folder, script=script).stderr


@pytest.mark.parametrize("stages", [(3, 2), (0, 3)], ids=str)
def test_another_world_size_and_stage_go_on_as_the_uninterrupted_run(moved, stages):
    folder, said = moved
    assert_same(folder / f"1x{stages[0]}-2x{stages[1]}", folder / "1x3")
    assert (
        f"moved: written by 1 ranks, ZeRO stage {stages[0]}; this run has 2 ranks, ZeRO stage {stages[1]}"
        in said
    )


@pytest.mark.parametrize("name", FORGOTTEN)
def test_what_the_optimiser_forgets_would_show(moved, name):
    folder, _ = moved
    expected, found = losses(folder / "1x0")[SAVED:], losses(folder / f"went-on-without-{name}")
    assert len(found) == len(expected)
    assert found[0] == pytest.approx(expected[0], rel=NEAR)  # the weights did move
    assert found != pytest.approx(expected, rel=NEAR)


def test_a_teacher_in_more_stages_goes_on_bit_for_bit(moved):
    folder, _ = moved
    assert losses(folder / "streamed") == losses(folder / "2x2")[SAVED:]
    one, other = (load_file(folder / name / "student.safetensors") for name in ("streamed", "2x2"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_flipped_bit_stops_every_rank_and_the_way_back_is_named(moved):
    folder, said = moved
    lines = re.findall(r"rank (\d) stopped: UserError: (.*)", said)
    assert [rank for rank, _ in sorted(lines)] == ["0", "1"]
    for _, line in lines:
        assert "zero_pp_rank_0_mp_rank_00_optim_states.pt is damaged: its crc32 is" in line
        assert f"echo step-{SAVED:08d} > {folder / 'damaged' / 'checkpoints' / 'latest'}" in line


def test_a_full_disk_stops_every_rank_and_what_was_saved_stays(moved):
    folder, said = moved
    if not (folder / "listing").exists():
        pytest.skip("NOT CHECKED WITH A FULL DISK: mount namespaces (unshare -m) are not allowed here")
    lines = re.findall(r"rank (\d) stopped: RunFailed: step (\d) could not be saved: (.*)", said)
    assert sorted((rank, step) for rank, step, _ in lines) == [
        ("0", str(SAVED)),
        ("0", str(STEPS)),
        ("1", str(SAVED)),
        ("1", str(STEPS)),
    ]
    for _, step, line in lines:
        assert "No space left on device" in line, (
            line
        )  # DeepSpeed's files in the one, the plain files in the other
        assert ("safetensors" in line) == (int(step) == STEPS), line
        assert (
            "nothing was saved before" if int(step) == SAVED else f"step-{SAVED:08d} is untouched"
        ) in line
    left = {str(Path(line).relative_to(folder)) for line in (folder / "listing").read_text().splitlines()}
    assert not {name for name in left if name.endswith(".tmp") or f"step-{STEPS:08d}" in name}
    assert not {name for name in left if name.startswith("full_at_once/checkpoints/")}
    assert {"full_later/student.safetensors", f"full_later/checkpoints/step-{SAVED:08d}/state.json"} <= left
    assert (folder / "full_later_latest").read_text() == f"step-{SAVED:08d}"


def assert_universal(run_dir: Path, stage: int, out: Path) -> None:
    # For stages 1 to 3 the layout comes from DeepSpeed's own converter: what a move reads is held against
    # that.
    from dmae_ds.tools.checkpoint_convert import convert
    from dmae_ds.train.checkpoint.full_state import FullState

    assert f"written by {run_dir.name[0]} ranks, ZeRO stage {stage}" in convert(run_dir, out)
    state = FullState(CheckpointFolder(run_dir).latest(), stage=stage)
    universal = out / (out / "latest_universal").read_text() / "zero"
    assert {path.parent.name for path in universal.rglob("exp_avg.pt")} == set(state.names)
    for name in state.names:
        for key, value in state.read(name).items():
            found = torch.load(universal / name / f"{key}.pt", weights_only=True)
            found = (
                found["param"] if isinstance(found, dict) else found
            )  # stage 3's has no dictionary around it
            assert torch.equal(found.flatten(), value.flatten())
    assert {path.name for path in out.iterdir()} == {f"step-{STEPS:08d}", "latest_universal"} and not list(
        out.parent.glob("*.tmp")
    )


@pytest.mark.parametrize(
    "run, stage",
    [
        ("2x2", 2),
        pytest.param("1x0", 0, marks=pytest.mark.slow),
        pytest.param("1x3", 3, marks=pytest.mark.slow),
    ],
)
def test_the_universal_layout_holds_what_a_move_reads(moved, tmp_path, run, stage):
    folder, _ = moved
    assert_universal(folder / run, stage, tmp_path / "out")
    with pytest.raises(UserError, match="exists; choose another name"):
        assert_universal(folder / run, stage, tmp_path / "out")


def test_a_file_that_holds_anything_else_is_not_read(tmp_path):
    torch.save({"step": 1, "harmless": Path("looks")}, tmp_path / "file.pt")
    with pytest.raises(RunFailed, match="holds an object that no checkpoint of this trainer needs"):
        load_checkpoint_file(tmp_path / "file.pt")


def test_parts_that_do_not_divide_by_the_ranks_are_cut_and_joined(tmp_path):
    from dmae_ds.train.checkpoint.full_state import MOMENTS, STATES, FullState
    from dmae_ds.train.checkpoint.reshard import cut_piece

    shapes = [{"a": torch.Size([7]), "b": torch.Size([2, 5])}, {"c": torch.Size([1])}]
    whole = {
        (name, state): torch.randn(shape)
        for group in shapes
        for name, shape in group.items()
        for state in STATES
    }
    for rank in range(3):
        flats = [
            {state: torch.cat([cut_piece(whole[name, state], rank, 3) for name in group]) for state in STATES}
            for group in shapes
        ]
        states = {
            number: {"step": torch.tensor(4.0), **{moment: flat[moment] for moment in MOMENTS}}
            for number, flat in enumerate(flats)
        }
        optimizer = {
            "fp32_flat_groups": [flat["fp32"] for flat in flats],
            "optimizer_state_dict": {"state": states},
        }
        torch.save(
            {"optimizer_state_dict": optimizer}, tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        )
        torch.save({"param_shapes": shapes}, tmp_path / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt")
    found = FullState(tmp_path, stage=3)
    assert found.names == ["a", "b", "c"] and found.step == 4
    assert all(
        torch.equal(value, whole[name, state])
        for name in found.names
        for state, value in found.read(name).items()
    )


PAIRS = list(itertools.product(range(4), range(4)))


@pytest.fixture(scope="module")
def grid(tiny_recipe, tmp_path_factory) -> Path:
    """Every stage of 1 and 2 ranks, moved to every stage of 2, 1 and 4 ranks; and 3 ranks, by which nothing divides, with stage 3."""
    folder = tmp_path_factory.mktemp("grid")
    recipe = [*tiny_recipe, "optim.global_batch=48"]
    for ranks in (1, 2):
        start([source(recipe, folder, stage, ranks) for stage in range(4)], ranks=ranks, cwd=folder)
    start(
        [source(recipe, folder, 3, 3), *move(recipe, folder, ranks=(2, 3), stages=(2, 3))],
        ranks=3,
        cwd=folder,
    )
    for ranks in ((1, 2), (2, 1), (2, 4)):
        start(
            [step for stages in PAIRS for step in move(recipe, folder, ranks=ranks, stages=stages)],
            ranks=ranks[1],
            cwd=folder,
        )
    start(move(recipe, folder, ranks=(3, 2), stages=(3, 1)), ranks=2, cwd=folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "ranks, stages",
    [*itertools.product([(1, 2), (2, 1), (2, 4)], PAIRS), ((2, 3), (2, 3)), ((3, 2), (3, 1))],
    ids=str,
)
def test_every_pair_of_stages_and_world_sizes_moves(grid, ranks, stages):
    assert_same(grid / f"{ranks[0]}x{stages[0]}-{ranks[1]}x{stages[1]}", grid / f"{ranks[0]}x{stages[0]}")


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_several_ranks_wrote_is_read_as_deepspeed_reads_it(grid, tmp_path, stage):
    assert_universal(grid / f"2x{stage}", stage, tmp_path / "out")


HALF = {"bf16": [(1, 3), (3, 2), (2, 1)], "bf16_autocast": [(0, 3), (3, 0), (1, 2)]}


@pytest.mark.slow
def test_half_precision_moves_too(tiny_recipe, tmp_path):
    def in_precision(name: str) -> tuple[list[str], Path]:
        return [*tiny_recipe, f"precision={name}"], tmp_path / name

    start(
        [source(*in_precision(name), stage, 1) for name, pairs in HALF.items() for stage, _ in pairs],
        ranks=1,
        cwd=tmp_path,
    )
    start(
        [
            step
            for name, pairs in HALF.items()
            for stages in pairs
            for step in move(*in_precision(name), ranks=(1, 2), stages=stages)
        ],
        ranks=2,
        cwd=tmp_path,
    )
    for name, pairs in HALF.items():
        for one, other in pairs:
            # Equal weights give losses up to 2e-3 apart here: where they lie in memory decides how bf16
            # products round.
            assert losses(tmp_path / name / f"1x{one}-2x{other}") == pytest.approx(
                losses(tmp_path / name / f"1x{one}")[SAVED:], rel=5e-3
            )
