"""The command line that every program shares, and how every program ends.

Exit codes: 0 done, 1 a defect (with a traceback), 2 a user's mistake (one line), 75 interrupted
after saving what can be saved: the same command goes on, 130 ended by Ctrl-C at once (before a run
is open, or by a second one).
"""

import ctypes
import difflib
import functools
import glob
import importlib.util
import itertools
import operator
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, FieldReference, config_flags

from gptlab.run import files, processes
from gptlab.run.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, Interrupted, UserError

# One arena; nothing mapped by itself; nothing given back below 2 GiB. glibc's environment variables
# with their numbers in malloc.h and their values.
KEPT_MEMORY = {
    "MALLOC_ARENA_MAX": (-8, 1),
    "MALLOC_MMAP_MAX_": (-4, 0),
    "MALLOC_TRIM_THRESHOLD_": (-1, 2**31 - 1),
}
_ACCELERATORS = ("accel*", "vfio/[0-9]*", "nvidia[0-9]*", "kfd")  # device files of TPUs and GPUs

RunFn = Callable[..., object]


def main(
    run_fn: RunFn,
    stage: str,
    own_flags: Mapping[str, tuple[bool | None, str]] | None = None,
    needs_workdir: bool = True,
) -> NoReturn:
    """Parses the command line and calls `run_fn(config, workdir, **own flags)`.

    Flags: --config=FILE.py[:arg], --config.KEY=VALUE (a key that the file doesn't have is an
    error; None empties one that may be empty), --workdir=DIR. The compilation cache is in
    $GPTLAB_CACHE (~/.cache/gptlab/xla).

    Args:
      run_fn: what the program does.
      stage: its name.
      own_flags: flags of this program alone: (False for a switch, None for a text; help).
      needs_workdir: without --workdir `run_fn` gets None, where that is allowed.
    """
    config = config_flags.DEFINE_config_file(
        "config", None, "The experiment: FILE.py or FILE.py:argument.", lock_config=True
    )
    workdir = flags.DEFINE_string("workdir", None, "Where everything the run makes goes.")
    own: dict[str, flags.FlagHolder[Any]] = {}
    for name, (default, text) in (own_flags or {}).items():
        if default is None:
            own[name] = flags.DEFINE_string(name, None, text)
        else:
            own[name] = flags.DEFINE_bool(name, default, text)

    def parse(argv: Sequence[str]) -> Sequence[str]:
        with _exit_codes(stage):
            return _parse(argv, ("config", "workdir", *own), needs_workdir)

    def start(argv: Sequence[str]) -> None:
        with _exit_codes(stage):
            if not flags.FLAGS["verbosity"].present:  # absl makes it INFO then
                # Orbax tells of every file that it writes; --verbosity=0 shows that.
                logging.set_verbosity(logging.WARNING)
            keep_freed_memory()
            enable_compilation_cache()
            processes.initialize(stage)
            run_fn(config.value, workdir.value, **{name: flag.value for name, flag in own.items()})
            processes.leave(0)

    app.run(start, flags_parser=parse)
    raise AssertionError("app.run exits")


def enable_compilation_cache() -> None:
    """Keeps compiled programs between processes: a second start compiles nothing anew."""
    directory = os.environ.get("GPTLAB_CACHE") or Path.home() / ".cache" / "gptlab" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def keep_freed_memory() -> None:
    """Has glibc keep what is freed, on hosts without an accelerator.

    XLA's CPU backend allocates the temporary memory of a program anew in every call. glibc returns
    hundreds of megabytes to the system each time, and gets them back page by page, each cleared:
    a fifth of a training step of the quickstart. Must come before JAX starts its threads, which
    choose their arenas once; arenas other than the main one can't hold 64 MiB.
    """
    if sys.platform != "linux" or any(glob.glob(f"/dev/{name}") for name in _ACCELERATORS):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        for option, value in KEPT_MEMORY.values():
            mallopt(option, value)


