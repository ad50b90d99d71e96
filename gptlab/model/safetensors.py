"""The safetensors format, read and written a few rows at a time.

A file is 8 bytes (little-endian length of the header), the header (JSON: name -> dtype, shape,
data_offsets) and the tensors' bytes. The format's own library maps whole files into memory, where
they count as the process's, and writes from a dict that holds every tensor of a file; models are
larger than that. It reads what this module writes (tested), and the other way round.
"""

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from gptlab.run import files, storage
from gptlab.run.errors import UserError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES: Mapping[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
}
_LONGEST_HEADER = 100 << 20  # the format's own limit


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """One tensor of a file; a model.weights.Tensor."""

    path: str
    name: str
    dtype: str  # as the header calls it
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file

    def check(self) -> None:
        """UserError unless it holds floating-point numbers."""
        if self.dtype not in _DTYPES:
            raise UserError(
                f"{self.path}: {self.name} is stored as {self.dtype}; gptlab reads "
                f"{', '.join(_DTYPES)}. Quantised models are read from GGUF"
            )

    def read(self, start: int, stop: int) -> np.ndarray:
        """Rows start..stop-1 as float32."""
        dtype = np.dtype(_DTYPES[self.dtype])
        row = math.prod(self.shape[1:])
        offset = self.offset + start * row * dtype.itemsize
        values = np.fromfile(self.path, dtype, (stop - start) * row, offset=offset)
        return values.reshape(stop - start, *self.shape[1:]).astype(np.float32, copy=False)


def read_file(path: str | os.PathLike[str]) -> dict[str, FileTensor]:
    """Every tensor of a file, by name.

    Raises:
        UserError: there is no such file, it is none of this format, or a part of it is missing.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                raise ValueError("its header is damaged")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        tensors = {}
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            if not 0 <= start <= stop <= size - 8 - length:
                raise ValueError(f"it ends before {name}; was it downloaded in full?")
            shape = tuple(int(n) for n in entry["shape"])
            dtype = _DTYPES.get(entry["dtype"])
            if dtype and stop - start != math.prod(shape) * np.dtype(dtype).itemsize:
                raise ValueError(f"{name} has {stop - start} bytes, which is not its shape {shape}")
            tensors[name] = FileTensor(str(path), name, entry["dtype"], shape, 8 + length + start)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no safetensors file: {error}") from error
    return tensors


def read_folder(folder: str | os.PathLike[str]) -> tuple[dict[str, FileTensor], list[Path]]:
    """(tensors, files) of a model that is in one file, or in several with an index.

    Raises:
        UserError: there is neither, or they contradict each other.
    """
    folder = Path(folder)
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists():
            raise UserError(
                f"{folder} holds neither {SINGLE} nor {INDEX}: of the formats that models come in, "
                "gptlab reads safetensors and GGUF"
            )
        return dict(read_file(folder / SINGLE)), [folder / SINGLE]
    try:
        places = json.loads(index.read_text())["weight_map"]
        paths = {name: folder / name for name in sorted(set(places.values()))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{index} is no index of safetensors files: {error!r}") from error
    tensors: dict[str, FileTensor] = {}
    for name, path in paths.items():
        for tensor in read_file(path).values():
            if places.get(tensor.name) != name:
                raise UserError(
                    f"{path} holds {tensor.name}, which {index.name} "
                    f"places in {places.get(tensor.name, 'no file')}"
                )
            tensors[tensor.name] = tensor
    for name, place in places.items():
        if name not in tensors:
            raise UserError(f"{index} places {name} in {place}, which does not hold it")
    return tensors, [index, *paths.values()]


def write_folder(
    folder: str | os.PathLike[str],
    shapes: Mapping[str, tuple[int, ...]],
    values: Iterator[np.ndarray],
    max_bytes: int,
    write: bool,
) -> None:
    """Writes float32 tensors as one file, or as several and their index.

    Args:
        folder: exists. A file for a bucket is made on this machine first, one at a time.
        shapes: of every tensor by name, in the order of `values`.
        values: one at a time.
        max_bytes: a file is no larger than this, or holds one tensor.
        write: False takes all values and writes nothing: what processes but the first do.
    """
    place = epath.Path(folder)
    parts: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = 4 * math.prod(shape)
        if filled and filled + size > max_bytes:
            parts.append({})
            filled = 0
        parts[-1][name] = shape
        filled += size
    of = len(parts)
    names = [SINGLE] if of == 1 else [f"model-{i:05d}-of-{of:05d}.safetensors" for i in _count(of)]
    for file, part in zip(names, parts, strict=True):
        if write:
            _write_file(place / file, part, values)
        else:
            for _ in part:
                next(values)
    if of > 1 and write:
        places = {name: file for file, part in zip(names, parts, strict=True) for name in part}
        total = sum(4 * math.prod(shape) for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        files.atomic_write(place / INDEX, json.dumps(index, indent=2) + "\n")


def _count(of: int) -> range:
    return range(1, of + 1)


def _write_file(
    path: epath.Path, shapes: Mapping[str, tuple[int, ...]], values: Iterator[np.ndarray]
) -> None:
    if storage.in_bucket(path):
        with storage.written_locally(path) as local:
            _write_file(epath.Path(local), shapes, values)
        return
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # which transformers asks for
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    with files.disk_errors(path):
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name, shape in shapes.items():
                value = next(values)
                assert value.shape == shape and value.dtype == np.float32, name
                value.astype("<f4", copy=False).tofile(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
