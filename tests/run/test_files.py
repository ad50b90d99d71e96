import errno
import json
import math
import os

import numpy as np
import pytest

from gptlab.run import files
from gptlab.run.errors import UserError


def test_atomic_write_replaces_and_leaves_nothing_beside(tmp_path):
    path = tmp_path / "a.json"
    files.atomic_write(path, "old")
    files.atomic_write(path, "né")
    assert path.read_bytes() == "né".encode()
    assert os.listdir(tmp_path) == ["a.json"]


def test_json_is_strict_and_keeps_what_it_can():
    figures = {"a": [math.nan, (1.5, -math.inf)], "b": {"c": np.float64("inf"), "d": None, "e": 2}}
    text = files.to_json(figures)
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": ["nan", [1.5, "-inf"]], "b": {"c": "inf", "d": None, "e": 2},
    }  # fmt: skip


def test_a_full_disk_is_a_users_error_and_keeps_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.atomic_write(path, "old")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"disk is full while writing .*a.json \(\d+ MiB left\)"):
        files.atomic_write(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_truly_full_device():
    with pytest.raises(UserError, match="disk is full while writing /dev/full"):
        with files.disk_errors("/dev/full"), open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")


def test_a_full_disk_is_recognised_behind_other_exceptions():
    try:
        try:
            raise ValueError("RESOURCE_EXHAUSTED: Error writing: No space left on device")
        except ValueError as error:
            raise RuntimeError("saving failed") from error
    except RuntimeError as error:
        assert "the disk is full" in files.explain(error)
    assert files.explain(ValueError("something else")) is None


def test_other_errors_pass_through():
    with pytest.raises(OSError, match="loop"):
        with files.disk_errors("a"):
            raise OSError(errno.ELOOP, "a loop")


def test_digest_depends_on_names_and_contents_only(tmp_path):
    for place in ("one", "two"):
        (tmp_path / place / "sub").mkdir(parents=True)
        (tmp_path / place / "a.txt").write_text("a")
        (tmp_path / place / "sub" / "b.txt").write_text("b")
    one, two = tmp_path / "one", tmp_path / "two"
    digest = files.digest_files([one])
    assert digest == files.digest_files([two])
    assert files.digest_files([one / "a.txt", one / "sub" / "b.txt"]) == files.digest_files(
        [one / "sub" / "b.txt", one / "a.txt"]
    )
    (two / "sub" / "b.txt").write_text("c")
    assert digest != files.digest_files([two])
    (two / "sub" / "b.txt").write_text("b")
    (two / "sub" / "b.txt").rename(two / "sub" / "c.txt")
    assert digest != files.digest_files([two])


def test_digest_tells_files_of_one_name_apart(tmp_path):
    one, two = tmp_path / "a" / "x.txt", tmp_path / "b" / "x.txt"
    for path in (one, two):
        path.parent.mkdir()
        path.write_text(str(path.parent.name))
    digests = files.digest_files([one, two]), files.digest_files({"1": one, "2": two})
    assert digests == (files.digest_files([two, one]), files.digest_files({"2": two, "1": one}))
    one.write_text("b")
    two.write_text("a")
    assert files.digest_files([one, two]) != digests[0]
    assert files.digest_files({"1": one, "2": two}) != digests[1]
    assert files.digest_files({"1": two, "2": one}) == digests[1]


def test_digest_of_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot read .*nothing"):
        files.digest_files([tmp_path / "nothing"])


def test_digest_of_what_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("a")
    readable = files.digest_files([tmp_path])
    with monkeypatch.context() as patch:
        patch.setattr(files, "open", denied, raising=False)
        unreadable = files.digest_files([tmp_path])
        assert unreadable == files.digest_files([tmp_path]) != readable
    with monkeypatch.context() as patch:
        deny_listing(patch, "sub")
        with pytest.raises(UserError, match="cannot read the directory .*sub: Permission denied"):
            files.digest_files([tmp_path])
    assert files.digest_files([tmp_path]) == readable


def denied(path, *_):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def deny_listing(patch, name):
    """Directories of that name can't be listed (root could list one of any permissions)."""
    scandir = os.scandir
    patch.setattr(
        os, "scandir", lambda d=".": denied(d) if os.path.basename(d) == name else scandir(d)
    )
