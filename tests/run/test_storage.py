"""Paths in buckets: what they are called, and what stands in for what a bucket lacks."""

import importlib.util
import os

import pytest

from gptlab.run import artifact, files, metrics, storage
from gptlab.run.errors import UserError

needs_gcsfs = pytest.mark.skipif(
    importlib.util.find_spec("gcsfs") is None, reason="buckets need gcsfs: the extra 'cloud'"
)


def test_addresses_of_other_kinds_are_refused():
    for text in ("s3://bucket/a", "gs://", "http://host/a"):
        with pytest.raises(UserError, match="buckets are given as gs://BUCKET/DIRECTORY"):
            storage.resolve(text)


@needs_gcsfs
def test_addresses_are_made_plain_and_relative_to_each_other(tmp_path):
    assert str(storage.resolve("gs://bucket/a/../b/")) == "gs://bucket/b"
    assert storage.resolve(tmp_path / "x" / "..") == storage.resolve(tmp_path)
    path, start = "gs://bucket/runs/clean", "gs://bucket/runs/tokens"
    assert storage.relative(path, start) == "../clean"
    assert str(storage.joined(start, "../clean")) == path
    assert storage.relative(path, "/disk/runs") == path
    assert str(storage.joined("/disk/runs", path)) == path
    assert str(storage.joined("/disk/runs", "../clean")) == "/disk/runs/../clean"


@needs_gcsfs
def test_what_is_written_is_there_as_a_whole_and_copied_once(bucket):
    path = storage.resolve("gs://lab/some/file")
    files.atomic_write(path, "one")
    assert path.read_text() == "one" and bucket.names("lab/some") == ["lab/some/file"]
    first = storage.local_copy(path)
    assert first.read_text() == "one" and storage.local_copy(path) == first
    written = os.stat(first).st_mtime_ns
    files.atomic_write(path, "two")
    second = storage.local_copy(path)
    assert (first.read_text(), second.read_text()) == ("one", "two")
    assert os.stat(first).st_mtime_ns == written
    with pytest.raises(UserError, match="cannot read gs://lab/none: FileNotFoundError"):
        storage.local_copy("gs://lab/none")


@needs_gcsfs
def test_files_have_the_same_digest_wherever_they_are(bucket, tmp_path):
    for name, text in (("a", "1"), ("b", "2")):
        (tmp_path / name).write_text(text)
    storage.upload(tmp_path, "gs://lab/set")
    there = [f"gs://lab/set/{name}" for name in "ab"]
    assert files.digest_files(there) == files.digest_files([tmp_path / "a", tmp_path / "b"])


@needs_gcsfs
def test_directories_are_moved_and_removed_object_by_object(bucket):
    for name in ("a", "b/c"):
        files.atomic_write(f"gs://lab/old/{name}", name)
    storage.move(storage.resolve("gs://lab/old"), storage.resolve("gs://lab/new/0"))
    assert bucket.names("lab/old") == []
    assert bucket.names("lab/new") == ["lab/new/0/a", "lab/new/0/b/c"]
    storage.remove(storage.resolve("gs://lab/new"))
    assert bucket.names("lab/new") == []


@needs_gcsfs
def test_metrics_are_copied_at_a_flush_and_go_on_where_they_were(bucket):
    workdir = "gs://lab/metrics"
    writer = metrics.MetricWriter(workdir)
    writer.rewind(0)
    writer.write(1, {"train/loss": 1.0})
    writer.flush()
    writer.write(2, {"train/loss": 0.5})  # lost with the process
    assert [line["step"] for line in metrics.read_metrics(workdir)] == [1]
    again = metrics.MetricWriter(workdir)
    again.rewind(1)
    again.write(2, {"train/loss": 0.5})
    again.close()
    assert [line["step"] for line in metrics.read_metrics(workdir)] == [1, 2]
    assert sum(".tfevents." in name for name in bucket.names("lab/metrics")) == 2


@needs_gcsfs
def test_a_run_in_a_bucket_is_an_artifact_like_any_other(bucket, monkeypatch, tmp_path):
    from ml_collections import ConfigDict

    monkeypatch.setattr("gptlab.run.lock._SETTLE_SECONDS", 0.1)
    config = ConfigDict({"seed": 0, "inputs": {}})
    with artifact.open_run(config, "gs://lab/runs/first", "clean") as run:
        files.atomic_write(run.workdir / "report.md", "fine")
        with pytest.raises(UserError, match="gs://lab/runs/first is in use by another run"):
            monkeypatch.setattr("gptlab.run.lock._RENEW_SECONDS", 0.1)
            artifact.open_run(config, "gs://lab/runs/first", "clean")
        run.complete("d1")
    assert bucket.names("lab/runs") == [
        f"lab/runs/first/{name}" for name in ("config.json", "manifest.json", "report.md")
    ]
    with artifact.open_run(config, "gs://lab/runs/first", "clean") as run:
        assert run.finished
    second = ConfigDict({"seed": 0, "inputs": {"corpus": "gs://lab/runs/first"}})
    for workdir in ("gs://lab/runs/second", str(tmp_path / "second")):
        with artifact.open_run(second, workdir, "tokenize") as run:
            run.complete("d2")
        tree = artifact.lineage(workdir)
        assert tree["inputs"]["corpus"]["path"] == "gs://lab/runs/first"
