"""Whatever is done to the bytes of tars, JPEGs, indexes and manifests: one line, or a picture. Never a crash, a hang, a
command, a write outside the folder at hand, or the machine's memory.

Inputs are made and read in a forked child under limits; an audit hook ends it at a forbidden event. A failure names
the number of the input: `python -m tests.data.test_mutations NUMBER` reads that one alone.
"""

from __future__ import annotations

import faulthandler
import io
import json
import os
import resource
import shutil
import signal
import struct
import sys
import tarfile
import tempfile
import traceback
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dmae_ds.data.decode import decode, decode_bytes
from dmae_ds.data.open import open_train
from dmae_ds.data.reader import SampleReader
from dmae_ds.data.shard_set import ShardSet
from dmae_ds.data.shards import (
    NewSample,
    Shard,
    ShardError,
    compute_fingerprint,
    index_name,
    write_manifest,
    write_shard,
)
from dmae_ds.data.unindexed_stream import _samples_of

NUM_SAMPLES = 12
CPU_S, WALL_S = 5.0, 120.0  # CPU time is what counts on a shared machine; the wall only ends real hangs
MEMORY_BYTES = 2**30
FORBIDDEN, BROKEN = 77, 78


def pictures() -> list[bytes]:
    rng = np.random.default_rng(0)
    found = []
    for number in range(NUM_SAMPLES):
        smooth = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
            (120, 90), Image.Resampling.BICUBIC
        )
        kinds = [
            ("JPEG", {}),
            ("JPEG", {"progressive": True}),
            ("PNG", {}),
            ("JPEG", {"comment": b"c" * 200}),
        ]
        kind, options = kinds[number % 4]
        image = smooth.convert("CMYK") if number == 4 else smooth.convert("L") if number == 8 else smooth
        file = io.BytesIO()
        image.save(file, kind, **options)
        found.append(file.getvalue())
    return found


PICTURES = pictures()


def make_folder(folder: Path) -> None:
    samples = [
        NewSample(number, "png" if number % 4 == 2 else "jpg", data, 120, 90, number % 3)
        for number, data in enumerate(PICTURES)
    ]
    shards = [
        write_shard(folder, f"shard-{shard:06d}.tar", samples[6 * shard : 6 * shard + 6])
        for shard in range(2)
    ]
    write_manifest(folder, classes=["a", "b", "c"], seed=0, shards=shards)


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """Flip, overwrite, cut, extend, swap, repeat, or write an extreme number."""
    data, size = bytearray(data), len(data)
    for _ in range(int(rng.choice([1, 1, 1, 2, 5, 30]))):
        at, kind = int(rng.integers(0, max(1, len(data)))), int(rng.integers(0, 9))
        if not data:
            return bytes(rng.bytes(10))
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(0, 8))
        elif kind == 1:
            data[at] = int(rng.choice([0, 255, 127, 128, 48, 55, 0xD8, 0xDA, 0xC2]))
        elif kind == 2:
            data = data[:at]
        elif kind == 3:
            data[at:at] = rng.bytes(int(rng.integers(1, 700)))
        elif kind == 4:  # swap two stretches
            length, other = int(rng.integers(1, 600)), int(rng.integers(0, len(data)))
            data[at : at + length], data[other : other + length] = (
                data[other : other + length],
                data[at : at + length],
            )
        elif kind == 5:
            extreme = int(rng.choice([0, 1, 2**15, 65500, 2**16 - 1, 100_000, 2**31 - 1]))
            packed = struct.pack(str(rng.choice([">H", ">I", "<I", "<Q", ">Q"])), extreme % 2**16)
            data[at : at + len(packed)] = packed
        elif kind == 6:
            data[at : at + int(rng.integers(1, 2000))] = b""
        elif kind == 7:
            data = data + data[at:]
        else:  # in a header, where it hurts
            data[int(rng.integers(0, min(600, len(data))))] = int(rng.integers(0, 256))
        data = data[: 4 * size + 1000]
    return bytes(data)


def mutate_number(text: str, rng: np.random.Generator) -> str:
    """A manifest with one value replaced by something wicked, its fingerprint right again half of the time."""
    manifest = json.loads(text)
    wicked = [
        None,
        True,
        -1,
        0,
        1.5,
        2**63,
        10**30,
        "",
        "../x",
        "/etc/passwd",
        "a" * 300,
        [],
        {},
        "pipe:touch ran",
        "shard-000001.tar",
    ]
    value = wicked[int(rng.integers(0, len(wicked)))]
    shard, key = (
        manifest["shards"][int(rng.integers(0, 2))],
        list(manifest)[int(rng.integers(0, len(manifest)))],
    )
    if rng.random() < 0.6:
        shard[list(shard)[int(rng.integers(0, len(shard)))]] = value
    else:
        manifest[key] = value
    if rng.random() < 0.7:
        try:
            manifest["num_samples"] = sum(entry["num_samples"] for entry in manifest["shards"])
            manifest["fingerprint"] = compute_fingerprint(
                manifest["classes"], [Shard(**entry) for entry in manifest["shards"]]
            )
        except (TypeError, KeyError, AttributeError):
            pass
    return json.dumps(manifest)


