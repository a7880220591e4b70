"""After warm-up nothing recompiles: not over lengths, layers or scalings."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import dorac
from dorac import functional
from dorac.testing import linear_inputs

SCALINGS = (0.5, 2.0, 1.3, -1.0, 0.25)


def layers():
    return [
        dorac.nn.DoraLinear(torch.nn.Linear(24, 32), r=4, lora_alpha=4 * s, init_lora_weights=False) for s in SCALINGS
    ]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_layers_scalings_and_lengths(backend):
    """One graph, a second where the scaling becomes symbolic, a third where the length does; any other is an error."""
    counter = CompileCounterWithBackend(backend)
    run = torch.compile(lambda layer, x: layer(x), fullgraph=True, backend=counter)

    def step(layer, length):
        x = torch.randn(2, length, 24, requires_grad=True)
        y = run(layer, x)
        y.square().sum().backward()
        torch.testing.assert_close(y, layer(x))

    for layer in layers()[:2]:
        step(layer, 64)
    step(layers()[0], 96)
    assert counter.frame_count <= 3
    with torch.compiler.set_stance("fail_on_recompile"):
        for layer in layers():
            for length in (64, 96, 128, 33):
                step(layer, length)


def test_functional_scalings():
    inputs = linear_inputs("aligned", dtype=torch.float32)
    run = torch.compile(functional.dora_linear, fullgraph=True, backend="aot_eager")
    for scaling in SCALINGS[:2]:
        run(*inputs.tensors(), scaling=scaling)
    with torch.compiler.set_stance("fail_on_recompile"):
        for scaling in (*SCALINGS, 17.25):
            y = run(*inputs.tensors(), scaling=scaling)
            torch.testing.assert_close(y, functional.dora_linear(*inputs.tensors(), scaling=scaling))


def test_scaling_tensor_is_one_graph():
    inputs = linear_inputs("aligned", dtype=torch.float32)
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(functional.dora_linear, fullgraph=True, backend=counter)
    for scaling in SCALINGS:
        run(*inputs.tensors(), scaling=torch.tensor(scaling))
    assert counter.frame_count == 1


def test_dropout_lengths():
    layer = dorac.nn.DoraLinear(torch.nn.Linear(24, 32), r=4, lora_dropout=0.3, init_lora_weights=False)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for length in (8, 12):
        run(torch.randn(length, 24)).sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (16, 33, 7):
            run(torch.randn(length, 24)).sum().backward()


def test_the_contract_can_fail():
    """The idiom of these tests does catch a recompile: a new rank is one."""
    run = torch.compile(functional.dora_linear, fullgraph=True, backend="aot_eager")
    run(*linear_inputs((4, 8, 8, 2), dtype=torch.float32).tensors(), scaling=0.5)
    run(*linear_inputs((6, 8, 8, 2), dtype=torch.float32).tensors(), scaling=0.5)
    with torch.compiler.set_stance("fail_on_recompile"), pytest.raises(RuntimeError, match="recompile"):
        run(*linear_inputs((6, 8, 8, 3), dtype=torch.float32).tensors(), scaling=0.5)
