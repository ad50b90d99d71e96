"""The architecture as checks: who may import whom, and what must not be loaded."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gptlab"
PROGRAMS = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
MAKES_NO_ARTIFACT = {"chat"}  # so it has flags in place of a config, and no run
PARTS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))
# Modules whose import loads TensorFlow, directly or by what they import.
TENSORFLOW = ("tensorflow", "seqio", "tensorflow_datasets", "clu", "flax.metrics")
USES_TENSORFLOW = {"prepare.py", "data/tasks.py"}


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=180
    )


def imported_modules(path):
    """Every module that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute here"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def test_the_import_contract_is_kept():
    run = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT, text=True, capture_output=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr


def test_there_is_something_to_check():
    assert "run" in PARTS and "data" in PARTS
    assert len(PARTS) >= 8


@pytest.mark.parametrize("kind", ["programs", "parts"])
def test_nothing_but_prepare_loads_tensorflow(kind):
    """One process imports all of a kind, as importing jax nine times takes half a minute."""
    if kind == "programs":
        modules = [f"gptlab.{name}" for name in PROGRAMS if name != "prepare"]
    else:
        files = [path for part in PARTS for path in (PACKAGE / part).glob("*.py")]
        modules = [
            f"gptlab.{path.parent.name}.{path.stem}"
            for path in files
            if path.relative_to(PACKAGE).as_posix() not in USES_TENSORFLOW
        ]
    code = f"""
import importlib, sys
for name in {modules!r}:
    importlib.import_module(name)
    if "tensorflow" in sys.modules:
        sys.exit(name + " loads TensorFlow")
"""
    run = run_python(code)
    assert run.returncode == 0, run.stderr[-2000:]


@pytest.mark.slow  # TensorFlow takes ten seconds to import, to show what a list of two files shows
def test_the_tensorflow_check_can_fail():
    pytest.importorskip("tensorflow")
    assert run_python("import seqio, sys; sys.exit('tensorflow' in sys.modules)").returncode == 1


def test_tensorflow_is_imported_in_two_files_only():
    """Imports inside functions too, which the check by importing would not see."""
    offenders = [
        f"{path.relative_to(ROOT)}: {module}"
        for path in PACKAGE.rglob("*.py")
        if path.relative_to(PACKAGE).as_posix() not in USES_TENSORFLOW
        for module in imported_modules(path)
        if any(module == name or module.startswith(name + ".") for name in TENSORFLOW)
    ]
    assert offenders == []


def test_subpackages_are_a_docstring_only():
    for part in PARTS:
        body = ast.parse((PACKAGE / part / "__init__.py").read_text()).body
        assert len(body) == 1 and isinstance(body[0], ast.Expr), f"gptlab/{part}/__init__.py"


def test_there_is_no_drawer():
    drawers = {"utils.py", "util.py", "helpers.py", "misc.py", "common.py"}
    assert [str(p) for p in PACKAGE.rglob("*.py") if p.name in drawers] == []


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_says_what_it_does_and_has_run(name):
    tree = ast.parse((PACKAGE / f"{name}.py").read_text())
    docstring = ast.get_docstring(tree) or ""
    assert f"python -m gptlab.{name}" in docstring, "its docstring must give its command"
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    if name in MAKES_NO_ARTIFACT:
        assert [argument.arg for argument in functions["main"].args.args] == ["argv"]
        return
    assert "run" in functions, "a program exposes run(config, workdir)"
    assert [argument.arg for argument in functions["run"].args.args][:2] == ["config", "workdir"]


def test_config_values_have_no_second_default():
    """`config.get('x', default)` would be a default outside of configs/."""
    offenders = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "get"
                and _is_config(node.func.value)
                and not (path.parent.name == "run" and path.name in ("artifact.py", "program.py"))
            ):
                offenders.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert offenders == []


def _is_config(node):
    """`config`, `config.data`, `run.config`, ..."""
    while isinstance(node, ast.Attribute):
        if node.attr == "config":
            return True
        node = node.value
    return isinstance(node, ast.Name) and node.id == "config"
