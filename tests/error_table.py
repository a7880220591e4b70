"""The largest errors of a test file's layers against the dense float64 truth: ``pytest -s`` prints them."""

import collections
import math

import pytest
from torch import Tensor

from dorac.testing import max_error

COLUMNS = ("y", "x", "weight", "lora_A", "lora_B", "magnitude", "bias")

_errors: dict[str, dict[str, float]] = collections.defaultdict(dict)


def record(label: str, column: str, actual: Tensor, truth: Tensor) -> None:
    row = _errors[label]
    row[column] = max(row.get(column, 0.0), max_error(actual, truth))


def label(kind: str, tensor: Tensor, rank: int, compiled: bool) -> str:
    how = "compiled" if compiled else "eager"
    return f"{kind} {str(tensor.dtype).removeprefix('torch.'):>9} rank {rank:>3} {how:>8}"


@pytest.fixture(scope="module", autouse=True)
def error_table():
    """To be imported by a test file, whose table it prints."""
    _errors.clear()
    yield
    width = max(map(len, _errors), default=0)
    print("\nlargest error against the dense float64 truth\n" + " " * width + " ".join(f"{c:>9}" for c in COLUMNS))
    for name, row in _errors.items():
        print(f"{name:>{width}}" + " ".join(f"{row.get(column, math.nan):>9.1e}" for column in COLUMNS))
