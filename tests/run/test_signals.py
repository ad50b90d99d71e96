import os
import signal
import threading

import pytest
from ml_collections import ConfigDict

from gptlab.run import artifact


def open_run(workdir):
    return artifact.open_run(ConfigDict({"seed": 0}), workdir, "stage")


@pytest.fixture(autouse=True)
def handlers_are_as_before():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_nothing_is_requested_without_a_signal(tmp_path):
    with open_run(tmp_path) as run:
        assert not run.stop_requested()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_request_and_stays_one(tmp_path, number, capfd):
    with open_run(tmp_path) as run:
        os.kill(os.getpid(), number)
        assert run.stop_requested()
        assert run.stop_requested()
    assert f"{number.name}: saving and stopping after this step" in capfd.readouterr().err


def test_a_request_to_a_stage_is_one_to_the_rounds_around_it(tmp_path):
    with open_run(tmp_path / "rounds") as rounds:
        with open_run(tmp_path / "stage") as stage:
            os.kill(os.getpid(), signal.SIGTERM)
            assert stage.stop_requested()
        # The stage may have been past its last look; then the rounds must not start the next.
        assert rounds.stop_requested()


def test_a_request_between_stages_reaches_the_next_one_too(tmp_path):
    with open_run(tmp_path / "rounds") as rounds:
        os.kill(os.getpid(), signal.SIGTERM)
        with open_run(tmp_path / "stage") as stage:
            assert stage.stop_requested()
        assert rounds.stop_requested()


def test_outside_the_main_thread_a_run_works_without_handlers(tmp_path):
    results = []

    def work():
        with open_run(tmp_path) as run:
            results.append(run.stop_requested())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert results == [False]
