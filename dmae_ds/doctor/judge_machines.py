"""Facts of all nodes -> checks of what is installed and plugged in. Pure; no torch."""

from __future__ import annotations

from dataclasses import dataclass

from dmae_ds.doctor.check import FAIL, OK, SKIP, WARN, Check, by_value, groups, names
from dmae_ds.doctor.hostfile import Node
from dmae_ds.doctor.probe import COMPARED
from dmae_ds.doctor.reach import Trouble
from dmae_ds.output.units import GIB

LEAST_FREE = 0.9  # share of a GPU's memory that nobody uses yet
EQUAL = ("python", *COMPARED, "dmae-ds")


@dataclass(frozen=True)
class Asked:
    """What the doctor was asked about: everything a judge needs beside the facts."""

    nodes: list[Node]
    kind: str  # of start.Launch
    master_address: str | None
    port: int
    recipe: str | None = None

    @property
    def world(self) -> int:
        return sum(node.slots for node in self.nodes)


Facts = dict[str, dict]


def judge_ssh(answers: dict[str, dict | Trouble], *, pdsh: str | None) -> list[Check]:
    """pdsh: what `pdsh -V` says; None: not installed."""
    if pdsh is None:
        checks = [
            Check(
                "pdsh",
                FAIL,
                "not installed here",
                "install pdsh (apt-get install pdsh), which the deepspeed launcher uses; or --no_ssh on every node",
            )
        ]
    elif "ssh" not in pdsh.partition("rcmd modules:")[2].split("\n")[0]:
        checks = [
            Check(
                "pdsh",
                FAIL,
                "it has no ssh module",
                "install the package with pdsh's ssh module (pdsh-rcmd-ssh)",
            )
        ]
    else:
        checks = [Check("pdsh", OK, pdsh.split("\n")[0].split(" (")[0])]
    return [_troubles("ssh", answers, f"{names(answers)} let us in without a password"), *checks]


def judge_python(answers: dict[str, dict | Trouble]) -> Check:
    """Whether the interpreter, the folder and the package are there too."""
    answering = {
        node: answer
        for node, answer in answers.items()
        if not (isinstance(answer, Trouble) and answer.where == "ssh")
    }
    if not answering:
        return Check("python", SKIP, "no node can be asked")
    return _troubles("python", answering, f"the probe ran on {names(answering)}")


def _troubles(where: str, answers: dict[str, dict | Trouble], good: str) -> Check:
    found = {
        node: answer
        for node, answer in answers.items()
        if isinstance(answer, Trouble) and answer.where == where
    }
    if not found:
        return Check(where, OK, good)
    kinds = groups({node: trouble.what for node, trouble in found.items()})
    mends = [
        f"{found[nodes[0]].mend}{f'; the same for {names(nodes[1:])}' if len(nodes) > 1 else ''}"
        for nodes in kinds.values()
    ]
    return Check(
        where, FAIL, "; ".join(f"{names(nodes)}: {what}" for what, nodes in kinds.items()), "; ".join(mends)
    )


def broken(facts: Facts, part: str) -> list[str]:
    """ "node: what happened" of nodes where a part of the probe met something unforeseen."""
    return [
        f"{node}: {found[part]['error']}" for node, found in facts.items() if "error" in found.get(part, {})
    ]


def judge_versions(facts: Facts) -> Check:
    from packaging.requirements import Requirement

    if errors := broken(facts, "versions"):
        return Check(
            "versions",
            FAIL,
            "; ".join(errors),
            "run `python -c 'import torch'` there, and install what is missing: pip install dmae-ds",
        )
    found = {node: part["versions"]["found"] for node, part in facts.items()}
    texts, mends = [], []
    for name in EQUAL:
        values = {node: versions[name] for node, versions in found.items()}
        if len(set(values.values())) > 1:
            most, *others = groups(values).items()
            texts.append(f"{name} {by_value(values)}")
            package = f"{name}=={most[0]}" if name != "python" else f"Python {most[0]}"
            mends.append(f"install {package} on {names(node for _, nodes in others for node in nodes)}")
    for node, part in facts.items():
        for text in part["versions"]["asked"]:
            asked = Requirement(text)
            version = found[node].get(asked.name)
            if version is None or not asked.specifier.contains(version, prereleases=True):
                texts.append(
                    f"{node}: {asked.name} {version or 'is missing'}, {asked.specifier or 'any version'} is needed"
                )
                mends.append(f"pip install '{asked}' on {node}")
    if texts:
        return Check("versions", FAIL, "; ".join(texts), "; ".join(dict.fromkeys(mends)))
    first = next(iter(found.values()))
    return Check("versions", OK, ", ".join(f"{name} {first[name]}" for name in EQUAL))


