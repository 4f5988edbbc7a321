"""Damaged tars, images, indexes and manifests give images or an error of one line.

They never cause a crash, a hang, a command, a write outside the folder, or a large use of memory. Inputs are
made and read in a forked child under limits; an audit hook ends it at a forbidden event. A failure names the
number of the
input: `python -m tests.data.test_mutations NUMBER` reads that one alone.
"""

from __future__ import annotations

import faulthandler
import hashlib
import io
import json
import os
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import traceback
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dmae_ds.data.decode import decode, decode_bytes
from dmae_ds.data.dense import open_dense
from dmae_ds.data.dense_members import decode_masks, read_annotations, read_map
from dmae_ds.data.open import open_train
from dmae_ds.data.reader import Sample, SampleReader
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.shards import ShardError, index_name
from dmae_ds.data.unindexed_stream import _samples_of
from tests.data.mutations import (
    IMAGES,
    INFO,
    NUM_SAMPLES,
    bomb,
    fingerprint_of,
    make_dense_folder,
    make_folder,
    mutate,
    mutate_annotations,
    mutate_manifest,
)

CPU_S, WALL_S = 5.0, 120.0  # CPU time is the limit on a shared machine; wall time only ends real hangs
MEMORY_BYTES = 2**30
FORBIDDEN, BROKEN = 77, 78  # exit codes of the child
FORBIDDEN_EVENTS = {
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "pty.spawn",
    "socket.connect",
    "pickle.find_class",
}
KINDS = ("image", "image", "bomb", "tar", "index", "index and manifest", "manifest", "unindexed")
KINDS += ("map", "annotations", "dense index and manifest")


def read_all(folder: Path) -> None:
    """Read and decode every sample, one by one and by blocks."""
    shard_set = ShardSet.open(folder, label="data.train")
    reader, block_reader = SampleReader(shard_set), SampleReader(shard_set, block=4)
    for sample_id in range(min(shard_set.num_samples, 2 * NUM_SAMPLES)):
        for read, source in ((SampleReader.read, reader), (_read_by_block, block_reader)):
            try:
                decode(read(source, sample_id))
            except ShardError as error:
                assert "\n" not in str(error)


def _read_by_block(reader: SampleReader, sample_id: int) -> Sample:
    span = (sample_id // 4 * 4, min(4, reader.shard_set.num_samples - sample_id // 4 * 4))
    reader.fetch([span])
    return reader.read(sample_id, span=span)


def try_input(number: int, folder: Path) -> str:
    """Make input `number` and read it. Returns its kind; raises everything but a ShardError of one line."""
    rng, kind = np.random.default_rng(number), KINDS[number % len(KINDS)]
    if kind in ("image", "bomb"):
        data = bomb(rng) if kind == "bomb" else IMAGES[int(rng.integers(0, NUM_SAMPLES))]
        try:
            image = decode_bytes(mutate(data, rng) if kind == "image" or rng.random() < 0.3 else data)
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        except ValueError as error:
            assert "\n" not in str(error)
        return kind
    if kind in ("map", "annotations"):
        try:
            read_member(kind, rng)
        except ValueError as error:
            assert "\n" not in str(error)
        return kind
    if kind.startswith("dense"):
        return read_damaged_dense_folder(kind, folder, rng)
    make_folder(folder)
    damage_folder(folder, kind, rng)
    try:
        if kind == "unindexed":
            _read_unindexed(folder, folder / "shard-000001.tar", rng)
        else:
            read_all(folder)
    except ShardError as error:
        assert "\n" not in str(error)
    return kind


def read_member(kind: str, rng: np.random.Generator) -> None:
    """Decode a damaged label map or damaged annotations."""
    if kind == "annotations":
        found = read_annotations(mutate_annotations(rng), INFO, width=120, height=90)
        assert decode_masks(found.segmentations, width=120, height=90).shape[1:] == (90, 120)
        return
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 3, (40, 50)).astype(np.uint8)).save(file, "PNG")
    data = bomb(rng) if rng.random() < 0.2 else mutate(file.getvalue(), rng)
    assert read_map(data, 3).ndim == 2


def read_damaged_dense_folder(kind: str, folder: Path, rng: np.random.Generator) -> str:
    """Damage index and manifest of a dense folder, and read all of it."""
    make_dense_folder(folder)
    damage_folder(folder, kind.removeprefix("dense "), rng, tar="shard-000000.tar")
    try:
        dense = open_dense(folder)
        for number in range(min(len(dense), 2 * NUM_SAMPLES)):
            try:
                assert dense[number].label_map.ndim == 2
            except ShardError as error:
                assert "\n" not in str(error)
    except ShardError as error:
        assert "\n" not in str(error)
    return kind


def damage_folder(
    folder: Path, kind: str, rng: np.random.Generator, *, tar: str = "shard-000001.tar"
) -> None:
    """Change the file of a shard folder that `kind` names."""
    tar, manifest = folder / tar, folder / "manifest.json"
    index = folder / index_name(tar.name)
    if kind == "tar":
        size, data = tar.stat().st_size, mutate(tar.read_bytes(), rng)
        tar.write_bytes((data + bytes(size))[:size] if rng.random() < 0.8 else data)
    elif kind.startswith("index"):
        index.write_bytes(mutate(index.read_bytes(), rng))
        if kind == "index and manifest":  # the manifest has the checksum of the damaged index
            content = json.loads(manifest.read_text())
            content["shards"][-1]["index_sha256"] = hashlib.sha256(index.read_bytes()).hexdigest()
            content["fingerprint"] = fingerprint_of(content)
            manifest.write_text(json.dumps(content))
    elif kind == "manifest":
        text = manifest.read_text()
        is_text = rng.random() < 0.4
        manifest.write_bytes(mutate(text.encode(), rng) if is_text else mutate_manifest(text, rng).encode())


