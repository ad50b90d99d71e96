"""Durable training state: Orbax checkpoints, asynchronous and atomic, one directory a step.

`<workdir>/checkpoints/<step>/` holds one Orbax item for each part of the state (`params`,
`opt_state`, and whatever else a loop has), so that a later stage reads the parameters without the
optimiser, and `meta` (JSON: schema version, step, metrics and what the loop adds). A directory
appears under its final name only when everything in it is written.
"""

import json
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gptlab.model import lora
from gptlab.run import artifact, files, processes, storage
from gptlab.run.errors import UserError
from gptlab.run.metrics import MetricWriter
from gptlab.train import state as state_lib
from gptlab.train.state import TrainState

SCHEMA_VERSION = 1
DIRECTORY = "checkpoints"
_SET_ASIDE = "checkpoints.corrupt"
_COMMITTED = "commit_success.txt"  # Orbax's mark of a finished checkpoint in a bucket
# Where memory matters, a file is this part of the largest array, or so many bytes if that is more.
_FILES_OF_LARGEST, _SMALLEST_FILE_BYTES = 64, 4 << 20
_DAMAGE_CODES = (
    "DATA_LOSS",
    "NOT_FOUND",
    "OUT_OF_RANGE",
    "INVALID_ARGUMENT",
    "FAILED_PRECONDITION",
)


class Damaged(UserError):
    """Checkpoint `step` is not what was written, and `reason` tells by which sign."""

    def __init__(self, workdir: epath.PathLike, step: int, reason: str):
        path = epath.Path(workdir) / DIRECTORY / str(step)
        super().__init__(f"{path}: this checkpoint is damaged ({reason})")
        self.step, self.reason = step, reason


