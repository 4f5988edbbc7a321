"""Every script in launch/ starts a run over two nodes, which is stopped or broken, and finishes it.

Slurm's srun and scontrol have stand-ins of a few lines of shell; of Kubernetes there is an environment
variable.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest
import yaml

from tests.multi_node.nodes import LIMIT_S, Process, TwoNodes, ssh_available
from tests.train.conftest import REPOSITORY, command, losses, run
from tests.train.test_resume import wait_for_step

LAUNCH = REPOSITORY / "launch"
TRAIN = ["bash", LAUNCH / "train.sh"]
# A run long enough to be stopped on the way.
STEPS = 60
LONGER = [
    f"optim.epochs={(STEPS - 0.5) * 64 / 1400}",
    "optim.global_batch=64",
    "student.embed_dim=128",
    "log.every_steps=1",
    "checkpoint.every_steps=10",
]
FINISHED, STOPPED = 0, 75


@pytest.fixture(scope="module")
def expected(tiny_recipe, tmp_path_factory) -> list[float]:
    """Losses of an undisturbed run on two ranks of one node."""
    folder = tmp_path_factory.mktemp("expected")
    done = run(command(["train", *tiny_recipe, *LONGER, f"run.dir={folder / 'run'}"], ranks=2), cwd=folder)
    assert done.returncode == 0, done.stderr
    return losses(folder / "run")


@pytest.fixture
def recipe(tiny_recipe, tmp_path) -> list[str]:
    return [*tiny_recipe, *LONGER, f"run.dir={tmp_path / 'run'}"]


def start(nodes: TwoNodes, commands: list[list], **more: str) -> list[Process]:
    """Start one command on each node, in the root of the repository; output goes to NODE.log."""
    started = []
    for rank, (node, words) in enumerate(zip(nodes.nodes, commands, strict=False)):
        with open(nodes.folder / f"{node.name}.log", "ab") as log:
            env = {"NODE_RANK": str(rank), "JOB_COMPLETION_INDEX": str(rank), "MASTER_ADDR": "node-a", **more}
            cwd = nodes.folder if "HOSTFILE" in more else REPOSITORY
            started.append(node.popen(words, env=env, stdout=log, stderr=log, cwd=cwd))
    return started


def logs(nodes: TwoNodes) -> str:
    return "\n".join(log.read_text() for log in sorted(nodes.folder.glob("*.log")))


def wait_for_end(nodes: TwoNodes, started: list[Process], codes: set[int]) -> None:
    """Wait until all have ended, each with one of these codes, and check that no process is left."""
    exit_codes = [process.wait(LIMIT_S) for process in started]
    assert set(exit_codes) <= codes, f"exit codes {exit_codes}\n{logs(nodes)}"
    end = time.monotonic() + 60
    while any(node.processes() for node in nodes.nodes):
        assert time.monotonic() < end, [node.processes() for node in nodes.nodes]
        time.sleep(0.1)


def same_losses(nodes: TwoNodes, expected: list[float]) -> None:
    measured = losses(nodes.folder / "run")
    assert len(measured) == STEPS and measured == expected, logs(nodes)  # as many ranks: to the last bit


@pytest.mark.parametrize(
    "path", [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"], ids=lambda path: path.name
)
def test_the_scripts_parse(path):
    subprocess.run(["bash", "-n", path], check=True)


def test_train_sh_names_what_is_missing(tmp_path):
    for more, words in (
        ({}, "recipe"),
        ({"LAUNCHER": "no_ssh"}, "NODE_RANK"),
        ({"LAUNCHER": "mpi"}, "one_node, pdsh, no_ssh, torchrun"),
    ):
        done = subprocess.run(
            [*TRAIN, *(["digits_mae"] if more else [])],
            env={**os.environ, **more},
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert done.returncode == 2 and words in done.stderr


def test_the_kubernetes_job_fits_together():
    service, job = yaml.safe_load_all((LAUNCH / "k8s-job.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    name = job["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert environment["MASTER_ADDR"] == f"{name}-0.{pod['subdomain']}"
    assert spec["completions"] == spec["parallelism"] == int(environment["NODES"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(environment["GPUS"])
    rules = spec["podFailurePolicy"]["rules"][:2]
    codes = {rule["action"]: rule["onExitCodes"]["values"] for rule in rules}
    assert codes == {"FailJob": [2], "Ignore": [STOPPED]}
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.slow
def test_the_command_of_the_kubernetes_container(nodes, recipe, expected):
    _, job = yaml.safe_load_all((LAUNCH / "k8s-job.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    environment |= {"GPUS": "1", "MASTER_ADDR": "node-a"}
    pods = start(nodes, [[*container["command"], *recipe]] * 2, **environment)
    wait_for_step(nodes.folder / "run", 15, pods[0], nodes.folder / "node-a.log")
    pods[1].send_signal(signal.SIGTERM)  # a node is drained: the kubelet signals process 1 of its pod
    wait_for_end(nodes, pods, {STOPPED})
    wait_for_end(nodes, start(nodes, [[*container["command"], *recipe]] * 2, **environment), {FINISHED})
    same_losses(nodes, expected)
    # A pod that is started again after the run has finished does not wait for the others.
    wait_for_end(nodes, start(nodes, [[*container["command"], *recipe]], **environment), {FINISHED})


@pytest.mark.slow
def test_pdsh_stopped_and_continued(nodes, recipe, expected):
    if reason := ssh_available():
        pytest.skip(f"NOT RUN OVER SSH: {reason}")
    options = {"HOSTFILE": str(nodes.hostfile), "NODE_RANK": ""}
    (job,) = start(nodes, [[*TRAIN, *recipe]], **options)
    wait_for_step(nodes.folder / "run", 15, job, nodes.folder / "node-a.log")
    job.send_signal(signal.SIGTERM)
    wait_for_end(nodes, [job], {STOPPED})
    wait_for_end(nodes, start(nodes, [[*TRAIN, *recipe]], **options), {FINISHED})
    same_losses(nodes, expected)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["deepspeed.launcher.launch", "--local_rank"])
def test_a_broken_run_is_restarted(nodes, recipe, expected, victim):
    # DeepSpeed ends with 0 when its launch.py was killed.
    options = {"LAUNCHER": "no_ssh", "HOSTFILE": str(nodes.hostfile), "RESTARTS": "2"}
    jobs = start(nodes, [[*TRAIN, *recipe, "dist.timeout_s=30"]] * 2, **options)
    wait_for_step(nodes.folder / "run", 15, jobs[0], nodes.folder / "node-a.log")
    os.kill(next(pid for pid, line in nodes.b.processes().items() if victim in line), signal.SIGKILL)
    wait_for_end(nodes, jobs, {FINISHED})
    assert "restart 1 of 2" in (nodes.folder / "node-b.log").read_text()
    same_losses(nodes, expected)


@pytest.mark.slow
def test_torchrun_restarts_the_ranks(nodes, recipe, expected):
    options = {"LAUNCHER": "torchrun", "NODES": "2", "GPUS": "1", "NODE_RANK": ""}
    jobs = start(nodes, [[*TRAIN, *recipe]] * 2, **options, RESTARTS="2")
    wait_for_step(nodes.folder / "run", 15, jobs[0], nodes.folder / "node-a.log")
    lines = nodes.b.processes()
    rank = next(pid for pid, line in lines.items() if "-m dmae_ds" in line and "--rdzv_id" not in line)
    os.kill(rank, signal.SIGKILL)
    wait_for_step(nodes.folder / "run", 30, jobs[0], nodes.folder / "node-a.log")
    jobs[0].send_signal(signal.SIGTERM)
    wait_for_end(nodes, jobs, {STOPPED, 1})
    wait_for_end(nodes, start(nodes, [[*TRAIN, *recipe]] * 2, **options), {FINISHED})
    same_losses(nodes, expected)


@pytest.mark.slow
def test_accelerate(nodes, recipe, expected):
    base = ["accelerate", "launch", "--config_file", LAUNCH / "accelerate.yaml"]
    base += ["--num_machines", "2", "--num_processes", "2", "--main_process_ip", "node-a"]
    words = [[*base, "--machine_rank", str(rank), "-m", "dmae_ds", "train", *recipe] for rank in range(2)]
    wait_for_end(nodes, start(nodes, words), {FINISHED})
    same_losses(nodes, expected)


SRUN = """#!/usr/bin/env bash
# Stand-in: runs one task on each node, in its namespaces; returns the highest exit code.
while [[ $1 == --* ]]; do shift; done
codes=()
for node in 0 1; do
    pid=NODE_$node
    SLURM_NODEID=$node nsenter --target "${!pid}" --net --pid --mount --uts --ipc env -C "$PWD" "$@" &
    tasks[$node]=$!
