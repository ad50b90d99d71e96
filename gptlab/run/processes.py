"""Which of several cooperating processes this is. One process is the ordinary case.

Several processes (one per TPU host, or a few on one machine in tests) run the same program on the
same config. They share a workdir, in which only process 0 writes, Orbax's checkpoints excepted.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
from jax._src import distributed

from gptlab.run.errors import UserError
from gptlab.run.peers import Peers

# Of the process, not of one run: `rounds` opens several, and the service wants rising numbers.
_stop_polls = 0
_stop_reached = False
_peers: Peers | None = None

_VARIABLES = ("GPTLAB_COORDINATOR", "GPTLAB_NUM_PROCESSES", "GPTLAB_PROCESS_ID")


def initialize(stage: str) -> None:
    """Joins the other processes if the environment asks for it; otherwise does nothing.

    GPTLAB_COORDINATOR=host:port with GPTLAB_NUM_PROCESSES and GPTLAB_PROCESS_ID names everything;
    GPTLAB_COORDINATOR=auto lets JAX find it out from the cluster (TPU pods, Slurm, Open MPI).
    `stage` is what a message about a lost process begins with.

    Raises UserError if the variables are wrong, or the other processes can't be reached.
    """
    global _peers
    coordinator = os.environ.get("GPTLAB_COORDINATOR")
    if not coordinator:
        return
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # only CPUs look at this
    if coordinator == "auto":
        arguments: tuple[Any, ...] = ()
    else:
        arguments = (coordinator, *_numbers(coordinator))
    try:
        jax.distributed.initialize(*arguments)
    except (RuntimeError, ValueError, OSError) as error:
        reason = next(iter(str(error).splitlines()), "")
        raise UserError(
            f"GPTLAB_COORDINATOR={coordinator}: cannot join the other processes ({reason}); 'auto' "
            "is for TPU pods, Slurm and Open MPI, and every process must be started"
        ) from error
    state = distributed.global_state
    if state.num_processes > 1:
        assert state.coordinator_address is not None
        _peers = Peers(
            state.client, state.process_id, state.num_processes, stage, state.coordinator_address
        )
        _peers.start()


def _numbers(coordinator: str) -> tuple[int, int]:
    """The number of processes and that of this one."""
    try:
        num_processes, process_id = (int(os.environ[name]) for name in _VARIABLES[1:])
    except (KeyError, ValueError) as error:
        raise UserError(
            f"GPTLAB_COORDINATOR={coordinator} needs whole numbers in {_VARIABLES[1]} and "
            f"{_VARIABLES[2]} ({error}); set both, or set GPTLAB_COORDINATOR=auto on a TPU pod"
        ) from error
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"GPTLAB_PROCESS_ID={process_id} must lie in [0, {num_processes}), "
            f"where {num_processes} is GPTLAB_NUM_PROCESSES"
        )
    return num_processes, process_id


def show_phase(phase: Callable[[], str]) -> None:
    """What the others are told this process is at, should it be lost."""
    if _peers is not None:
        _peers.phase = phase


def blame() -> None:
    """To be called before an unexpected error is reported: see Peers.blame."""
    if _peers is not None:
        _peers.blame()


def leave(code: int, line: str = "") -> None:
    """To be called before the program ends: see Peers.leave. Nothing for a single process."""
    if _peers is not None:
        _peers.leave(code, line)


def index() -> int:
    """This process's number. Does not start a JAX backend in a single-process program."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def count() -> int:
    return jax.process_count() if jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this process writes artifacts, prints progress and so on."""
    return index() == 0


def say(line: str) -> None:
    """Prints a line for the user once, however many processes there are."""
    if is_first():
        print(line, flush=True)


def barrier(name: str) -> None:
    """Waits until every process is here. `name` must be the same in all of them."""
    if count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def stop_reached() -> bool:
    """Whether some process got SIGTERM and this is the step at which all of them are to stop.

    Every process must call this equally often, once per step. It costs nothing until a signal
    arrives: JAX's coordination service then fixes a step that no process has passed.
    """
    global _stop_polls, _stop_reached
    if not _stop_reached:
        from jax.experimental import multihost_utils

        _stop_polls += 1
        _stop_reached = multihost_utils.reached_preemption_sync_point(_stop_polls)
    return _stop_reached
