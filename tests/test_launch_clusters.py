"""launch/tpu.sh, slurm.sh, gpu.sh and worker.sh, with recorded stand-ins of what they call."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAKE = ROOT / "tests" / "fake_command.py"
QUEUED = "gcloud compute tpus queued-resources"
WHERE = "--zone=us-east5-a --quiet"
OPTIONS = ("--zone=us-east5-a", "--type=v5p-128", "--runtime=v2-alpha-tpuv5", "--spot")
PROGRAM = ("gptlab.sft", "--config=configs/sft.py", "--workdir=gs://b/sft", "--config.note=it's on")
QUOTED = r"gptlab.sft --config=configs/sft.py --workdir=gs://b/sft --config.note=it\'s\ on"

DESCRIBE = f"{QUEUED} describe llama --format=value(state.state) {WHERE}"
NODE = f"gcloud compute tpus tpu-vm describe llama --format=value(state) {WHERE}"
CREATE = (
    f"{QUEUED} create llama --accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5 "
    f"--node-id=llama --spot --async {WHERE}"
)
DELETE = f"{QUEUED} delete llama --force {WHERE}"
SSH = f"{QUEUED} ssh llama --node=all --worker=all --command="
INSTALL = (
    f"{SSH}mkdir -p gptlab && tar -xzf gptlab.tgz -C gptlab && "
    f"bash gptlab/launch/worker.sh install {WHERE}"
)
START = f"{SSH}GPTLAB_COMMIT=COMMIT bash gptlab/launch/worker.sh start {QUOTED}  {WHERE}"
CODE = f"{SSH}bash gptlab/launch/worker.sh code {WHERE}"
COPY = f"{QUEUED} scp CODE llama:gptlab.tgz --node=all --worker=all {WHERE}"

NOT_FOUND = {"err": "ERROR: (gcloud) NOT_FOUND: Resource llama was not found\n", "code": 1}
BUSY = {"err": "ERROR: (gcloud) UNAVAILABLE: try again\n", "code": 1}


def states(*names):
    return ["queued-resources describe", [n if isinstance(n, dict) else {"out": n} for n in names]]


def nodes(*names):
    return ["tpu-vm describe", [n if isinstance(n, dict) else {"out": n} for n in names]]


def codes(*answers):
    """What worker.sh says on two hosts, answer by answer."""
    said = ["".join(f"gptlab-code {code}\n" for code in a.split()) for a in answers]
    return ["worker.sh code", [{"out": out} for out in said]]


@pytest.fixture
def launch(tmp_path):
    """A checkout with the scripts, commands that are recorded, and a runner of scripts."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    # What it would install is tested in test_launch.py.
    (tmp_path / "launch" / "environment.sh").write_text(
        'cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1\n'
        'echo "extras ${GPTLAB_EXTRAS:-}" >> "$FAKE_CALLS"\n'
    )
    for line in ("init -q", "add launch", "-c user.name=a -c user.email=a@b commit -qm first"):
        subprocess.run(["git", *line.split()], cwd=tmp_path, check=True, timeout=60)
    (tmp_path / "bin").mkdir()
    (tmp_path / "gptlab").mkdir()
    (tmp_path / "gptlab" / "sft.py").touch()

    def run(script, *arguments, scenario=(), commands=("gcloud",), **more):
        for name in commands:
            fake = tmp_path / "bin" / name
            fake.write_text(f'#!/bin/sh\nexec {sys.executable} -IS {FAKE} {name} "$@"\n')
            fake.chmod(0o755)
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        (tmp_path / "scenario.json").write_text(json.dumps(scenario))
        environment = os.environ | {
            "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
            "FAKE_CALLS": str(calls),
            "FAKE_SCENARIO": str(tmp_path / "scenario.json"),
            "GPTLAB_POLL_SECONDS": "0",
            "GPTLAB_RUN_STATE": str(tmp_path / "state"),
        }
        done = subprocess.run(
            ["bash", f"launch/{script}", *arguments],
            cwd=tmp_path, env=environment | more, text=True, capture_output=True, timeout=250,
        )  # fmt: skip
        lines = calls.read_text().splitlines() if calls.exists() else []
        lines = [re.sub(r"GPTLAB_COMMIT=[0-9a-f]{40}\S*", "GPTLAB_COMMIT=COMMIT", x) for x in lines]
        lines = [re.sub(r"scp \S+ ", "scp CODE ", x) for x in lines]
        return done.returncode, lines, done.stderr

    return run