def judge_code(facts: Facts) -> Check:
    """The same package, recipes and DeepSpeed files everywhere."""
    if errors := broken(facts, "code"):
        return Check("code", FAIL, "; ".join(errors), "install dmae-ds there again")
    found = {node: part["code"] for node, part in facts.items()}
    kinds = groups({node: tuple(sorted(code["files"].items())) for node, code in found.items()})
    if len(kinds) == 1:
        return Check(
            "code",
            OK,
            f"the same {len(next(iter(found.values()))['files'])} files: {by_value({node: code['folder'] for node, code in found.items()})}",
        )
    most, *others = kinds.items()
    texts = []
    for files, nodes in others:
        different = sorted({name for name, _ in set(files) ^ set(most[0])})
        texts.append(
            f"{names(nodes)} {'has' if len(nodes) == 1 else 'have'} other code than {names(most[1])}: {names(different)}"
        )
    wrong = [node for _, nodes in others for node in nodes]
    return Check(
        "code",
        FAIL,
        "; ".join(texts),
        f"install the same commit on {names(wrong)} ({found[wrong[0]]['folder']}), or run all nodes from one shared folder",
    )


def judge_devices(facts: Facts, asked: Asked) -> Check:
    if errors := broken(facts, "devices"):
        return Check("devices", FAIL, "; ".join(errors), "run `nvidia-smi` there")
    slots = {node.name: node.slots for node in asked.nodes}
    found = {node: part["devices"] for node, part in facts.items()}
    counts = {node: len(devices["gpus"]) for node, devices in found.items()}
    if not any(counts.values()):
        rooms = {
            node: f"{part['machine']['cores']} cores, {part['machine']['memory'] / GIB:.0f} GiB of memory free"
            for node, part in facts.items()
            if "cores" in part["machine"]
        }
        return Check("devices", OK, f"no GPU: on CPUs; {by_value(rooms)}")
    if short := [
        f"{node} has {count} GPUs for {slots[node]} slots"
        for node, count in counts.items()
        if count < slots[node]
    ]:
        return Check(
            "devices",
            FAIL,
            "; ".join(short),
            "put as many slots into the hostfile (--num_gpus) as there are GPUs; where some are not seen: nvidia-smi, CUDA_VISIBLE_DEVICES",
        )
    kinds = {
        node: f"{slots[node]} x {devices['gpus'][0]['name']}, driver {devices['driver']}"
        for node, devices in found.items()
    }
    full = [
        f"{node}: {gpu['free'] / GIB:.0f} of {gpu['total'] / GIB:.0f} GiB free on GPU {index}"
        + (f" (process {names(devices['processes'])})" if devices["processes"] else "")
        for node, devices in found.items()
        for index, gpu in enumerate(devices["gpus"][: slots[node]])
        if gpu["free"] < LEAST_FREE * gpu["total"]
    ]
    if full:
        return Check(
            "devices",
            WARN,
            f"{by_value(kinds)}; somebody uses them: {names(full)}",
            "end what runs there (nvidia-smi shows it), or leave those nodes out",
        )
    if len(set(kinds.values())) > 1:
        return Check(
            "devices",
            WARN,
            by_value(kinds),
            "the slowest GPU sets the pace, and other drivers may not talk over NCCL; take equal nodes",
        )
    return Check("devices", OK, by_value(kinds))


def judge_limits(facts: Facts, needs: dict, most_shards: int) -> Check:
    """Open files and shared memory, which the loader's workers need."""
    if errors := broken(facts, "machine"):
        return Check("limits", FAIL, "; ".join(errors), "look at that node")
    files = (
        2 * min(256, most_shards) + 256
    )  # tar and index of the shards that a worker keeps open (data/reader.py), and libraries
    found = {node: part["machine"] for node, part in facts.items()}
    if few := {
        node: limit["open_files"] for node, limit in found.items() if 0 <= limit["open_files"] < files
    }:
        return Check(
            "limits",
            FAIL,
            f"open files a process: {by_value(few)}; {files} are needed",
            "ulimit -n 65536 on those nodes (in /etc/security/limits.conf, or sshd's and slurmd's unit)",
        )
    batches = needs.get("batches_a_node", 0)
    small = {
        node: f"{limit['shm'] / 2**20:,.0f} MiB"
        for node, limit in found.items()
        if limit["shm"] is not None and limit["shm"] < batches
    }
    if small:
        return Check(
            "limits",
            FAIL,
            f"/dev/shm has {by_value(small)} free; batches under way take {batches / 2**20:,.0f} MiB a node",
            "enlarge it (docker: --shm-size, --ipc=host), or lower data.num_workers",
        )
    least = min((limit["shm"] for limit in found.values() if limit["shm"] is not None), default=0)
    return Check(
        "limits",
        OK,
        f"at least {min(limit['open_files'] for limit in found.values()):,} open files, {least / GIB:.1f} GiB in /dev/shm",
    )


def judge_clocks(skews: dict[str, tuple[float, float]]) -> Check:
    """skews: node -> (seconds ahead of this machine, how far that may be off)."""
    wrong = {node: skew for node, (skew, unsure) in skews.items() if abs(skew) - unsure > 1.0}
    if wrong:
        text = ", ".join(
            f"{node} is {abs(skew):.0f} s {'ahead' if skew > 0 else 'behind'}" for node, skew in wrong.items()
        )
        return Check(
            "clocks",
            WARN,
            text,
            f"logs and files will be out of order; run an NTP client (chrony) on {names(wrong)}",
        )
    worst = max((abs(skew) + unsure for skew, unsure in skews.values()), default=0.0)
    return Check("clocks", OK, f"within {max(worst, 0.1):.1f} s")