class Checkpoints:
    """The checkpoints of one run. Close it (or use `with`): a save goes on in the background."""

    def __init__(
        self,
        workdir: epath.PathLike,
        config: ConfigDict,
        metrics: MetricWriter | None = None,
        write_bytes: int | None = None,
    ):
        """Opens them.

        Args:
            workdir: of the run.
            config: every_steps, keep (newest), best_metric (None = none), best_mode min | max.
            metrics: of a loop that logs.
            write_bytes: how much of `params` is being written at once, at least its largest array;
                None where memory is no matter.
        """
        self._workdir = epath.Path(workdir)
        self._metrics = metrics
        self._write_bytes = write_bytes
        self._config = config
        self._policy = _LatestAndBest(config.keep, config.best_metric, config.best_mode)
        for step in checkpoint_steps(workdir):
            try:
                self._policy.metrics[step] = read_meta(workdir, step)["metrics"]
            except UserError as error:  # a restore will say so, and set the checkpoint aside
                logging.warning("%s", error)
        self._manager = self._open()

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy, cleanup_tmp_directories=True
        )
        directory = self._workdir / DIRECTORY
        directory.mkdir(parents=True, exist_ok=True)
        handlers = None
        if self._write_bytes is not None:
            handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
            gigabytes: Any = (self._write_bytes + 1000) / 10**9  # declared int, used as it is
            pytree = ocp.PyTreeCheckpointHandler(save_concurrent_gb=gigabytes)
            handlers.add("params", ocp.args.PyTreeSave, pytree)
            handlers.add("meta", ocp.args.JsonSave, ocp.JsonCheckpointHandler())
        return ocp.CheckpointManager(directory, options=options, handler_registry=handlers)

    def due(self, step: int) -> bool:
        """Whether the config wants a checkpoint after this step."""
        return step % self._config.every_steps == 0

    def save(
        self,
        step: int,
        items: Mapping[str, Any],
        meta: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts saving in the background; waits first for a save that is still going on.

        What was logged so far is where it stays before the checkpoint is: a run that goes on from
        there logs what comes after.

        Args:
            step: number of the checkpoint; one that exists already is left as it is.
            items: name -> pytree of arrays.
            meta: JSON values to be handed back by a restore.
            metrics: what `best_metric` is looked up in.

        Raises:
            UserError: the disk is full (in this save or, found out now, in the one before).
        """
        args = {name: self._item_args(item) for name, item in items.items()}
        values = {name: float(value) for name, value in (metrics or {}).items()}
        record = {"schema": SCHEMA_VERSION, "step": step, "metrics": values, **meta}
        composite = ocp.args.Composite(meta=ocp.args.JsonSave(record), **args)

        if self._metrics is not None:
            self._metrics.flush()

        def start() -> None:
            self._manager.wait_until_finished()
            if step not in self._manager.all_steps():
                self._policy.metrics[step] = values
                self._manager.save(step, args=composite, force=True)

        self._disk(start)

    def _item_args(self, item: Any) -> ocp.args.CheckpointArgs:
        """How a pytree is written; what is on the disk is read alike.

        A file is compressed in memory before it is written, by default one for each array.
        """
        if self._write_bytes is None:
            return ocp.args.StandardSave(item)
        size = max(_SMALLEST_FILE_BYTES, self._write_bytes // _FILES_OF_LARGEST)
        return ocp.args.PyTreeSave(item, ocdbt_target_data_file_size=size)

    def save_state(
        self,
        state: TrainState,
        meta: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Saves a TrainState under its own step, as the items `params` and `opt_state`."""
        items = {"params": state.params, "opt_state": state.opt_state}
        self.save(int(state.step), items, meta, metrics)

    def restore_state(
        self, state: TrainState, shardings: TrainState
    ) -> tuple[TrainState, dict[str, Any] | None]:
        """What save_state saved last, and its meta; the given state and None if there is nothing.

        Args:
          state: as initialised. Its memory is freed when there is a checkpoint to read.
          shardings: of the state, on any mesh.
        """
        restored = self.restore_over(
            {"params": state.params, "opt_state": state.opt_state},
            {"params": shardings.params, "opt_state": shardings.opt_state},
        )
        if restored is None:
            return state, None
        step, items, meta = restored
        step_array = jax.device_put(np.asarray(step, np.int32), shardings.step)
        return TrainState(step_array, items["params"], items["opt_state"]), meta

    def wait(self) -> None:
        """Returns when everything is on disk. Raises UserError when the disk is full."""
        self._disk(self._manager.wait_until_finished)

    def close(self) -> None:
        """Waits, and frees Orbax's threads."""
        self._disk(self._manager.close)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.close()
            return
        try:  # what is being written may be worth keeping, but `error` is the one to tell
            self._manager.close()
        except Exception as second:
            logging.warning("closing checkpoints: %s", second)

    def restore_over(
        self, items: Mapping[str, Any], shardings: Mapping[str, Any]
    ) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """restore_latest of what looks like `items`; frees these first if there is a checkpoint.

        Args:
          items: name -> pytree of arrays, as initialised.
          shardings: name -> pytree of shardings of the restored arrays, on any mesh.
        """
        if not self._manager.all_steps():
            return None
        wanted = {name: state_lib.abstract(items[name], shardings[name]) for name in items}
        jax.tree.map(lambda x: x.delete(), dict(items))  # or both would have to fit
        return self.restore_latest(wanted)

    def restore_latest(
        self, abstract_items: Mapping[str, Any]
    ) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
        """The newest checkpoint that can be read, or None if there is none at all.

        A damaged checkpoint is passed over for the one before it. Once one has been read, those
        are reported and set aside in `checkpoints.corrupt/`: not earlier, and not for an error
        that says nothing of the checkpoint (memory, rights, a failing disk), which is raised.

        Args:
            abstract_items: name -> pytree of ShapeDtypeStruct with shardings (any mesh).

        Returns:
            (step, items, meta).

        Raises:
            UserError: checkpoints exist, but none can be read; or gptlab is too old for one.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                restored = self._read(step, abstract_items)
            except Exception as error:
                if not _is_damage(error):
                    raise
                damaged[step] = _first_line(error)
                continue
            self._set_all_aside(damaged)
            return restored
        if damaged:
            raise self._none_left(damaged)
        return None

    def load_best(self, mesh: Mesh, init_fn: Callable[[jax.Array], Any]) -> Any:
        """load_params of this run's own best checkpoint, to be called at its end.

        A damaged one is passed over for the next best, reported and set aside as by restore_latest;
        then that one is the best for whoever asks.

        Raises:
            UserError: none can be read.
        """
        damaged: dict[int, str] = {}
        while True:
            try:
                params = _load(self._workdir, mesh, init_fn, "best", "params", damaged)
            except Damaged as error:
                damaged[error.step] = error.reason
                if len(damaged) == len(checkpoint_steps(self._workdir)):
                    raise self._none_left(damaged) from error
                continue
            self._set_all_aside(damaged)
            return params

    def _read(
        self, step: int, abstract_items: Mapping[str, Any]
    ) -> tuple[int, dict[str, Any], dict[str, Any]]:
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        meta = self._manager.restore(step, args=args).meta
        _check_schema(meta, self._workdir)
        wanted = {name: ocp.args.StandardRestore(item) for name, item in abstract_items.items()}
        items = self._manager.restore(step, args=ocp.args.Composite(**wanted))
        return step, {name: items[name] for name in abstract_items}, meta

    def _none_left(self, damaged: Mapping[int, str]) -> UserError:
        return UserError(
            f"{self._workdir}: none of the checkpoints {sorted(damaged)} can be read "
            f"({damaged[max(damaged)]}). Start again with an empty --workdir"
        )

    def _set_all_aside(self, damaged: Mapping[int, str]) -> None:
        for step, why in damaged.items():
            processes.say(f"checkpoint {step} of {self._workdir} cannot be read ({why})")
            self._set_aside(step)

    def _set_aside(self, step: int) -> None:
        """Renames a bad checkpoint, so that the step can be saved again and nothing is deleted."""
        self._manager.close()
        processes.barrier(f"set aside checkpoint {step}")
        if processes.is_first():
            target = self._workdir / _SET_ASIDE
            target.mkdir(exist_ok=True)
            number = len(list(target.iterdir())) if target.exists() else 0
            storage.move(self._workdir / DIRECTORY / str(step), target / f"{step}.{number}")
        processes.barrier(f"checkpoint {step} is set aside")
        self._manager = self._open()

    def _disk(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            message = files.explain(error, self._workdir / DIRECTORY)
            if message is None:
                raise
            raise UserError(message) from error


class _LatestAndBest:
    """Orbax preservation policy: the newest `keep` checkpoints and the best one by a metric."""

    def __init__(self, keep: int, metric: str | None, mode: str):
        if keep < 1:
            raise UserError(f"config.checkpoint.keep={keep} must be at least 1")
        if mode not in ("min", "max"):
            raise UserError(f"config.checkpoint.best_mode={mode!r} must be 'min' or 'max'")
        self._keep, self._metric, self._mode = keep, metric, mode
        self.metrics: dict[int, Mapping[str, float]] = {}

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        metrics = {info.step: self.metrics.get(info.step, {}) for info in checkpoints}
        best = best_step(metrics, self._metric, self._mode) if self._metric else None
        newest = {info.step for info in checkpoints[-self._keep :]}
        return [info.step in newest or info.step == best for info in checkpoints]


def best_step(metrics: Mapping[int, Mapping[str, float]], name: str, mode: str) -> int | None:
    """The step with the smallest (largest) metric, the earliest of equals; None if no step has it.

    NaN is never best.
    """
    sign = {"min": 1.0, "max": -1.0}[mode]
    values = {s: sign * m[name] for s, m in metrics.items() if name in m}
    values = {step: value for step, value in values.items() if value == value}
    return min(sorted(values), key=values.__getitem__) if values else None


def checkpoint_steps(workdir: epath.PathLike) -> list[int]:
    """The finished checkpoints of a workdir, ascending."""
    directory = epath.Path(workdir) / DIRECTORY
    if not directory.exists():
        return []
    found = [path for path in directory.iterdir() if path.name.isdigit()]
    if storage.in_bucket(directory):  # where Orbax can't rename one when it is finished
        found = [path for path in found if (path / _COMMITTED).exists()]
    return sorted(int(path.name) for path in found)


def read_meta(workdir: epath.PathLike, step: int) -> dict[str, Any]:
    """The `meta` of one checkpoint; `Damaged` if it cannot be read."""
    path = epath.Path(workdir) / DIRECTORY / str(step) / "meta" / "metadata"
    try:
        meta = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        if not _is_damage(error):
            raise
        raise Damaged(workdir, step, _first_line(error)) from error
    _check_schema(meta, epath.Path(workdir))
    return meta


def find_step(workdir: epath.PathLike, which: str, passed_over: Container[int] = ()) -> int:
    """The step of the 'best' or 'latest' checkpoint of a workdir, those `passed_over` left out.

    'best' follows the best_metric of that run's own config, and means the latest where it has none.
    """
    if which not in ("best", "latest"):
        raise UserError(f"which checkpoint? {which!r} is unknown: use 'best' or 'latest'")
    steps = [step for step in checkpoint_steps(workdir) if step not in passed_over]
    if not steps:
        raise UserError(f"{workdir}: there is no checkpoint here; has this run finished?")
    config = _read_config(workdir)["checkpoint"]
    if which == "best" and config["best_metric"]:
        metrics = {step: read_meta(workdir, step)["metrics"] for step in steps}
        best = best_step(metrics, config["best_metric"], config["best_mode"])
        if best is not None:
            return best
    return steps[-1]


def best_metrics(workdir: epath.PathLike) -> dict[str, Any]:
    """{best/step, best/<name> of each eval/<name> that was saved with the best checkpoint}."""
    step = find_step(workdir, "best")
    metrics = read_meta(workdir, step)["metrics"]
    return {"best/step": step} | {
        f"best/{name.removeprefix('eval/')}": value for name, value in metrics.items()
    }


def load_params(
    workdir: epath.PathLike,
    mesh: Mesh,
    init_fn: Callable[[jax.Array], Any],
    which: str = "best",
    item: str = "params",
) -> Any:
    """The parameters of a finished stage, laid out on this stage's mesh. Nothing else is read.

    Adapters (config.lora) are merged into what they adapt: whoever reads a model gets a whole one.

    Args:
        workdir: of the run that trained them.
        mesh: any mesh; not necessarily the one they were trained on.
        init_fn: key -> parameters of the model they belong to (only its shapes are used).
        which: 'best' (by that run's best_metric) or 'latest'.
        item: their name in the checkpoint.

    Raises:
        UserError: no checkpoint, a damaged one, or one of another model.
    """
    try:
        return _load(workdir, mesh, init_fn, which, item)
    except Damaged as error:  # its results are of this one: no other takes its place
        raise UserError(
            f"{error}. Put back a copy, or move {workdir} away and run the command in its "
            f"{artifact.MANIFEST_FILE} again, which makes the same one"
        ) from error


def _load(
    workdir: epath.PathLike,
    mesh: Mesh,
    init_fn: Callable[[jax.Array], Any],
    which: str,
    item: str,
    passed_over: Container[int] = (),
) -> Any:
    """load_params, as if there were no checkpoints of the steps `passed_over`; raises `Damaged`."""
    step = find_step(workdir, which, passed_over)
    path = storage.resolve(workdir) / DIRECTORY / str(step)
    if not (path / item).exists():
        held = sorted(p.name for p in path.iterdir() if p.is_dir())
        raise Damaged(workdir, step, f"it holds no {item!r}; it holds {', '.join(held)}")
    read_meta(workdir, step)
    params, shardings = state_lib.param_shardings(init_fn, mesh)
    if adapters := _read_config(workdir).get("lora"):
        params, shardings = lora.extend(params, shardings, ConfigDict(adapters))
    abstract = state_lib.abstract(params, shardings)
    handler = ocp.StandardCheckpointHandler()
    try:
        _check_shapes(handler.metadata(path / item).tree, abstract, path / item)
        restored = handler.restore(path / item, args=ocp.args.StandardRestore(abstract))
        return lora.merge(restored)
    except UserError:
        raise
    except Exception as error:
        if _is_damage(error):
            raise Damaged(workdir, step, _first_line(error)) from error
        raise UserError(f"{path / item} cannot be read ({_first_line(error)})") from error
    finally:
        handler.close()


def load_model_config(workdir: epath.PathLike) -> dict[str, Any]:
    """The architecture of the model that a stage trained, from its config.json.

    Only pretraining declares a model; a later stage has the one of its `inputs.init` (or, for a
    policy, `inputs.policy`), wherever that artifact lies now.
    """
    while "model" not in (config := _read_config(workdir)):
        inputs = artifact.read_manifest(workdir, allow_unfinished=True)["inputs"]
        parents = [name for name in ("init", "policy") if name in inputs]
        if not parents:
            raise UserError(f"{workdir} holds no model: neither `model` nor `inputs.init`")
        workdir = artifact.input_workdir(workdir, parents[0])
    return config["model"]


def _read_config(workdir: epath.PathLike) -> dict[str, Any]:
    path = epath.Path(workdir) / "config.json"
    if not path.exists():
        raise UserError(f"{workdir}: no config.json, so this is not the workdir of a run")
    return json.loads(path.read_text())


def _check_shapes(saved: Any, wanted: Any, path: epath.Path) -> None:
    """Orbax would pad or cut an array of another shape: a wrong model must be an error."""

    def shapes(tree: Any) -> dict[str, tuple[int, ...]]:
        leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {
            "/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in keys): tuple(x.shape)
            for keys, x in leaves
        }

    have, want = shapes(saved), shapes(nn.unbox(wanted))
    for name in sorted(have.keys() | want.keys()):
        if have.get(name) != want.get(name):
            raise UserError(
                f"{path} is of another model: {name} is {have.get(name, 'absent')} there and "
                f"{want.get(name, 'absent')} here"
            )


def _check_schema(meta: Mapping[str, Any], workdir: epath.Path) -> None:
    if meta["schema"] > SCHEMA_VERSION:
        raise UserError(
            f"{workdir}: its checkpoints have schema {meta['schema']}, this gptlab reads up to "
            f"{SCHEMA_VERSION}; update gptlab"
        )


def _is_damage(error: Exception) -> bool:
    """Whether an error of a restore tells that the files are not what was written.

    Everything else leaves them in doubt at most: no memory, no rights, a failing disk, another
    model. TensorStore raises ValueErrors that begin with a status code.
    """
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError | KeyError):
        return True  # KeyError: an item of the checkpoint is missing
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError | NotADirectoryError)
    return isinstance(error, ValueError) and str(error).startswith(_DAMAGE_CODES)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"