def test_a_preempted_slice_is_created_anew_and_runs_the_same_command_again(launch):
    code, calls, err = launch(
        "tpu.sh", "run", "llama", *OPTIONS, "--", *PROGRAM,
        scenario=[
            # Requested, granted; gone while the program runs; requested and granted again.
            states(
                NOT_FOUND, "WAITING_FOR_RESOURCES", "ACTIVE", "ACTIVE", "SUSPENDING",
                "SUSPENDED", "SUSPENDED", NOT_FOUND, "PROVISIONING", "ACTIVE",
            ),
            nodes("READY"),
            codes("running running", "0 0"),
        ],
    )  # fmt: skip
    assert code == 0, err
    assert calls == [
        DESCRIBE, CREATE, DESCRIBE, DESCRIBE, NODE, COPY, INSTALL, START,
        DESCRIBE, NODE, CODE,  # running
        DESCRIBE,  # SUSPENDING: the slice is being taken away
        DESCRIBE, DESCRIBE, DELETE,
        DESCRIBE, CREATE, DESCRIBE, DESCRIBE, NODE, COPY, INSTALL, START,
        DESCRIBE, NODE, CODE,
    ]  # fmt: skip


def test_a_host_that_was_preempted_counts_whatever_the_request_says(launch):
    code, calls, err = launch(
        "tpu.sh", "run", "llama", *OPTIONS, "--", *PROGRAM,
        scenario=[
            states("ACTIVE", "ACTIVE", "ACTIVE", "ACTIVE", NOT_FOUND, "ACTIVE"),
            nodes("READY", "PREEMPTED", "PREEMPTED", "PREEMPTED", "READY"),
            codes("0 0"),
        ],
    )  # fmt: skip
    assert code == 0, err
    assert calls.count(DELETE) == calls.count(CREATE) == 1 and calls.count(START) == 2


def test_a_slice_that_is_lost_while_it_is_set_up_is_created_anew(launch):
    code, calls, err = launch(
        "tpu.sh", "run", "llama", *OPTIONS, "--", *PROGRAM,
        scenario=[
            states("ACTIVE", "SUSPENDED", "SUSPENDED", "SUSPENDED", NOT_FOUND, "ACTIVE"),
            nodes("READY"),
            ["worker.sh install", [*[BUSY] * 5, {}]],
            codes("0"),
        ],
    )  # fmt: skip
    assert code == 0, err
    assert calls.count(INSTALL) == 6 and calls.count(CREATE) == 1 and calls.count(START) == 1


def test_what_is_there_is_not_created_again(launch):
    code, calls, _ = launch(
        "tpu.sh", "create", "llama", *OPTIONS, scenario=[states("ACTIVE"), nodes("READY")]
    )
    assert (code, calls) == (0, [DESCRIBE, NODE])
    code, calls, _ = launch("tpu.sh", "delete", "llama", OPTIONS[0], scenario=[states(NOT_FOUND)])
    assert (code, calls) == (0, [DESCRIBE])
    code, calls, _ = launch("tpu.sh", "delete", "llama", OPTIONS[0], scenario=[states("FAILED")])
    assert (code, calls) == (0, [DESCRIBE, DELETE])


def test_several_slices_and_a_project(launch):
    options = [*OPTIONS[:3], "--slices=2", "--project=p"]
    code, calls, err = launch(
        "tpu.sh", "create", "llama", *options,
        scenario=[states(NOT_FOUND, "ACTIVE"), nodes("READY")],
    )  # fmt: skip
    assert code == 0, err
    where = "--zone=us-east5-a --project=p --quiet"
    assert calls[1] == (
        f"{QUEUED} create llama --accelerator-type=v5p-128 --runtime-version=v2-alpha-tpuv5 "
        f"--node-count=2 --node-prefix=llama --async {where}"
    )
    assert calls[3:] == [
        f"gcloud compute tpus tpu-vm describe llama-{i} --format=value(state) {where}"
        for i in range(2)
    ]


