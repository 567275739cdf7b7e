"""The user's own data: files in, sequences out; every refusal names file, row and column."""

from unvanish.train.data.sequences import Sequences, split
from unvanish.train.data.table import DataError, read_csv

__all__ = ["DataError", "Sequences", "read_csv", "split"]
