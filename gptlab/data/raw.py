"""Which raw files `prepare` depends on besides artifacts: what counts in its identity, by content.

Without TensorFlow, so that `rounds` knows the identity of a run before it starts one.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from ml_collections import ConfigDict

from gptlab.data import readers
from gptlab.run.errors import EXIT_USER_ERROR, UserError

Files = dict[str, dict[str, str]]  # input's name -> {file's name: where it is}, for open_run
_TFDS_DIR = "~/tensorflow_datasets"  # TFDS's own default
_LIST_TASKS = """
import json, sys
from gptlab.data import tasks
from gptlab.run.errors import EXIT_USER_ERROR, UserError
try:
    found = tasks.source_files(*json.loads(sys.argv[1]))
except UserError as error:
    print(error)
    sys.exit(EXIT_USER_ERROR)
print(json.dumps(found))
"""


def of_sources(
    sources: Iterable[readers.Source], tfds_dir: str | None, module: str | None
) -> Files:
    """The raw inputs of 'clean': documents, packages, TFDS data sets, and the user's module.

    A TFDS data set counts with all of its directory, or with that of the version it is named by.
    Raises UserError when it is not prepared on this machine.
    """
    found: dict[str, str] = {}
    for source in sources:
        if source.name.startswith("tfds:"):
            found[source.name] = str(_tfds_directory(source.name, tfds_dir))
        elif source.path is not None:
            found[source.key if source.name == "file" else source.name] = source.path
    return {"sources": found} | _module(module)


def of_tasks(config: ConfigDict) -> Files:
    """The raw inputs of 'tokenize': the user's module, and the files that its Tasks read.

    seqio knows the latter, so it is asked in a process of its own, unless there is no module.
    """
    if config.module is None:
        return {}
    named = {*config.tasks, *(task for rates in config.mixtures.values() for task in rates)}
    arguments = json.dumps([config.module, sorted(named - set(config.mixtures))])
    process = subprocess.run(
        [sys.executable, "-c", _LIST_TASKS, arguments],
        stdout=subprocess.PIPE, text=True, check=False,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "2", "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    lines = process.stdout.splitlines()
    if process.returncode == EXIT_USER_ERROR and lines:
        raise UserError(lines[-1])
    if process.returncode:
        raise UserError(
            f"config.module: importing {config.module!r} failed; see what it says above"
        )
    found = {"tasks": json.loads(lines[-1])} if lines[-1] != "{}" else {}
    return found | {f"tasks_{name}": paths for name, paths in _module(config.module).items()}


def _module(name: str | None) -> Files:
    """A module's file; of one in a package, all Python files of the package.

    Nothing if there is no such module: importing it says so.
    """
    if name is None:
        return {}
    look_here()
    try:
        spec = importlib.util.find_spec(name.split(".")[0])
    except ValueError:
        return {}
    found: dict[str, str] = {}
    for place in (spec and spec.submodule_search_locations) or []:
        base = Path(place).parent
        found |= {p.relative_to(base).as_posix(): str(p) for p in Path(place).rglob("*.py")}
    if not found and spec is not None and spec.has_location and spec.origin is not None:
        found[Path(spec.origin).name] = spec.origin
    return {"module": found} if found else {}


def look_here() -> None:
    """Lets modules be imported from the current directory, after all other places."""
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))


def _tfds_directory(source: str, tfds_dir: str | None) -> Path:
    """Where TFDS has a data set 'tfds:NAME[:VERSION][/SPLIT]'."""
    root = Path(tfds_dir or os.environ.get("TFDS_DATA_DIR") or _TFDS_DIR).expanduser()
    name, _, version = source.removeprefix("tfds:").partition("/")[0].partition(":")
    directory = root / name
    if not name or not directory.is_dir():
        raise UserError(
            f"config.data.sources: {source} is not prepared under config.data.tfds_dir={root}; "
            "prepare it first with download_and_prepare(): nothing is downloaded here"
        )
    # A data set has its versions below it, or below its configs.
    exact = [*directory.glob(version), *directory.glob(f"*/{version}")] if version else []
    return exact[0] if len(exact) == 1 else directory