def test_a_request_that_fails_says_so_and_an_old_one_is_cleared_away(launch):
    code, calls, err = launch(
        "tpu.sh", "create", "llama", *OPTIONS,
        scenario=[states("FAILED", "FAILED", NOT_FOUND, "CREATING", "FAILED")],
    )  # fmt: skip
    assert code == 1 and calls.count(DELETE) == calls.count(CREATE) == 1
    assert err.splitlines() == [
        "launch/tpu.sh: the request for llama failed; gcloud compute tpus queued-resources "
        "describe llama --zone=us-east5-a says why"
    ]


def test_a_command_that_fails_is_tried_again_unless_that_is_vain(launch):
    code, calls, _ = launch(
        "tpu.sh",
        "create",
        "llama",
        *OPTIONS,
        scenario=[states(BUSY, BUSY, "ACTIVE"), nodes("READY")],
    )
    assert (code, calls) == (0, [DESCRIBE] * 3 + [NODE])
    code, calls, err = launch("tpu.sh", "create", "llama", *OPTIONS, scenario=[states(BUSY)])
    assert (code, calls) == (1, [DESCRIBE] * 5)
    busy = "launch/tpu.sh: gcloud: ERROR: (gcloud) UNAVAILABLE: try again"
    assert err.splitlines() == [f"{busy}; again in 0 s"] * 4 + [busy]
    denied = {"err": "ERROR: (gcloud) PERMISSION_DENIED: no\n", "code": 1}
    code, calls, err = launch("tpu.sh", "create", "llama", *OPTIONS, scenario=[states(denied)])
    assert (code, calls) == (1, [DESCRIBE])
    assert err == "launch/tpu.sh: gcloud: ERROR: (gcloud) PERMISSION_DENIED: no\n"


@pytest.mark.parametrize(
    "said, hint",
    [
        ("You do not currently have an active account selected.", "Run: gcloud auth login"),
        ("The required property [project] is not currently set.", "Give --project=P."),
    ],
)
def test_a_gcloud_that_is_not_set_up_is_not_asked_again(launch, said, hint):
    refused = {"err": f"ERROR: (gcloud) {said}\nMore of it.\n", "code": 1}
    code, calls, err = launch("tpu.sh", "create", "llama", *OPTIONS, scenario=[states(refused)])
    assert (code, calls) == (1, [DESCRIBE])
    assert err == f"launch/tpu.sh: gcloud: ERROR: (gcloud) {said} {hint}\n"


def test_no_gcloud_is_one_line(launch, tmp_path):
    (tmp_path / "few").mkdir()
    for name in ("bash", "dirname"):  # the machine that tests may have a gcloud of its own
        (tmp_path / "few" / name).symlink_to(shutil.which(name))
    code, _, err = launch("tpu.sh", "stop", "llama", OPTIONS[0], PATH=str(tmp_path / "few"))
    assert code == 2
    assert err == "launch/tpu.sh: there is no gcloud here; install the Google Cloud CLI\n"


@pytest.mark.parametrize(
    "ends, starts, code",
    [
        (["0 0"], 1, 0),
        (["running 0", "0 0"], 1, 0),
        (["2 2"], 1, 2),
        (["running 137", "75 137", "0 0"], 2, 0),
        (["75 75", "lost 0", "0 0"], 3, 0),
        (["1 75"], 1, 1),
        (["stopped stopped"], 1, 75),
        (["", "0 0"], 1, 0),  # nobody answers, once
    ],
)
def test_what_the_hosts_say_decides_how_it_goes_on(launch, ends, starts, code):
    words = "gptlab sft: config.inputs.tokens is not set"
    ended, calls, err = launch(
        "tpu.sh", "run", "llama", *OPTIONS, "--", *PROGRAM,
        scenario=[
            states("ACTIVE"), nodes("READY"), codes(*ends), ["grep", [{"out": f"{words}\n"}]],
        ],
    )  # fmt: skip
    assert ended == code, err
    assert calls.count(START) == starts and CREATE not in calls and DELETE not in calls
    assert (words in err) == (code in (1, 2))