def _read_unindexed(folder: Path, tar: Path, rng: np.random.Generator) -> None:
    """Read the tars of a folder without its index, one of them with hostile members and damaged."""
    from dmae_ds.config.data import DataConfig

    (folder / "manifest.json").unlink()
    with tarfile.open(tar, "a", format=tarfile.PAX_FORMAT) as file:  # members of a hostile tar
        for name, kind in (
            ("../escape.jpg", tarfile.REGTYPE),
            ("/tmp/escape.jpg", tarfile.REGTYPE),
            ("link.jpg", tarfile.SYMTYPE),
            ("x.pkl", tarfile.REGTYPE),
            ("ü" * 99 + ".jpg", tarfile.REGTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, "/etc/passwd", 8 if kind == tarfile.REGTYPE else 0
            file.addfile(info, io.BytesIO(b"cos\nsyst") if info.size else None)
    tar.write_bytes(mutate(tar.read_bytes(), rng))
    shards = open_train(DataConfig(train=str(folder), num_samples=12), allow_pipe=False)
    corrupt = []
    for sample in _samples_of(shards.tars, 0, corrupt):
        try:
            decode_bytes(sample["data"])
        except ValueError:
            continue
    assert all("\n" not in entry.reason for entry in corrupt)


def _forbid(folder: Path) -> None:
    """End the process at an event that no input may cause, or at a write outside `folder`."""

    def hook(event: str, args: tuple) -> None:
        if event in FORBIDDEN_EVENTS:
            os._exit(FORBIDDEN)
        if event != "open" or not isinstance(args[0], (str, bytes, os.PathLike)):
            return
        is_write = isinstance(args[1], str) and bool(set(args[1]) & set("wax+"))
        if is_write and not os.path.abspath(os.fsdecode(args[0])).startswith(str(folder)):
            os._exit(FORBIDDEN)

    sys.addaudithook(hook)


def run_in_child(numbers: range, folder: Path) -> int:
    """Read these inputs in a child under limits; returns the bytes of memory that it used at most."""
    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(receiver)
        number = None
        try:
            faulthandler.disable()
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            for kind in (signal.SIGPROF, signal.SIGALRM):
                signal.signal(kind, signal.SIG_DFL)
            begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            _forbid(folder)
            for number in numbers:
                os.write(sender, b"%d\n" % number)
                signal.setitimer(signal.ITIMER_PROF, CPU_S)
                signal.setitimer(signal.ITIMER_REAL, WALL_S)
                try_input(number, folder)
            used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begin  # KiB
            os.write(sender, b"memory %d\n" % (1024 * used))
            os._exit(0)
        except BaseException:
            os.write(sender, traceback.format_exc().encode())
            os._exit(BROKEN)
    os.close(sender)
    with open(receiver, "rb") as file:
        output = file.read().decode()
    _, status = os.waitpid(child, 0)
    lines = output.splitlines()
    code = os.waitstatus_to_exitcode(status)
    reasons = {
        FORBIDDEN: "caused a forbidden event",
        BROKEN: "raised",
        -signal.SIGPROF: "took more than 5 s",
        -signal.SIGALRM: "hung",
    }
    number = [line for line in lines if line.isdigit()][-1:]
    assert code == 0, f"input {number} {reasons.get(code, f'ended with {code}')}\n{output[-3000:]}"
    return int(lines[-1].removeprefix("memory "))


def check(numbers: range) -> int:
    """Read these inputs in a folder of their own; returns the bytes of memory that they used."""
    folder = Path(tempfile.mkdtemp(prefix="mutations")).resolve()
    try:
        memory = run_in_child(numbers, folder)
    finally:
        shutil.rmtree(folder)
    assert memory < MEMORY_BYTES
    return memory


def test_forbidden_events_are_noticed(tmp_path):
    for action, words in (
        (lambda: os.system("true"), "caused a forbidden event"),
        (lambda: Path("/tmp/escaped").write_text("x"), "caused a forbidden event"),
        (lambda: os.kill(os.getpid(), signal.SIGSEGV), "ended with -11"),
        (lambda: os.kill(os.getpid(), signal.SIGPROF), "took more than 5 s"),
        (lambda: 1 / 0, "ZeroDivisionError"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys.modules[__name__], "try_input", lambda number, folder, action=action: action())
            with pytest.raises(AssertionError, match=words):
                run_in_child(range(1), tmp_path)


def test_400_mutated_inputs():
    check(range(400))


@pytest.mark.slow
@pytest.mark.parametrize("start", range(400, 10_400, 1000))
def test_10_000_more_mutated_inputs(start):
    print(f"{check(range(start, start + 1000)) / 2**20:.0f} MiB")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        print(try_input(int(sys.argv[1]), Path(directory)))