def give_back_freed_memory() -> None:
    """Has glibc give back to the system what is freed, also between blocks that are in use.

    For programs whose memory is the limit, as blocks of other sizes don't fit into the gaps.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
    if trim is not None:
        trim(0)


class _exit_codes:  # noqa: N801  (used as a function)
    """Ends the program with one line and the exit code that the exception stands for."""

    def __init__(self, stage: str):
        self._stage = stage

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        if error is None or isinstance(error, SystemExit):
            return
        if isinstance(error, Interrupted):
            self._exit(EXIT_INTERRUPTED, f"{error or 'interrupted'}; the same command goes on")
        if isinstance(error, KeyboardInterrupt):
            self._exit(130, "stopped")
        if isinstance(error, UserError):
            self._exit(EXIT_USER_ERROR, str(error))
        if (line := files.explain(error) or _missing_config_key(error)) is not None:
            self._exit(EXIT_USER_ERROR, line)
        processes.blame()
        traceback.print_exception(error)
        self._exit(1, f"failed: {type(error).__name__}: {_first_line(error)}")

    def _exit(self, code: int, line: str) -> NoReturn:
        sys.stdout.flush()
        print(f"gptlab {self._stage}: {line}", file=sys.stderr, flush=True)
        processes.leave(code, line)
        sys.exit(code)


def load_config(path: str) -> ConfigDict:
    """The locked config of 'FILE.py' or 'FILE.py:argument'.

    Raises UserError naming the line in the file, if loading it fails.
    """
    config = call_config(path, "get_config")
    config.lock()
    return config


def call_config(path: str, function: str, *otherwise: Callable[..., Any]) -> Any:
    """What a function of the config file 'FILE.py:argument' (or `otherwise`) makes of the argument.

    Raises UserError naming the line in the file, if it fails or there is none.
    """
    name, *argument = path.split(":", 1)
    file = Path(name)
    if not file.is_file():
        near = _nearest(file.name, (p.name for p in file.parent.glob("*.py")))
        hint = f". Did you mean {file.parent / near}?" if near else ""
        raise UserError(f"--config={path}: there is no file {file}{hint}")
    spec = importlib.util.spec_from_file_location("gptlab_config", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return getattr(module, function, *otherwise)(*argument)
    except Exception as error:
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if Path(frame.filename).resolve() == file.resolve()
        ]
        line = f":{frames[-1].lineno}" if frames else ""
        raise UserError(
            f"--config={path}: {file}{line}: {type(error).__name__}: {error}"
        ) from error


def config_path() -> str:
    """What this program's --config says: FILE.py or FILE.py:argument."""
    path = _flag_value(sys.argv, "config")
    assert path is not None  # `_parse` has seen to it
    return path


def given_keys() -> list[str]:
    """The keys, with dots, that this program's command line sets."""
    return _overridden_keys(sys.argv)


