"""Records on disk: one safetensors file with a JSON header. No pickle; nothing in a file is executed."""

import json
import math
import os
import tempfile
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    from unvanish.draw.preview import Preview

SCHEMA = 3
"""Version of the layout of a flow file."""


class Record:
    """A measurement: data that can be saved and loaded.

    A file contains the tree of a record's fields as JSON, followed by its tensors. Fields may be tensors, other
    records, numbers, strings, None, and tuples, lists and dicts of these.
    """

    _kinds: ClassVar[dict[str, type["Record"]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        Record._kinds[cls.__name__] = cls

    @property
    def kind(self) -> str:
        """The name of the class that `load` creates."""
        return type(self).__name__

    def contents(self) -> dict[str, Any]:
        """The fields to save, as the constructor takes them."""
        assert is_dataclass(self)
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one file, by rename: readers see the old one or the new one, never a part.

        Raises:
            OSError: the file can't be written.
        """
        from safetensors.torch import save

        tensors: dict[str, Tensor] = {}
        tree = json.dumps(_pack(self, tensors))
        write_atomically(Path(path), save(tensors, {"unvanish.flow": str(SCHEMA), "record": tree}))

    def plot(self, ax: Any = None) -> Any:
        """Its picture, on the matplotlib Axes given or on new ones; returns them.

        Raises:
            TypeError: there is no picture of this kind of record.
        """
        drawn = self._draw(ax)
        if drawn is None:
            raise TypeError(f"there is no picture of a {self.kind}")
        return drawn

    def _draw(self, ax: Any) -> Any:
        """The picture on the axes, or on new ones; None where a record has none. matplotlib is imported here."""
        return None

    def _repr_html_(self) -> str | None:
        drawn = self._draw(None)
        if drawn is None:
            return None
        from unvanish import draw

        return draw.card(drawn, self.kind, repr(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote.

        Raises:
            OSError: the file can't be read.
            ValueError: not a flow file, of another schema version, or of another kind of record.
        """
        record = load(path)
        if not isinstance(record, cls):
            raise ValueError(f"{path}: expected a {cls.__name__}, found a {type(record).__name__}")
        return record


def load(path: str | os.PathLike[str]) -> Any:
    """The record in a file, of whatever kind it is.

    Raises:
        OSError: the file can't be read.
        ValueError: not a flow file, or of another schema version.
    """
    from safetensors import SafetensorError, safe_open

    if Path(path).is_dir():
        raise IsADirectoryError(f"{path}: expected a flow file, got a folder")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if header.get("unvanish.flow") != str(SCHEMA):
                found = header.get("unvanish.flow")
                raise ValueError(f"{path}: expected a flow file of schema {SCHEMA}, found schema {found!r}")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        record = _unpack(json.loads(header["record"]), tensors)
    except (SafetensorError, json.JSONDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: not a flow file written by unvanish: {error}") from error
    if not isinstance(record, Record):
        raise ValueError(f"{path}: not a flow file written by unvanish: it holds no record")
    return record


def _pack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        key = str(len(tensors))
        # Tensors that share memory are written once each: safetensors wants them apart.
        tensors[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": key}
    if isinstance(value, Record):
        return {"record": value.kind, "fields": _pack(value.contents(), tensors)["dict"]}
    if isinstance(value, dict):
        return {"dict": {key: _pack(item, tensors) for key, item in value.items()}}
    if isinstance(value, tuple | list):
        return {type(value).__name__: [_pack(item, tensors) for item in value]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"can't keep a {type(value).__name__} in a flow file")


def _unpack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    if "record" in tree:
        kind = Record._kinds[tree["record"]]
        return kind(**{key: _unpack(item, tensors) for key, item in tree["fields"].items()})
    ((kind, value),) = tree.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "float":
        return float(value)
    if kind == "dict":
        return {key: _unpack(item, tensors) for key, item in value.items()}
    return {"tuple": tuple, "list": list}[kind](_unpack(item, tensors) for item in value)


def write_atomically(path: Path, data: bytes) -> None:
    """Write to a temporary neighbour, then rename: readers see the old file or the new one, never a part."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def write_page(path: str | os.PathLike[str], page: str, card: "Preview") -> None:
    """Write a page, and beside it its card of 1200 × 630 pixels, to be shown where the page is linked:
    "page-card.png" and "page-card.svg" for "page.html"."""
    from unvanish.draw.preview import preview_files, preview_paths

    for place, image in zip(preview_paths(path), preview_files(card), strict=True):
        write_atomically(place, image)
    write_atomically(Path(path), page.encode())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
