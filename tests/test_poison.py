"""The poison of ``conftest.py`` is there, and catches what it is there for."""

import pytest
import torch
from torch._dynamo.testing import AotEagerAndRecordGraphs

from dorac import functional
from dorac.ops import compose, grouped, take
from dorac.testing import linear_inputs
from dorac.testing.poison import ALLOCATORS, poison_of

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.bool]
CALLS = {
    "empty": "torch.empty(2, 3, dtype=dtype)",
    "empty_like": "torch.empty_like(like, dtype=dtype)",
    "empty_strided": "torch.empty_strided((2, 3), (1, 2), dtype=dtype)",
    "empty_permuted": "torch.empty_permuted((2, 3), (1, 0), dtype=dtype)",
    "new_empty": "like.new_empty(2, 3, dtype=dtype)",
    "new_empty_strided": "like.new_empty_strided((2, 3), (1, 2), dtype=dtype)",
}


def allocate(call, dtype, module):
    """The call as one of ``module``'s."""
    return eval(CALLS[call], {"__name__": module, "torch": torch}, {"like": torch.ones(2, 3), "dtype": dtype})


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_dorac_allocates_is_poison(call, dtype):
    tensor = allocate(call, dtype, "dorac.ops.compose")
    assert (tensor.shape, tensor.dtype) == ((2, 3), dtype)
    assert (tensor.isnan() if dtype.is_floating_point else tensor == poison_of(dtype)).all()


def test_every_allocator_is_known():
    assert {name for _, name in ALLOCATORS} == set(CALLS)


@pytest.mark.parametrize("call", CALLS)
def test_others_allocate_as_they_do(call):
    """Dynamo and fakes too: neither gets a fill into its graph."""
    with torch._subclasses.FakeTensorMode():
        assert type(allocate(call, torch.float32, "dorac.ops.compose")) is torch._subclasses.FakeTensor

    backend = AotEagerAndRecordGraphs()
    scope = {"__name__": "dorac.ops.compose", "torch": torch, "dtype": torch.float32}
    exec(f"def function(like):\n    return {CALLS[call]}.mul(0)", scope)
    torch.compile(scope["function"], fullgraph=True, backend=backend)(torch.ones(2, 3))
    assert "empty" in str(backend.fw_graphs[0].graph)
    assert "fill" not in str(backend.fw_graphs[0].graph)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_a_default_device_reaches_what_is_poisoned(device):
    with torch.device(device):
        assert torch.empty(2).device.type == device


def rows_of(unwritten):
    """``dorac::compose``'s blocks without the last one, if so."""
    blocks = compose._blocks
    return (lambda activation: blocks(activation)[:-1]) if unwritten else blocks


@pytest.mark.parametrize("unwritten", [False, True])
@pytest.mark.parametrize("trained", [False, True])
def test_an_op_that_leaves_rows_unwritten_is_seen(unwritten, trained, monkeypatch):
    monkeypatch.setattr(compose, "_blocks", rows_of(unwritten))
    monkeypatch.setattr(compose, "BLOCK_ELEMENTS", 65)
    inputs = linear_inputs("odd", dtype=torch.float32)
    if trained:
        inputs = inputs.leaves()
    y = functional.dora_linear(*inputs.tensors(), scaling=0.7)
    assert y[:-1].isfinite().all()
    assert bool(y[-1].isnan().all()) == unwritten


def test_what_must_be_zero_is_written(monkeypatch):
    """Rows past the last offset, entries of no index: allocated as zeros, and a mutation to ``empty`` is seen."""
    x, weight = torch.randn(4, 3), torch.randn(2, 5, 3)
    offsets = torch.tensor([1, 2])
    assert not grouped.product_by_group(x, weight, offsets)[2:].any()
    assert not take._sum_by_index(x, torch.tensor([0, 0, 2, 2]), 3)[1].any()
    monkeypatch.setattr(torch.Tensor, "new_zeros", torch.Tensor.new_empty)
    assert grouped.product_by_group(x, weight, offsets)[2:].isnan().all()