def test_a_program_that_is_killed_again_and_again_is_given_up(launch):
    code, calls, err = launch(
        "tpu.sh", "run", "llama", *OPTIONS, "--", *PROGRAM,
        scenario=[states("ACTIVE"), nodes("READY"), codes("139 75")],
    )  # fmt: skip
    assert code == 1 and calls.count(START) == 11
    assert err.startswith("launch/tpu.sh: gptlab.sft was killed 11 times")


def test_stop_and_logs(launch):
    code, calls, _ = launch("tpu.sh", "stop", "llama", OPTIONS[0])
    assert (code, calls) == (0, [f"{SSH}bash gptlab/launch/worker.sh stop {WHERE}"])
    _, calls, _ = launch("tpu.sh", "logs", "llama", OPTIONS[0], "--node=1", "--worker=3")
    command = "--command=bash gptlab/launch/worker.sh log"
    assert calls == [f"{QUEUED} ssh llama --node=1 --worker=3 {command} {WHERE}"]


RUN = ["tpu.sh", "run", "llama", *OPTIONS]


@pytest.mark.parametrize(
    "line, words",
    [
        (["tpu.sh"], "say what to do"),
        (["tpu.sh", "crate", "llama"], "say what to do"),
        (["tpu.sh", "create"], "name the slice"),
        (["tpu.sh", "create", "llama", "--type=v5p-8", "--runtime=r"], "--zone=ZONE is missing"),
        (["tpu.sh", "create", "llama", "--zone=z"], "needs --type=TYPE"),
        (["tpu.sh", "create", "llama", "--zon=z"], "no option --zon=z"),
        (["tpu.sh", "create", "llama", *OPTIONS, "--slices=0"], "--slices=0 is no number"),
        (["tpu.sh", "stop", "llama", "--zone=z", "--", "gptlab.sft"], "stop takes no program"),
        ([*RUN, "gptlab.sft"], "write -- between"),
        ([*RUN, "--", "--workdir=gs://b/c"], "name a program"),
        ([*RUN, "--", "gptlab.sft", "--workdir=runs/sft"], "write --workdir=gs://BUCKET/DIR"),
        ([*RUN, "--", "gptlab.sfx", "--workdir=gs://b/c"], "no program gptlab.sfx (gptlab/sfx.py"),
        (["slurm.sh", "--", "gptlab.sfx"], "no program gptlab.sfx"),
        (["gpu.sh", "gptlab.sfx"], "no program gptlab.sfx"),
        (["local.sh", "--processes=2", "gptlab.sfx"], "no program gptlab.sfx"),
        (["worker.sh", "start"], "start PROGRAM"),
        (["slurm.sh", "--nodes=2"], "write -- between"),
        (["slurm.sh", "--", "--config=x"], "name a program"),
        (["gpu.sh"], "name a program"),
        (["gpu.sh", "gptlab.sft"], "nvidia-smi finds no GPU"),
        (["local.sh", "gptlab.sft"], "--processes=N is missing"),
        (["local.sh", "--processes=none", "gptlab.sft"], "--processes=none is no number"),
        (["local.sh", "--processes=0", "gptlab.sft"], "--processes=0 is no number"),
        (["local.sh", "--processes", "2", "gptlab.sft"], "values follow an ="),
        (["local.sh", "--processes=2"], "name a program"),
        (["local.sh", "--process=2", "gptlab.sft"], "no option --process=2"),
    ],
)
def test_misuse_is_one_line_and_exit_code_2(launch, line, words):
    code, calls, err = launch(*line)
    assert (code, calls) == (2, [])
    assert len(err.splitlines()) == 1 and err.startswith(f"launch/{line[0]}: ")
    assert words in err