def bomb(rng: np.random.Generator) -> bytes:
    """A small file whose header promises up to 100,000 x 100,000 pixels."""
    width, height = (int(rng.choice([1, 8, 8191, 65500, 100_000])) for _ in range(2))
    file = io.BytesIO()
    if rng.random() < 0.5:
        Image.new("RGB", (16, 16), (9, 99, 199)).save(file, "JPEG", progressive=bool(rng.random() < 0.5))
        data = bytearray(file.getvalue())
        start = max(data.find(b"\xff\xc0"), data.find(b"\xff\xc2")) + 5
        data[start : start + 4] = struct.pack(">HH", min(height, 65535), min(width, 65535))
    else:
        import zlib

        Image.new("RGB", (16, 16)).save(file, "PNG")
        data = bytearray(file.getvalue())
        data[16:24] = struct.pack(">II", width, height)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def read_all(folder: Path) -> None:
    shard_set = ShardSet.open(folder, label="data.train")
    reader, block_reader = SampleReader(shard_set), SampleReader(shard_set, block=4)
    for sample_id in range(min(shard_set.num_samples, 2 * NUM_SAMPLES)):
        for read in (lambda: reader.read(sample_id), lambda: _by_block(block_reader, sample_id)):
            try:
                decode(read())
            except ShardError as error:
                assert "\n" not in str(error)


def _by_block(reader: SampleReader, sample_id: int):
    span = (sample_id // 4 * 4, min(4, reader.shard_set.num_samples - sample_id // 4 * 4))
    reader.fetch([span])
    return reader.read(sample_id, span=span)


def try_input(number: int, folder: Path) -> str:
    """Make input `number` and read it. Returns its kind; raises whatever is not a ShardError of one line."""
    rng = np.random.default_rng(number)
    kind = ("picture", "picture", "bomb", "tar", "index", "index and manifest", "manifest", "foreign")[
        number % 8
    ]
    if kind in ("picture", "bomb"):
        data = bomb(rng) if kind == "bomb" else PICTURES[int(rng.integers(0, NUM_SAMPLES))]
        try:
            image = decode_bytes(mutate(data, rng) if kind == "picture" or rng.random() < 0.3 else data)
            assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
        except ValueError as error:
            assert "\n" not in str(error)
        return kind
    make_folder(folder)
    tar, index, manifest = (
        folder / "shard-000001.tar",
        folder / index_name("shard-000001.tar"),
        folder / "manifest.json",
    )
    if kind == "tar":
        data = mutate(tar.read_bytes(), rng)
        tar.write_bytes(
            (data + bytes(tar.stat().st_size))[: tar.stat().st_size] if rng.random() < 0.8 else data
        )
    elif kind.startswith("index"):
        index.write_bytes(mutate(index.read_bytes(), rng))
        if kind != "index":  # and the manifest agrees with it
            import hashlib

            content = json.loads(manifest.read_text())
            content["shards"][1]["index_sha256"] = hashlib.sha256(index.read_bytes()).hexdigest()
            content["fingerprint"] = compute_fingerprint(
                content["classes"], [Shard(**entry) for entry in content["shards"]]
            )
            manifest.write_text(json.dumps(content))
    elif kind == "manifest":
        text = manifest.read_text()
        manifest.write_bytes(
            mutate(text.encode(), rng) if rng.random() < 0.4 else mutate_number(text, rng).encode()
        )
    try:
        if kind == "foreign":
            _read_foreign(folder, tar, rng)
        else:
            read_all(folder)
    except ShardError as error:
        assert "\n" not in str(error)
    return kind


def _read_foreign(folder: Path, tar: Path, rng: np.random.Generator) -> None:
    from dmae_ds.config.run import DataConfig

    (folder / "manifest.json").unlink()
    with tarfile.open(tar, "a", format=tarfile.PAX_FORMAT) as file:  # what a hostile tar may hold
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
    """Ends the process at an event that no input may cause."""

    def hook(event: str, args: tuple) -> None:
        if event in (
            "subprocess.Popen",
            "os.system",
            "os.exec",
            "os.posix_spawn",
            "os.fork",
            "pty.spawn",
            "socket.connect",
            "pickle.find_class",
            "exec.never",
        ):
            os._exit(FORBIDDEN)
        if (
            event == "open"
            and isinstance(args[0], (str, bytes, os.PathLike))
            and isinstance(args[1], str)
            and set(args[1]) & set("wax+")
        ):
            if not os.path.abspath(os.fsdecode(args[0])).startswith(str(folder)):
                os._exit(FORBIDDEN)

    sys.addaudithook(hook)


def run_in_child(numbers: range, folder: Path) -> int:
    """Read these inputs in a child under limits; the most memory it had beyond what it began with."""
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
            os.write(
                sender, b"memory %d\n" % (1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begin))
            )
            os._exit(0)
        except BaseException:
            os.write(sender, traceback.format_exc().encode())
            os._exit(BROKEN)
    os.close(sender)
    with open(receiver, "rb") as file:
        said = file.read().decode()
    _, status = os.waitpid(child, 0)
    lines = said.splitlines()
    code = os.waitstatus_to_exitcode(status)
    what = {
        FORBIDDEN: "did what is forbidden",
        BROKEN: "raised",
        -signal.SIGPROF: "took more than 5 s",
        -signal.SIGALRM: "hung",
    }
    assert code == 0, (
        f"input {[line for line in lines if line.isdigit()][-1:]} {what.get(code, f'ended with {code}')}\n{said[-3000:]}"
    )
    return int(lines[-1].removeprefix("memory "))


def check(numbers: range) -> int:
    folder = Path(tempfile.mkdtemp(prefix="mutations")).resolve()
    try:
        memory = run_in_child(numbers, folder)
    finally:
        shutil.rmtree(folder)
    assert memory < MEMORY_BYTES
    return memory


def test_the_watch_works(tmp_path):
    """Each of the forbidden things is noticed."""
    for action, words in (
        (lambda: os.system("true"), "did what is forbidden"),
        (lambda: open("/tmp/escaped", "w"), "did what is forbidden"),
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
