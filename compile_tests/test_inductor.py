"""The code that Inductor generates on the CPU: compose fuses with its neighbours, nothing of size out x in is built."""

import re

import torch
from torch._inductor.utils import run_and_get_code

import dorac


def block():
    """A DoRA layer with what surrounds it in a transformer: an activation and a residual."""
    base = torch.nn.Linear(24, 40)
    layer = dorac.nn.DoraLinear(base, r=4, init_lora_weights=False)
    torch.nn.init.uniform_(layer.lora_magnitude_vector, 0.5, 1.5)
    return lambda x, residual: residual + torch.nn.functional.gelu(layer(x))


def test_compose_fuses_with_its_neighbours():
    function = block()
    x, residual = torch.randn(7, 24), torch.randn(7, 40)
    with torch.no_grad():
        y, (code, *rest) = run_and_get_code(torch.compile(function, fullgraph=True), x, residual)
        torch.testing.assert_close(y, function(x, residual))
    assert not rest
    body = code.partition("def call(")[2]
    assert "dorac.row_norm" in body
    assert "dorac.compose" not in body
    kernels = re.findall(r"^\s*(cpp_fused_\w+)\(", body, re.MULTILINE)
    assert len([k for k in kernels if "gelu" in k]) == 1, kernels
    # Compose, activation and residual are that one kernel; what is left makes s and g.
    assert len(kernels) <= 3, kernels


def test_no_buffer_of_the_weight_size():
    function = block()
    x = torch.randn(7, 24, requires_grad=True)
    _, codes = run_and_get_code(lambda: _backward(torch.compile(function, fullgraph=True), x, torch.randn(7, 40)))
    assert len(codes) == 2
    for code in codes:
        buffers = re.findall(r"empty_strided_cpu\(\((\d+), (\d+)\)", code)
        assert buffers
        assert {tuple(map(int, shape)) for shape in buffers}.isdisjoint({(40, 24), (24, 40)})


def _backward(function, *args):
    y = function(*args)
    y.sum().backward()
    return y
