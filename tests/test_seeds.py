"""Several runs side by side, by hand."""

import json

import pytest

from benchmarks import seeds


def figure(value, met=True, demand="at least 1"):
    return {"stage": "ppo", "name": "gold", "value": value, "demand": demand, "met": met}


def write(path, *figures):
    path.mkdir()
    (path / "report.json").write_text(json.dumps({"stages": figures}))
    return path


def test_the_spread_is_over_runs(tmp_path):
    interval = {"mean": 3.0, "low": 2.0, "high": 4.0}
    runs = [
        seeds.read(write(tmp_path / "a", figure(interval))),
        seeds.read(write(tmp_path / "b", figure({**interval, "mean": 1.0}, met=False))),
    ]
    line = seeds.table(runs, ["a", "b"], False).splitlines()[2]
    assert line == (
        "| ppo | gold | 3.000 [2.000, 4.000] | 1.000 [2.000, 4.000] | 2.000 ± 1.414 "
        "| at least 1 | 1 of 2 |"
    )


def test_a_figure_that_a_run_lacks_has_no_spread(tmp_path):
    runs = [seeds.read(write(tmp_path / "a", figure(2.0, demand=""))), {}]
    assert len(seeds.table(runs, ["a", "b"], False).splitlines()) == 2
    line = seeds.table(runs, ["a", "b"], True).splitlines()[2]
    assert line == "| ppo | gold | 2.000 | - | - |  | - |"


def test_an_unfinished_run_is_named(tmp_path):
    with pytest.raises(SystemExit, match="is that run of rounds done"):
        seeds.read(tmp_path)
