"""Exactly one of steps, tokens and epochs says how long a run is."""

import pytest

from configs import common
from gptlab.run.errors import UserError
from gptlab.train.durations import check_not_passed, total_steps


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        ({"total_steps": 7}, 7),
        ({"total_tokens": 1000}, 10),
        ({"total_tokens": 1001}, 11),
        ({"total_epochs": 3.0}, 30),
        ({"total_epochs": 0.01}, 1),
    ],
)
def test_each_way_of_saying_it(given, steps):
    assert total_steps(common.duration(**given), batch_tokens=100, steps_per_epoch=10.0) == steps


def test_rounding_does_not_add_a_step():
    assert total_steps(common.duration(total_epochs=3.0), 1, 1 / 0.1) == 30


@pytest.mark.parametrize("given", [{}, {"total_steps": 5, "total_epochs": 1.0}, {"total_steps": 0}])
def test_none_several_or_nothing_positive_is_refused(given):
    with pytest.raises(UserError, match="total_steps"):
        total_steps(common.duration(**given), 100, 10.0)


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ({"total_steps": 12}, False),
        ({"total_steps": 11}, True),
        ({"total_tokens": 1101}, False),  # 12 steps
        ({"total_tokens": 1100}, True),
        ({"total_epochs": 0.1}, False),  # only the data can tell
    ],
)
def test_a_run_cannot_be_made_shorter_than_it_is(given, refused, tmp_path):
    config = common.duration(**given)
    check_not_passed(config, tmp_path, 100)  # nothing there yet
    for step in (8, 12):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    if not refused:
        return check_not_passed(config, tmp_path, 100)
    (key,) = given
    with pytest.raises(UserError, match=rf"at step 12 already, beyond the 1\d that config.{key}="):
        check_not_passed(config, tmp_path, 100)
