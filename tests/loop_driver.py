"""Runs a program in this process as the command line would, and has it hit at a chosen moment.

    python tests/loop_driver.py STAGE CONFIG.py WORKDIR MOMENT

MOMENT is 'never'; 'start:N': SIGKILL right after step N was dispatched; 'step:N': the same, once a
checkpoint exists; 'save:N': SIGKILL while checkpoint N is on its way to the disk; or 'full:N': no
kill, but a disk that is full from checkpoint N on. 'step:N@1' hits process 1 of several only. It is
the real program; nothing of it knows.
"""

import errno
import functools
import os
import runpy
import signal
import sys
import time
from pathlib import Path

from etils import epath

sys.path.insert(0, str(Path(__file__).parents[1]))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_step(number: int, workdir: str, saved: bool = True) -> None:
    from gptlab.train.checkpoint import checkpoint_steps
    from gptlab.train.log import StepLog

    push = StepLog.push

    def pushed(self, step, metrics):
        push(self, step, metrics)
        if step == number:
            while saved and not checkpoint_steps(workdir):  # one is on its way, in the background
                time.sleep(0.01)
            if "://" not in workdir:
                Path(f"{workdir}.died").touch()
            die()

    StepLog.push = pushed


def kill_in_save(number: int, workdir: str) -> None:
    from gptlab.train import checkpoint

    save = checkpoint.Checkpoints.save

    def saving(self, step, items, meta, metrics=None):
        save(self, step, items, meta, metrics)
        if step == number:
            directory = epath.Path(workdir) / checkpoint.DIRECTORY
            # In a bucket it has its name from the beginning, and a mark at the end.
            begun, ended = f"{number}.*/*", directory / str(number)
            if "://" in workdir:
                begun, ended = f"{number}/*", ended / "commit_success.txt"
            # Saving goes on in the background: wait until some of it is there, and not all of it.
            while not list(directory.glob(begun)):
                if ended.exists():
                    print("the save was over too soon", file=sys.stderr)
                    break
            die()

    checkpoint.Checkpoints.save = saving


def fill_disk(number: int, workdir: str) -> None:
    import orbax.checkpoint as ocp

    save = ocp.CheckpointManager.save

    def saving(self, step, *args, **kwargs):
        if step >= number:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return save(self, step, *args, **kwargs)

    ocp.CheckpointManager.save = saving


if __name__ == "__main__":
    stage, config, workdir, moment = sys.argv[1:]
    moment, _, process = moment.partition("@")
    kind, _, number = moment.partition(":")
    if kind != "never" and process in ("", os.environ.get("GPTLAB_PROCESS_ID")):
        kill_early = functools.partial(kill_at_step, saved=False)
        hits = {"start": kill_early, "step": kill_at_step, "save": kill_in_save, "full": fill_disk}
        hits[kind](int(number), workdir)
    sys.argv = [f"gptlab/{stage}.py", f"--config={config}", f"--workdir={workdir}"]
    runpy.run_module(f"gptlab.{stage}", run_name="__main__", alter_sys=True)
