"""Programs as a user meets them: real processes, their last line and their exit code."""

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gptlab.run import artifact, program
from gptlab.run.errors import UserError
from gptlab.run.metrics import read_metrics

ROOT = Path(__file__).parents[2]
CONFIG = "tests/run/demo_config.py"


def start(*arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-m", "tests.run.demo_program", *map(str, arguments)],
        cwd=ROOT, env=os.environ | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(process, timeout=60):
    """(exit code, stdout, stderr)"""
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, out, err


def test_none_empties_a_key_that_may_be_empty(tmp_path):
    arguments = (f"--config={CONFIG}", f"--workdir={tmp_path}/run")
    given = ("--config.optional.clip_norm", "None", "--config.total_tokens=None")
    code, _, err = finish(start(*arguments, *given, "--config.total_tokens=5"))
    assert code == 0, err
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["optional"] == {"clip_norm": None}
    assert config["total_tokens"] == 5  # the last word counts


def wait_for_step(workdir, step, timeout=40):
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        path = Path(workdir) / "metrics.jsonl"
        if path.exists() and path.read_bytes().count(b"\n") >= step:
            return
        time.sleep(0.02)
    raise TimeoutError(f"{workdir} did not get to step {step}")


def test_runs_and_then_does_nothing_twice(tmp_path):
    arguments = (f"--config={CONFIG}", f"--workdir={tmp_path}/run")
    code, out, err = finish(start(*arguments))
    assert (code, out) == (0, ""), err
    manifest = artifact.read_manifest(tmp_path / "run")
    assert manifest["status"] == "done"
    assert manifest["results"] == {"last": 1 / 3}
    assert CONFIG in manifest["starts"][0]["command"]
    before = (tmp_path / "run" / "manifest.json").read_bytes()

    code, out, err = finish(start(*arguments))
    assert (code, out) == (0, "already done\n"), err
    assert (tmp_path / "run" / "manifest.json").read_bytes() == before


MISTAKES = [
    ([], "--config is missing; give --config=configs/FILE.py"),
    (["--config=tests/run/demo_confg.py"], "Did you mean tests/run/demo_config.py?"),
    ([f"--config={CONFIG}"], "--workdir is missing; give --workdir=DIR, where"),
    (
        [f"--config={CONFIG}", "--workdir=x", "--config.optimizer.rl=1"],
        "--config.optimizer.rl: tests/run/demo_config.py has no such key. "
        "Did you mean --config.optimizer.lr?",
    ),
    ([f"--config={CONFIG}", "--workdir=x", "--config.lr=1"], "Did you mean --config.optimizer.lr?"),
    (
        [f"--config={CONFIG}", "--workdir=x", "--config.seed=1e3"],
        "--config.seed=1e3: invalid literal for int() with base 10: '1e3'",
    ),
    (
        [f"--config={CONFIG}", "--workdir=x", "--config.num_steps=None"],
        "--config.num_steps=None: this key must have a value",
    ),
    (
        [f"--config={CONFIG}", "--workdir=x", "--config.num_steps", "None"],
        "--config.num_steps=None: this key must have a value",
    ),
    ([f"--config={CONFIG}", "--workdr=x"], "no flag --workdr. Did you mean --workdir?"),
    ([f"--config={CONFIG}", "--workdir=x", "seed=1"], "'seed=1' is no flag; write --config."),
    (["--config.seed=1", f"--config={CONFIG}", "--workdir=x"], "before a value for --config was"),
    (
        [f"--config={CONFIG}:quick", "--workdir=x"],
        "demo_config.py:8: ValueError: unknown argument 'quick'; there is 'slow'",
    ),
]
# Importing JAX takes seconds, so one process does it and forks one for each command line.
FORKING = """
import json, os, sys
from gptlab.run import program
from tests.run import demo_program

for arguments in json.loads(sys.argv[1]):
    read, write = os.pipe()
    if os.fork() == 0:
        os.dup2(write, 1)
        os.dup2(write, 2)
        sys.argv = ["demo_program", *arguments]
        try:
            program.main(demo_program.run, "demo")
        except SystemExit as end:
            sys.stderr.flush()
            os._exit(end.code)
    os.close(write)
    output = os.fdopen(read).read()
    print(json.dumps([os.waitstatus_to_exitcode(os.wait()[1]), output]))
"""


@pytest.fixture(scope="module")
def answers():
    lines = json.dumps([arguments for arguments, _ in MISTAKES])
    done = subprocess.run(
        [sys.executable, "-c", FORKING, lines],
        cwd=ROOT, text=True, capture_output=True, timeout=60, check=True,
    )  # fmt: skip
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("number", range(len(MISTAKES)))
def test_a_mistake_on_the_command_line_is_answered_in_one_line(answers, number):
    code, output = answers[number]
    assert code == 2, output
    assert output.startswith("gptlab demo: ") and output.count("\n") == 1
    assert MISTAKES[number][1] in output


@pytest.mark.parametrize(
    ("kind", "code", "line"),
    [
        ("user", 2, "gptlab demo: step 2: the sky fell"),
        ("disk", 2, "gptlab demo: the disk is full; free some space and run the same command"),
        ("asks", 2, "gptlab demo: the config has no key model (demo_program.py:"),
        ("defect", 1, "gptlab demo: failed: ZeroDivisionError: no such luck"),
    ],
)
def test_exit_codes_of_failures(tmp_path, kind, code, line):
    process = start(
        f"--config={CONFIG}", f"--workdir={tmp_path}",
        "--config.fail.step=2", f"--config.fail.kind={kind}",
    )  # fmt: skip
    got, _, err = finish(process)
    last = err.splitlines()[-1]
    assert got == code, err
    assert last.startswith(line)
    assert ("Traceback" in err) == (kind == "defect")
    manifest = artifact.read_manifest(tmp_path, allow_unfinished=True)
    assert manifest["status"] == "failed" and manifest["error"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_interrupts_with_code_75_and_the_run_goes_on(tmp_path, number):
    arguments = (f"--config={CONFIG}:slow", f"--workdir={tmp_path}")
    process = start(*arguments)
    wait_for_step(tmp_path, 3)
    process.send_signal(number)
    code, _, err = finish(process)
    assert code == 75, err
    assert "stopped and saved at step" in err.splitlines()[-1]
    assert artifact.read_manifest(tmp_path, allow_unfinished=True)["status"] == "interrupted"
    stopped_at = read_metrics(tmp_path)[-1]["step"]

    again = start(*arguments)
    wait_for_step(tmp_path, stopped_at + 3)
    again.kill()
    again.communicate()
    steps = [entry["step"] for entry in read_metrics(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))
    manifest = artifact.read_manifest(tmp_path, allow_unfinished=True)
    assert manifest["status"] == "running"  # SIGKILL leaves no chance to say otherwise
    assert len(manifest["starts"]) == 2


def test_a_second_signal_ends_the_process_at_once(tmp_path):
    process = start(
        f"--config={CONFIG}:slow", f"--workdir={tmp_path}", "--config.seconds_per_step=30.0"
    )
    wait_for_file(tmp_path / "config.json")
    time.sleep(1.0)  # the handlers are installed a moment after that
    process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process, timeout=10)
    assert code == -signal.SIGTERM
    assert "send it again to stop at once" in err


def wait_for_file(path, timeout=40):
    deadline = time.monotonic() + timeout
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


def test_one_request_delivered_twice_is_one_request(tmp_path):
    process = start(f"--config={CONFIG}:slow", f"--workdir={tmp_path}")
    wait_for_step(tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    code, _, err = finish(process)
    assert code == 75, err


def test_of_two_processes_the_first_writes_and_both_stop_at_one_step(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    both = [
        start(
            f"--config={CONFIG}:slow", f"--workdir={tmp_path}",
            GPTLAB_COORDINATOR=f"127.0.0.1:{port}", GPTLAB_NUM_PROCESSES="2",
            GPTLAB_PROCESS_ID=str(i),
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        wait_for_step(tmp_path, 3)
        both[1].send_signal(signal.SIGTERM)
        ends = [finish(process) for process in both]
    finally:
        for process in both:
            process.kill()
    assert [code for code, _, _ in ends] == [75, 75], ends
    last = [err.rsplit("stopped and saved at step ", 1)[1] for _, _, err in ends]
    assert last[0] == last[1]
    steps = [entry["step"] for entry in read_metrics(tmp_path)]
    assert steps == list(range(1, len(steps) + 1))  # each once: only one process wrote
    manifest = artifact.read_manifest(tmp_path, allow_unfinished=True)
    assert manifest["status"] == "interrupted"
    assert manifest["starts"][0]["processes"] == 2


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({}, "needs whole numbers in GPTLAB_NUM_PROCESSES"),
        ({"GPTLAB_NUM_PROCESSES": "2", "GPTLAB_PROCESS_ID": "2"}, "must lie in [0, 2)"),
    ],
)
def test_an_incomplete_cluster_environment_is_refused(tmp_path, environment, message):
    code, _, err = finish(
        start(
            f"--config={CONFIG}", f"--workdir={tmp_path}",
            GPTLAB_COORDINATOR="127.0.0.1:1", **environment,
        )
    )  # fmt: skip
    assert code == 2
    assert message in err


def test_help_shows_the_module_docstring():
    code, out, _ = finish(start("--help"))
    assert "A stage in miniature" in out
    assert "Traceback" not in out


def test_load_config_is_locked_and_takes_the_argument():
    config = program.load_config(f"{CONFIG}:slow")
    assert config.num_steps == 2000
    with pytest.raises(AttributeError):
        config.nmu_steps = 1
    with pytest.raises(UserError, match="no file"):
        program.load_config("tests/run/nothing.py")


def test_compiled_programs_are_kept_between_processes(tmp_path):
    code = """
import jax, jax.numpy as jnp
from gptlab.run import program
program.enable_compilation_cache()
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.jit(lambda x: jnp.tanh(x) @ x)(jnp.ones((8, 8))).block_until_ready()
print(any(event == "/jax/compilation_cache/cache_hits" for event in hits))
"""
    seen = [
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT, env=os.environ | {"GPTLAB_CACHE": str(tmp_path)},
            text=True, capture_output=True, timeout=60, check=True,
        ).stdout.strip()
        for _ in range(2)
    ]  # fmt: skip
    assert seen == ["False", "True"]
    assert any(tmp_path.iterdir())


HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc"
    or (HUGE_PAGES.exists() and "[always]" in HUGE_PAGES.read_text()),
    reason="needs glibc, and pages of 4 KiB to count",
)
@pytest.mark.slow
@pytest.mark.parametrize("accelerators, kept", [((), True), (("null",), False)])
def test_temporary_memory_is_not_fetched_anew_in_every_call(accelerators, kept):
    """Where there are device files of accelerators it is: on tens of thousands of pages of 4 KiB.

    Else only the first calls may, until the heap has room at every place where one is put.
    """
    code = f"""
import resource, statistics
from gptlab.run import program
program._ACCELERATORS = {accelerators}
program.keep_freed_memory()
import jax, jax.numpy as jnp
def large(x):  # 128 MiB between two products
    y = jnp.broadcast_to(x, (2**15, 1024)) @ jnp.eye(1024)
    return (y @ jnp.ones((1024, 1))).sum()
call = jax.jit(large)
faults = []
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    call(jnp.ones(1024)).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(int(statistics.median(faults)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, text=True, capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    assert (int(done.stdout) < 2000) == kept, done.stdout
