"""launch/local.sh with real processes of a program in miniature (tests/run/demo_program.py).

tests/test_loops.py has the same with a training loop, killed and resumed bit for bit.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gptlab.run import artifact

ROOT = Path(__file__).parents[1]


@pytest.fixture
def started(tmp_path):
    """Starts processes that count for minutes; waits until all are at it."""
    running = []

    def start(*flags, steps=3000, processes=2):
        process = subprocess.Popen(
            [
                "bash", str(ROOT / "launch" / "local.sh"), f"--processes={processes}",
                "tests.run.demo_program", "--config=tests/run/demo_config.py",
                f"--workdir={tmp_path / 'run'}", f"--config.num_steps={steps}",
                "--config.seconds_per_step=0.1", *flags,
            ],
            env=os.environ | {
                "GPTLAB_VENV": "none", "GPTLAB_LOST_AFTER_SECONDS": "15",
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            },
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        running.append(process)
        return process

    yield start
    for process in running:
        for child in children(process.pid).values():
            os.kill(child, signal.SIGKILL)
        process.kill()
        process.communicate()


def children(launcher):
    """{number: process id} of the programs that a local.sh has started and that are still there."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((place / "stat").read_text().rsplit(")", 1)[1].split()[1])
            own = (place / "environ").read_bytes().split(b"\0")
            line = (place / "cmdline").read_bytes()
        except (OSError, IndexError):
            continue
        number = [v.split(b"=")[1] for v in own if v.startswith(b"GPTLAB_PROCESS_ID=")]
        if parent == launcher and number and b"demo_program" in line:
            found[int(number[0])] = int(place.name)
    return found


def wait_for_steps(process, tmp_path, count=5):
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 280
    while not (metrics.exists() and metrics.read_text().count("\n") >= count):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)


def test_when_a_process_is_killed_the_others_name_it_and_stop(started, tmp_path):
    process = started(processes=3)
    wait_for_steps(process, tmp_path, 40)  # four seconds: the phase comes with a beat
    os.kill(children(process.pid)[1], signal.SIGKILL)
    began = time.monotonic()
    _, err = process.communicate(timeout=200)
    assert time.monotonic() - began < 60
    assert process.returncode == 75, err
    for line in (
        r"launch/local.sh: process 1 of 3 was killed by SIGKILL",
        r"\[1\] gptlab demo: process 1 of 3 \(.*\) was killed in phase '(step|other)'; ",
        *(
            rf"{prefix}gptlab demo: process 1 of 3 \(.*\) was lost in phase '(step|other)', "
            rf"process {number} stops in phase '(step|other)'; the same command goes on"
            for number, prefix in ((0, ""), (2, r"\[2\] "))
        ),
    ):
        assert re.search(f"^{line}", err, re.M), err
    assert "Traceback" not in err
    assert artifact.read_manifest(tmp_path / "run", allow_unfinished=True)["status"] == "running"


def test_sigterm_reaches_all_processes_and_they_stop_at_one_step(started, tmp_path):
    process = started()
    wait_for_steps(process, tmp_path)
    process.terminate()
    _, err = process.communicate(timeout=200)
    assert process.returncode == 75, err
    said = re.findall(r"stopped and saved at step (\d+); the same command goes on", err)
    assert len(said) == 2 and len(set(said)) == 1
    assert "killed" not in err and "lost" not in err


def test_an_error_of_all_is_its_exit_code(started):
    process = started("--config.fail.step=2", "--config.fail.kind=user", steps=3)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 2, err
    assert "gptlab demo: step 2: the sky fell" in err