def _parse(argv: Sequence[str], known_flags: Sequence[str], needs_workdir: bool) -> Sequence[str]:
    """Parses the command line into absl's FLAGS; every mistake is a UserError."""
    if any(arg.lstrip("-") in ("help", "helpfull", "helpshort") for arg in argv[1:]):
        return flags.FLAGS(argv)
    path = _flag_value(argv, "config")
    if not path:
        raise UserError("--config is missing; give --config=configs/FILE.py")
    config = load_config(path)
    known = _keys(config)
    for key in _overridden_keys(argv):
        if key not in known:
            near = _nearest_key(key, known)
            hint = f". Did you mean --config.{near}?" if near else f"; there are: {_top(known)}"
            raise UserError(f"--config.{key}: {path} has no such key{hint}")
    emptied, argv = _emptied_keys(argv, config)
    try:
        rest = flags.FLAGS(argv)
        for key in emptied:
            flags.FLAGS.config.update_from_flattened_dict({key: None})
    except flags.UnrecognizedFlagError as error:
        near = _nearest(error.flagname, (*known_flags, "help"))
        listed = f"--{', --'.join(known_flags[:-1])} and --{known_flags[-1]}"
        hint = f". Did you mean --{near}?" if near else f"; there are {listed}"
        raise UserError(f"there is no flag --{error.flagname}{hint}") from error
    except (flags.Error, ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(str(error)) from error
    if rest[1:]:
        raise UserError(f"{rest[1]!r} is no flag; write --config.KEY=VALUE or --workdir=DIR")
    if needs_workdir and not flags.FLAGS["workdir"].value:
        raise UserError("--workdir is missing; give --workdir=DIR, where the run puts everything")
    return rest


def _flag_value(argv: Sequence[str], name: str) -> str | None:
    """The value of --name=value or --name value, before anything is parsed."""
    for arg, following in itertools.zip_longest(argv[1:], argv[2:]):
        flag, equals, value = arg.partition("=")
        if flag in (f"-{name}", f"--{name}"):
            return value if equals else following
    return None


def _emptied_keys(argv: Sequence[str], config: ConfigDict) -> tuple[list[str], list[str]]:
    """(keys that --config.KEY=None empties, the other arguments): no flag takes None itself.

    Only what the config file makes a placeholder may be empty.
    """
    emptied: list[str] = []
    others: list[str] = []
    following = iter([*argv[1:], ""])
    skip = False
    for arg in argv:
        then = next(following)
        if skip:  # the None of the argument before
            skip = False
            continue
        match = re.fullmatch(r"--?config\.([^=]+)(=None)?", arg)
        if match is None or not (match[2] or then == "None"):
            others.append(arg)
            emptied = [key for key in emptied if key not in _overridden_keys(["", arg])]
            continue
        skip = not match[2]
        if match[1] not in may_be_empty(config):
            raise UserError(f"--config.{match[1]}=None: this key must have a value")
        emptied.append(match[1])
    return emptied, others


def may_be_empty(config: ConfigDict) -> dict[str, type]:
    """The keys (with dots) of a config that may be None, and the type of their values."""
    found: dict[str, type] = {}
    for key, held in config.items(preserve_field_references=True):
        if isinstance(held, FieldReference):
            found[key] = held.get_type()
        elif isinstance(held, ConfigDict):
            found |= {f"{key}.{inner}": kind for inner, kind in may_be_empty(held).items()}
    return found


def with_placeholders(values: dict[str, Any], optional: Mapping[str, type]) -> ConfigDict:
    """A config of these (nested) values, whose `optional` keys (with dots) may be None."""
    config = ConfigDict(values)
    for key, kind in optional.items():
        *front, leaf = key.split(".")
        subtree = functools.reduce(operator.getitem, front, config)
        value = subtree[leaf]
        del subtree[leaf]  # or it would stay the plain value that it is
        subtree[leaf] = FieldReference(value, field_type=kind)
    return config


def _overridden_keys(argv: Sequence[str]) -> list[str]:
    matches = (re.match(r"--?(?:no)?config\.([^=]+)", arg) for arg in argv[1:])
    return [match.group(1) for match in matches if match]


def _keys(config: ConfigDict, prefix: str = "") -> list[str]:
    """Every key with dots, subtrees included: optimizer, optimizer.lr, ..."""
    found = []
    for key in config:
        found.append(prefix + key)
        if config.get_type(key) is ConfigDict:
            found += _keys(config[key], f"{prefix}{key}.")
    return found


def _nearest_key(key: str, known: Sequence[str]) -> str | None:
    """The most similar full key; else a key that ends alike (--config.lr for optimizer.lr)."""
    if near := _nearest(key, known):
        return near
    leaves = {other.rsplit(".", 1)[-1]: other for other in reversed(known)}
    near = _nearest(key.rsplit(".", 1)[-1], leaves)
    return leaves[near] if near else None


def _nearest(word: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, list(known), n=1, cutoff=0.7)), None)


def _top(known: Sequence[str]) -> str:
    return ", ".join(key for key in known if "." not in key)


def _missing_config_key(error: BaseException) -> str | None:
    """One line if a program asked its config for a key that it doesn't have, else None.

    That is what a config of another stage looks like.
    """
    frames = traceback.extract_tb(error.__traceback__)
    if not isinstance(error, AttributeError | KeyError) or not frames:
        return None
    if not frames[-1].filename.endswith("config_dict.py"):
        return None
    asked = next(f for f in reversed(frames) if not f.filename.endswith("config_dict.py"))
    message = _first_line(error).strip("'\"\\").split("\\n")[0]
    return (
        f"the config has no key {message} ({Path(asked.filename).name}:{asked.lineno}: "
        f"{asked.line}); is it the config of another stage?"
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")