done
highest=0
for task in "${tasks[@]}"; do wait "$task"; code=$?; [ $code -le $highest ] || highest=$code; done
exit $highest
"""
SCONTROL = """#!/usr/bin/env bash
case $1 in
show) printf 'node-a\\nnode-b\\n' ;;
requeue) echo "$2" >>"$REQUEUED" ;;
esac
"""


@pytest.mark.slow
def test_the_time_limit_of_slurm_and_the_requeue(nodes, recipe, expected):
    programs = nodes.folder / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    requeued = nodes.folder / "requeued"
    environment = {
        **os.environ,
        **nodes.environment,
        "PATH": f"{programs}:{nodes.environment['PATH']}",
        "REQUEUED": str(requeued),
        "NODE_0": str(nodes.a.pid),
        "NODE_1": str(nodes.b.pid),
        "SLURM_JOB_ID": "17",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
    }

    def submit(restarts: int) -> subprocess.Popen:
        with open(nodes.folder / "slurm.log", "ab") as log:
            return subprocess.Popen(
                ["bash", LAUNCH / "slurm.sbatch", *recipe],
                env={**environment, "SLURM_RESTART_COUNT": str(restarts)},
                stdout=log,
                stderr=log,
                cwd=REPOSITORY,
            )

    job = submit(0)
    wait_for_step(nodes.folder / "run", 15, job, nodes.folder / "slurm.log")
    for node in nodes.nodes:  # Slurm signals the first process of each task
        task = next(pid for pid, line in node.processes().items() if "launch/train.sh" in line)
        os.kill(task, signal.SIGUSR1)
    assert job.wait(LIMIT_S) == 0, logs(nodes)
    assert requeued.read_text() == "17\n" and "exit code 75" in logs(nodes)
    assert 15 <= len(losses(nodes.folder / "run")) < STEPS
    job = submit(1)
    assert job.wait(LIMIT_S) == 0, logs(nodes)
    assert requeued.read_text() == "17\n"
    same_losses(nodes, expected)
