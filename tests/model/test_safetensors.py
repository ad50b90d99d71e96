"""The safetensors format against its own library, and damaged files."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from gptlab.model import safetensors as ours
from gptlab.run.errors import UserError

SHAPES = {"a": (3, 4), "b.weight": (5,), "c": (2, 3, 4), "d": (7, 2)}


def values():
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def write(folder, max_bytes=10**9, write=True):
    ours.write_folder(folder, SHAPES, iter(values().values()), max_bytes, write)


def test_the_library_reads_what_is_written(tmp_path):
    write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    found = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert found.keys() == SHAPES.keys()
    for name, value in values().items():
        np.testing.assert_array_equal(found[name], value)
    with safetensors.safe_open(tmp_path / "model.safetensors", framework="np") as file:
        assert file.metadata() == {"format": "pt"}
    header = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert header % 8 == 0


def test_several_files_and_their_index(tmp_path):
    write(tmp_path, max_bytes=100)  # 48 + 20 bytes; 96; 56
    tensors, files = ours.read_folder(tmp_path)
    assert len(files) == 4 and files[0].name == "model.safetensors.index.json"
    index = json.loads(files[0].read_text())
    assert (
        index["weight_map"]["a"]
        == index["weight_map"]["b.weight"]
        == ("model-00001-of-00003.safetensors")
    )
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in values().values())
    for name, value in values().items():
        np.testing.assert_array_equal(tensors[name].read(0, len(value)), value)
        np.testing.assert_array_equal(tensors[name].read(1, 2), value[1:2])


def test_other_processes_take_part_and_write_nothing(tmp_path):
    write(tmp_path, write=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_floating_point_dtype_of_the_library_is_read(tmp_path, dtype):
    given = {name: value.astype(dtype) for name, value in values().items()}
    safetensors.numpy.save_file(given, tmp_path / "x.safetensors")
    found = ours.read_file(tmp_path / "x.safetensors")
    for name, value in given.items():
        found[name].check()
        rows = found[name].read(1, len(value))
        assert rows.dtype == np.float32
        np.testing.assert_array_equal(rows, value[1:].astype(np.float32))


def test_whole_numbers_are_no_weights(tmp_path):
    safetensors.numpy.save_file({"a": np.zeros(3, np.int8)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="a is stored as I8"):
        ours.read_file(tmp_path / "x.safetensors")["a"].check()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:-4], "it ends before d"),
        (lambda data: data[:20], "header is damaged"),
        (lambda data: b"", "header is damaged"),
        (lambda data: b"\xff" * 8 + data[8:], "header is damaged"),
        (lambda data: data[:8] + b"x" + data[9:], "no safetensors file"),
        (lambda data: data.replace(b"[5]", b"[4]"), "which is not its shape"),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage, message):
    write(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        ours.read_file(path)


def test_an_index_that_contradicts_its_files_is_refused(tmp_path):
    write(tmp_path, max_bytes=100)
    index = tmp_path / "model.safetensors.index.json"
    good = index.read_text()
    content = json.loads(good)
    places = content["weight_map"]
    for change, message in (
        ({"e": places["a"]}, "places e in .*, which does not hold it"),
        ({"a": places["d"]}, "holds a, which"),
    ):
        index.write_text(json.dumps({"weight_map": {**places, **change}}))
        with pytest.raises(UserError, match=message):
            ours.read_folder(tmp_path)
    for text in ("no JSON", "[]", "{}"):
        index.write_text(text)
        with pytest.raises(UserError, match="is no index"):
            ours.read_folder(tmp_path)
    index.write_text(good)
    (tmp_path / places["a"]).unlink()
    with pytest.raises(UserError, match="cannot read .*00001"):
        ours.read_folder(tmp_path)


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="the disk is full"):
        write(tmp_path)