@pytest.mark.parametrize("script", ["tpu.sh", "slurm.sh", "gpu.sh", "local.sh"])
def test_help_is_the_head_of_the_script(launch, script, tmp_path):
    done = subprocess.run(
        ["bash", f"launch/{script}", "--help"], cwd=tmp_path, text=True, capture_output=True,
        timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert f"bash launch/{script}" in done.stdout and "set -e" not in done.stdout


SBATCH = (
    "sbatch --job-name=gptlab.sft --requeue --signal=TERM@120 --open-mode=append "
    "--output=runs/slurm/%j.log {} launch/slurm.sh "
)


def test_a_slurm_job_is_submitted_with_what_it_needs_to_go_on(launch):
    for options in (["--nodes=2", "--ntasks-per-node=8"], ["--nodes", "2", "--ntasks-per-node=8"]):
        code, calls, err = launch("slurm.sh", *options, "--", *PROGRAM, commands=["sbatch"])
        assert code == 0, err
        assert calls == ["extras cuda,cloud", SBATCH.format(" ".join(options)) + " ".join(PROGRAM)]


@pytest.mark.parametrize(
    "ends, restarts, queued",
    [
        (0, 0, False),
        (2, 0, False),
        (1, 0, False),
        (75, 300, True),
        (137, 0, True),
        (137, 10, False),
    ],
)
def test_a_slurm_job_is_queued_again_if_the_same_command_would_go_on(
    launch, tmp_path, ends, restarts, queued
):
    code, calls, _ = launch(
        "slurm.sh", *PROGRAM, commands=["srun", "scontrol"],
        scenario=[["srun", [{"code": ends}]]],
        GPTLAB_CHECKOUT=str(tmp_path), SLURM_JOB_ID="17", SLURM_RESTART_COUNT=str(restarts),
    )  # fmt: skip
    assert code == ends
    srun = "srun --kill-on-bad-exit=0 --wait=60 python -m " + " ".join(PROGRAM)
    assert calls[1:] == [srun, *["scontrol requeue 17"] * queued]


def test_a_gpu_node_runs_the_program_in_one_process(launch):
    code, calls, err = launch("gpu.sh", *PROGRAM, commands=["nvidia-smi", "python"])
    assert code == 0, err
    assert calls == ["nvidia-smi -L", "extras cuda,cloud", "python -m " + " ".join(PROGRAM)]


STAGE = """
import os, signal, sys, time
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
print("started", sys.argv[1:], os.environ["GPTLAB_COORDINATOR"], flush=True)
for _ in range(600):
    if stop:
        time.sleep(0.5)
        sys.exit(75)
    if os.path.exists("end"):
        sys.exit(int(open("end").read()))
    time.sleep(0.05)
"""


def test_worker_runs_one_program_that_outlives_its_ssh(launch, tmp_path):
    (tmp_path / "stage.py").write_text(STAGE)
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    state = tmp_path / "state"

    def worker(*arguments):
        return subprocess.run(
            ["bash", "launch/worker.sh", *arguments], cwd=tmp_path, text=True,
            capture_output=True, timeout=60, check=True,
            env=os.environ | {
                "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
                "GPTLAB_RUN_STATE": str(state),
                "FAKE_CALLS": str(tmp_path / "calls"),
            },
        ).stdout  # fmt: skip

    def wait_for(word, seconds=60):
        deadline = time.monotonic() + seconds
        while worker("code") != f"gptlab-code {word}\n":
            assert time.monotonic() < deadline, worker("code")
            time.sleep(0.05)

    def wait_for_start(number, seconds=60):
        deadline = time.monotonic() + seconds
        while (state / "log").read_text().count("started ['--flag=a b'] auto") < number:
            assert time.monotonic() < deadline, (state / "log").read_text()
            time.sleep(0.05)

    assert worker("code") == "gptlab-code lost\n"
    worker("start", "stage", "--flag=a b")
    assert worker("code") == "gptlab-code running\n"
    assert worker("start", "stage", "--flag=a b") == "is running already\n"
    wait_for_start(1)
    worker("stop")
    assert worker("code") == "gptlab-code running\n"  # it saves
    wait_for("stopped")
    assert (state / "code").read_text() == "75\n"
    (tmp_path / "end").write_text("3")
    worker("start", "stage", "--flag=a b")
    wait_for("3")
    wait_for_start(2)
    assert "extras tpu,cloud" in (tmp_path / "calls").read_text()
    (tmp_path / "end").unlink()
    worker("start", "stage", "--flag=a b")
    wait_for_start(3)  # in a group of its own
    os.killpg(int((state / "pid").read_text()), signal.SIGKILL)  # as a reboot does
    wait_for("lost")
    worker("stop")
    assert worker("code") == "gptlab-code stopped\n"  # whoever asked for that wants no restart
