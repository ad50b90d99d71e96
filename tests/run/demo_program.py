"""A stage in miniature for the tests of run/: counts to config.num_steps, saving the number."""

import time

from gptlab.run import artifact, files, processes, program
from gptlab.run.errors import Interrupted, UserError


def run(config, workdir):
    with artifact.open_run(config, workdir, "demo") as run:
        if run.finished:
            print("already done")
            return
        saved = run.workdir / "step.txt"
        start = int(saved.read_text()) if saved.exists() else 0
        run.metrics.rewind(start)
        with run.progress(config.num_steps, "demo", initial=start) as bar:
            for step in range(start + 1, config.num_steps + 1):
                with run.goodput.measure("step"):
                    time.sleep(config.seconds_per_step)
                if step == config.fail.step:
                    raise {
                        "user": UserError("step 2: the\nsky fell"),
                        "defect": ZeroDivisionError("no such luck"),
                        "disk": OSError(28, "No space left on device"),
                        "key": AttributeError(),
                    }[config.fail.kind]
                if config.fail.kind == "asks":
                    config.model  # noqa: B018  (asking for a key that isn't there)
                run.metrics.write(step, {"train/loss": 1 / step})
                bar.update(loss=1 / step)
                if run.stop_requested():
                    if processes.is_first():
                        files.atomic_write(saved, str(step))
                    raise Interrupted(f"stopped and saved at step {step}")
        run.results(last=1 / config.num_steps)
        run.complete(digest="d1")


if __name__ == "__main__":
    program.main(run, "demo")
