import io

from gptlab.run.goodput import Goodput
from gptlab.run.progress import Progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_a_log_gets_a_line_every_half_minute_and_a_last_one():
    out, clock = io.StringIO(), Clock()
    with Progress(100, "sft", initial=20, stream=out, clock=clock) as bar:
        for _ in range(20):
            clock.now += 3
            bar.update(loss=1.5)
    assert out.getvalue().splitlines() == [
        "sft: 30/100 steps (30%), 30 s, 3 min 30 s left, loss 1.5",
        "sft: 40/100 steps (40%), 60 s, 3 min 00 s left, loss 1.5",
        "sft: 40/100 steps (40%), 60 s, 3 min 00 s left, loss 1.5",
    ]


def test_fast_work_of_unknown_length():
    out, clock = io.StringIO(), Clock()
    with Progress(None, "read", unit="document", stream=out, clock=clock) as bar:
        clock.now = 40.0
        bar.update(400)
    assert out.getvalue().splitlines()[0] == "read: 400 documents, 10 documents/s"


def test_a_terminal_gets_a_bar():
    out = Terminal()
    with Progress(10, "ppo", stream=out) as bar:
        bar.update(10, kl=0.25)
    assert "ppo: 100%" in out.getvalue()


def test_a_process_that_is_not_the_first_is_silent():
    out, clock = Terminal(), Clock()
    with Progress(10, "ppo", stream=out, clock=clock, enabled=False) as bar:
        clock.now = 1000.0
        bar.update(5)
    assert out.getvalue() == ""
    assert bar.count == 5


def test_goodput_counts_the_innermost_phase_and_adds_up():
    clock = Clock()
    goodput = Goodput(clock)
    clock.now = 1.0
    with goodput.measure("step"):
        clock.now += 5
        with goodput.measure("compile"):
            clock.now += 3
    with goodput.measure("step"):
        clock.now += 1
    clock.now += 2
    summary = goodput.summary()
    assert summary == {
        "goodput/other_s": 3.0,
        "goodput/step_s": 6.0,
        "goodput/compile_s": 3.0,
        "goodput/total_s": 12.0,
        "goodput/step_fraction": 0.5,
    }


def test_goodput_counts_a_phase_that_failed():
    clock = Clock()
    goodput = Goodput(clock)
    try:
        with goodput.measure("save"):
            clock.now += 4
            raise ValueError
    except ValueError:
        pass
    clock.now += 1
    assert goodput.summary()["goodput/save_s"] == 4.0
    assert goodput.summary()["goodput/other_s"] == 1.0
