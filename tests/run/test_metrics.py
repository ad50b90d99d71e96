import json
import math
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gptlab.run.errors import UserError
from gptlab.run.metrics import MetricWriter, read_metrics


def without_time(entries):
    return [{k: v for k, v in entry.items() if k != "time"} for entry in entries]


def test_scalars_of_every_kind_come_back_exactly(tmp_path):
    writer = MetricWriter(tmp_path)
    third = np.float32(1) / np.float32(3)
    writer.write(1, {"a": 0.1, "b": third, "c": jnp.asarray(2), "d": np.array(0.5)})
    # Readable at once: nothing waits in a buffer for the end of the run.
    assert without_time(read_metrics(tmp_path)) == [
        {"step": 1, "a": 0.1, "b": float(third), "c": 2.0, "d": 0.5}
    ]
    assert np.float32(read_metrics(tmp_path)[0]["b"]) == third


def test_a_metric_that_is_no_scalar_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"train/loss has shape \(2,\)"):
        MetricWriter(tmp_path).write(1, {"train/loss": np.zeros(2)})


def test_non_finite_values_are_strict_json_and_come_back(tmp_path):
    MetricWriter(tmp_path).write(1, {"nan": math.nan, "inf": math.inf, "low": -math.inf})

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    (entry,) = read_metrics(tmp_path)
    assert math.isnan(entry["nan"]) and entry["inf"] == math.inf and entry["low"] == -math.inf


def test_a_half_written_last_line_is_tolerated_and_cut(tmp_path):
    MetricWriter(tmp_path).write(1, {"a": 1.0})
    path = tmp_path / "metrics.jsonl"
    with open(path, "ab") as file:
        file.write(b'{"step": 2, "ti')
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1]
    MetricWriter(tmp_path).write(2, {"a": 2.0})
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2]


def test_a_file_that_is_only_half_a_line_becomes_empty(tmp_path):
    (tmp_path / "samples.jsonl").write_bytes(b"x" * 100_000)  # longer than one block
    MetricWriter(tmp_path)
    assert (tmp_path / "samples.jsonl").read_bytes() == b""


def test_half_a_line_after_a_block_boundary(tmp_path):
    whole = b'{"step": 1}\n' * 3
    (tmp_path / "metrics.jsonl").write_bytes(whole + b"x" * 200_000)
    MetricWriter(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole


def test_damage_in_the_middle_is_an_error_with_its_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2 is damaged"):
        read_metrics(tmp_path)


def test_no_metrics_at_all(tmp_path):
    with pytest.raises(UserError, match="has the run started"):
        read_metrics(tmp_path)


def test_rewind_forgets_later_steps_of_metrics_and_samples(tmp_path):
    writer = MetricWriter(tmp_path)
    for step in range(1, 6):
        writer.write(step, {"a": float(step)})
        writer.write_sample({"step": step, "reply": "héllo\u2028"})
    writer.write_sample({"reply": "of no step"})
    writer.rewind(3)
    writer.write(4, {"a": 40.0})
    assert [entry["a"] for entry in read_metrics(tmp_path)] == [1, 2, 3, 40]
    samples = [json.loads(s) for s in (tmp_path / "samples.jsonl").read_text().split("\n") if s]
    assert [sample.get("step") for sample in samples] == [1, 2, 3, None]
    assert samples[0]["reply"] == "héllo\u2028"
    writer.rewind(0)
    assert read_metrics(tmp_path) == []


def test_tensorboard_shows_the_last_attempt_at_a_step(tmp_path):
    first = MetricWriter(tmp_path)
    for step in (1, 2, 3):
        first.write(step, {"train/loss": 1.0})
    first.close()
    time.sleep(1.1)  # event files are read in the order of the seconds in their names
    second = MetricWriter(tmp_path)
    second.rewind(1)
    for step in (2, 3):
        second.write(step, {"train/loss": 2.0})
    second.close()
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("train/loss")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 2.0), (3, 2.0)]


def test_a_process_that_is_not_the_first_writes_nothing(tmp_path):
    writer = MetricWriter(tmp_path, enabled=False)
    writer.write(1, {"a": 1.0})
    writer.write_sample({"step": 1})
    writer.rewind(0)
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_writing_metrics_does_not_load_tensorflow(tmp_path):
    code = (
        "import sys; from gptlab.run.metrics import MetricWriter; w = MetricWriter(sys.argv[1]); "
        "w.write(1, {'a': 1.0}); w.close(); assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=60)
    assert list(tmp_path.glob("events.out.tfevents.*"))
