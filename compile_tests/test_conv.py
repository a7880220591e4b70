"""A small convolutional model, adapted: one graph, forward and backward, in either memory format; no recompile."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend

import dorac
from dorac import functional
from dorac.testing import CONVOLUTIONS, conv_inputs


class Block(nn.Module):
    """A depthwise separable block beside a dilated convolution with borders that wrap around."""

    def __init__(self, channels):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.pointwise = nn.Conv2d(channels, channels, 1)
        self.wide = nn.Conv2d(channels, channels, 3, padding="same", dilation=2, groups=2, padding_mode="circular")

    def forward(self, x):
        return x + self.pointwise(self.depthwise(x).relu()) + self.wide(x).relu()


def adapted(**options):
    model = nn.Sequential(nn.Conv2d(3, 8, 4, stride=2, padding=1), Block(8), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model.append(nn.Linear(8, 5))
    names = dorac.apply_dora(
        model, ["0", "depthwise", "pointwise", "wide", "4"], r=8, init_lora_weights=False, **options
    )
    assert len(names) == 5
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "magnitude" in name:
                p.mul_(1 + 0.1 * torch.rand_like(p))
    return model


def images(batch, size, memory_format):
    return torch.randn(batch, 3, size, size).contiguous(memory_format=memory_format)


@pytest.mark.parametrize(
    "memory_format", [torch.channels_last, pytest.param(torch.contiguous_format, marks=pytest.mark.full)]
)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
@pytest.mark.parametrize("grouped_lora_A", [False, pytest.param(True, marks=pytest.mark.full)])
def test_equals_eager_without_recompiles(memory_format, backend, grouped_lora_A):
    model = adapted(grouped_lora_A=grouped_lora_A).to(memory_format=memory_format)
    twin = copy.deepcopy(model)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)

    def step(batch, size):
        x = images(batch, size, memory_format)
        model.zero_grad()
        twin.zero_grad()
        y, expected = compiled(x), twin(x)
        torch.testing.assert_close(y, expected)
        y.square().sum().backward()
        expected.square().sum().backward()
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            assert (p.grad is None) == (q.grad is None), name
            if p.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=name)

    # Inductor compiles a stack of plain convolutions again for each size of the images.
    sizes = (12, 16, 18, 24) if backend == "aot_eager" else (12, 12, 12, 12)
    step(4, sizes[0])
    assert counter.frame_count == 1
    step(6, sizes[1])
    assert counter.frame_count == 2
    with torch.compiler.set_stance("fail_on_recompile"):
        step(3, sizes[2])
        step(7, sizes[3])


def test_dropout_draws_the_same_mask():
    layer = dorac.nn.DoraConv2d(nn.Conv2d(4, 6, 3), r=2, lora_dropout=0.4, init_lora_weights=False)
    x = torch.randn(2, 4, 8, 8)
    torch.manual_seed(1)
    eager = layer(x)
    torch.manual_seed(1)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), eager)


@pytest.mark.parametrize("case", ["1d_strided", "2d_grouped_peft"])
def test_the_graph_shows_the_ops(case):
    """The norm and compose are one node each; the convolutions are torch's own, three of them."""
    backend = AotEagerAndRecordGraphs()
    convolution = CONVOLUTIONS[case]
    function = getattr(functional, f"dora_conv{convolution.dimensions}d")
    inputs = conv_inputs(case, dtype=torch.float32)
    torch.compile(function, fullgraph=True, backend=backend)(*inputs.tensors(), scaling=0.7, **convolution.geometry)
    (graph,) = backend.graphs
    targets = [str(node.target) for node in graph.graph.nodes]
    assert targets.count("dorac.norm_factored") == 1
    assert targets.count("dorac.compose") == 1
    assert sum(f"conv{convolution.dimensions}d" in target for target in targets) == 3


def test_functional_scalings_do_not_recompile():
    inputs = conv_inputs("2d_grouped_peft", dtype=torch.float32)
    geometry = CONVOLUTIONS["2d_grouped_peft"].geometry
    run = torch.compile(functional.dora_conv2d, fullgraph=True, backend="aot_eager")
    for scaling in (0.5, 2.0):
        run(*inputs.tensors(), scaling=scaling, **geometry)
    with torch.compiler.set_stance("fail_on_recompile"):
        for scaling in (1.3, -1.0, 17.25):
            expected = functional.dora_conv2d(*inputs.tensors(), scaling=scaling, **geometry)
            torch.testing.assert_close(run(*inputs.tensors(), scaling=scaling, **geometry), expected)


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.full)])
def test_export_is_plain_aten(strict):
    model = adapted()
    x = images(4, 12, torch.contiguous_format)
    dynamic = {"input": {0: torch.export.Dim("batch")}}
    program = torch.export.export(model, (x,), dynamic_shapes=dynamic, strict=strict).run_decompositions()
    assert not any("dorac" in str(node.target) for node in program.graph.nodes)
    for batch in (2, 5):
        x = images(batch, 12, torch.contiguous_format)
        torch.testing.assert_close(program.module()(x), model(x))
