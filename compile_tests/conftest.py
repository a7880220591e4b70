"""Nothing of dorac is imported here, as in ``tests/``."""

import os

import pytest
import torch

torch.backends.cudnn.allow_tf32 = False  # float32 convolutions are held to the bounds of float32

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """Every test with this fixture has a twin for the GPU under the marker gpu."""
    return request.param


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True, scope="session")
def _poison():
    """Memory that dorac allocates and does not write is NaN."""
    from dorac.testing.poison import poisoned_memory

    with poisoned_memory():
        yield


@pytest.fixture(autouse=True)
def _fresh_state():
    """Each test starts from one seed, an empty compiler cache, and no plans that know what a test patched."""
    from dorac.ops import eager

    torch.manual_seed(0)
    eager.forget_plans()
    yield
    torch._dynamo.reset()


def pytest_terminal_summary(terminalreporter):
    """Prints the contract table of ``test_contract.py``: a mark for what passed, failed, was skipped or not run."""
    cells = {}
    for outcome, mark in (("passed", "ok"), ("skipped", "-"), ("failed", "FAILED"), ("error", "FAILED")):
        for report in terminalreporter.stats.get(outcome, []):
            for key, value in getattr(report, "user_properties", []):
                if key == "contract":
                    cells[tuple(value)] = mark
    if not cells:
        return
    from test_contract import COLUMNS, ROWS  # their order is the table's, whatever order workers ran them in

    for device in sorted({device for device, _, _ in cells}):
        columns = [column for column in COLUMNS if any((device, row, column) in cells for row in ROWS)]
        rows = [row for row in ROWS if any((device, row, column) in cells for column in columns)]
        width = max(map(len, rows))
        terminalreporter.write_sep("=", f"compile contract, torch {torch.__version__}, {device}")
        terminalreporter.write_line("  ".join([" " * width, *columns]))
        for row in rows:
            marks = (cells.get((device, row, column), "").center(len(column)) for column in columns)
            terminalreporter.write_line("  ".join([row.ljust(width), *marks]).rstrip())
