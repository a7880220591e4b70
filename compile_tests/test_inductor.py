"""The code that Inductor generates: compose fuses with its neighbours, nothing of size out x in is built."""

import re

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code

import dorac
import dorac.reference
from dorac.ops import eager, front, horizontal, inductor
from dorac.testing import rms_error


def block(device, base=None, **options):
    """A DoRA layer with what surrounds it in a transformer: an activation and a residual."""
    base = (nn.Linear(24, 40) if base is None else base).to(device)
    layer = dorac.nn.layer_class(base)(base, init_lora_weights=False, **{"r": 4, **options})
    nn.init.uniform_(layer.lora_magnitude_vector, 0.5, 1.5)
    return lambda x, residual: residual + nn.functional.gelu(layer(x))


def launches(code):
    """The names of the kernels that the generated code calls, each with what was fused into it."""
    body = code.partition("def call(")[2]
    return re.findall(r"^\s*((?:cpp|triton)_\w*fused_\w+)(?:\.run)?\(", body, re.MULTILINE)


def buffers(code):
    """The shapes that the generated code allocates."""
    shapes = re.findall(r"empty_strided_(?:cpu|cuda)\w*\(\(([\d, ]*)\)", code)
    return {tuple(int(n) for n in shape.replace(" ", "").split(",") if n) for shape in shapes}


def test_compose_fuses_with_its_neighbours(device):
    function = block(device)
    x, residual = torch.randn(7, 24, device=device), torch.randn(7, 40, device=device)
    with torch.no_grad():
        y, (code, *rest) = run_and_get_code(torch.compile(function, fullgraph=True), x, residual)
        torch.testing.assert_close(y, function(x, residual))
    assert not rest
    body = code.partition("def call(")[2]
    assert ("row_norm_kernel" if device == "cuda" else "dorac.row_norm") in body
    assert "dorac.compose" not in body
    assert "dorac.scale" not in body
    kernels = launches(code)
    # Compose, activation and residual are that one kernel; what is left makes s and, on CUDA, g and s * h.
    assert [k for k in kernels if "gelu" in k] == kernels[-1:], kernels
    assert len(kernels) <= (4 if device == "cuda" else 3), kernels


@pytest.fixture
def not_padded():
    """Of these small sizes no product is padded, which Inductor decides by the time they take."""
    with torch._inductor.config.patch(shape_padding=False):
        yield


@pytest.mark.usefixtures("not_padded")
def test_g_is_divided_once(device, monkeypatch):
    """Not for every element of y, in the kernel that reads it; in the form that large ranks take on CUDA."""
    monkeypatch.setattr(front, "has_kernels", lambda *tensors: True)
    function = block(device, r=80)
    x, residual = torch.randn(70, 24, device=device), torch.randn(70, 40, device=device)
    with torch.no_grad():
        y, (code,) = run_and_get_code(torch.compile(function, fullgraph=True), x, residual)
        monkeypatch.undo()
        torch.testing.assert_close(y, function(x, residual))
    assert "= torch.ops.dorac.low_rank_linear" not in code
    assert re.search(r"extern_kernels.addmm\((\w+), .*, out=\1\)", code)
    assert "dorac.mag_scale.default(" not in code
    kernels = launches(code)
    assert sum("gelu" in kernel for kernel in kernels) == 1
    assert not any("div" in kernel for kernel in kernels)
    assert sum("triton_for" in kernel or "mag_scale" in kernel for kernel in kernels) == 1
    # What the GEMM of s * h does not read.
    assert not any("zeros" in kernel or "select" in kernel for kernel in kernels)


@pytest.mark.usefixtures("not_padded")
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_passes_over_parameters_are_one_launch(adapter_dtype, device, monkeypatch):
    """On CUDA, whatever the layers' sizes: g and the factors under autocast, and in backward the factors' gradients."""
    monkeypatch.setattr(front, "has_kernels", lambda *tensors: True)
    monkeypatch.setattr(eager, "dora_linear", lambda *args: None)
    stack = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24), nn.GELU(), nn.Linear(24, 32))
    stack = stack.to(device, torch.bfloat16)
    dorac.apply_dora(stack, ["0", "2", "4"], r=4, init_lora_weights=False, adapter_dtype=adapter_dtype)
    trained = {name: p for name, p in stack.named_parameters() if p.requires_grad}
    for name, p in trained.items():
        if "magnitude" in name:
            nn.init.uniform_(p, 0.5, 1.5)
    dorac.cache_norms(stack)
    x = torch.randn(70, 24, dtype=torch.bfloat16, device=device, requires_grad=True)

    def step(run):
        with torch.autocast(device, torch.bfloat16, enabled=adapter_dtype is torch.float32):
            y = run(x)
        return [y, *torch.autograd.grad(y.square().sum(), [x, *trained.values()])]

    actual, codes = run_and_get_code(step, torch.compile(stack, fullgraph=True))
    expected = step(stack)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype is e.dtype
        assert rms_error(a, e, rms_error(e, torch.zeros_like(e))) < 2e-2  # bfloat16, in two orders
    casts = adapter_dtype is torch.float32
    for code, per_layer in zip(codes, (1 + 2 * casts, 2 * casts), strict=True):
        body = code.partition("def call(")[2]
        assert not re.search(r"dorac\.(mag_scale|cast)\.default\(", body)
        assert not any("select" in kernel for kernel in launches(code))
        together = re.findall(r"triton_for_fused_\w+\.run\(([^)]*)\)", body)
        assert len(together) == (device == "cuda" and per_layer > 0)
        for arguments in together:
            assert arguments.count(",") >= 3 * per_layer * 2


@pytest.mark.usefixtures("not_padded")
def test_passes_over_parameters_come_when_they_are_read(device, monkeypatch):
    """In a deep model's inference too: at the front the GPU would wait until the results of all were allocated."""
    monkeypatch.setattr(front, "has_kernels", lambda *tensors: True)
    monkeypatch.setattr(inductor, "PARTS", 6)
    stack = nn.Sequential(*(nn.Linear(24, 24) for _ in range(4))).to(device, torch.bfloat16)
    dorac.apply_dora(stack, [*"0123"], r=4, init_lora_weights=False)
    dorac.cache_norms(stack)
    x, graphs = torch.randn(70, 24, dtype=torch.bfloat16, device=device), []
    with (
        torch.no_grad(),
        torch.autocast(device, torch.bfloat16),
        torch._inductor.config.patch(post_grad_custom_post_pass=graphs.append),
    ):
        y, (code,) = run_and_get_code(torch.compile(stack, fullgraph=True), x)
        monkeypatch.undo()
        assert rms_error(y, stack(x), rms_error(y, torch.zeros_like(y))) < 2e-2
    nodes = [node for node in graphs[0].nodes if node.op != "placeholder"]
    ops = torch.ops.dorac.cast.default, torch.ops.dorac.mag_scale.default
    passes = [i for i, node in enumerate(nodes) if node.target in ops]
    assert len(passes) == 3 * 4
    for i in passes:
        first = min(map(nodes.index, nodes[i].users))
        assert all(j in passes or nodes[j].target.is_view for j in range(i, first)), graphs
    if device == "cuda":
        calls = re.findall(r"(triton_for_fused|extern_kernels)\w*\.", code.partition("def call(")[2])
        assert calls.count("triton_for_fused") == 2
        assert calls.index("extern_kernels") < len(calls) - calls[::-1].index("triton_for_fused") - 1


def test_passes_over_parameters_come_before_these_are_written(device):
    """What is written to an input of the graph, is at its end: a pass over another value of it stays in its place."""

    def step(parameter, copy, x):
        cast = torch.ops.dorac.cast(parameter, torch.bfloat16)
        parameter.add_(1)
        copy.copy_(cast)
        return 2 * x

    parameter, x = torch.randn(4, 4, device=device), torch.randn(3, device=device)
    copy, expected = torch.zeros_like(parameter, dtype=torch.bfloat16), parameter.bfloat16()
    torch.compile(step, fullgraph=True)(parameter, copy, x)
    torch.testing.assert_close(copy, expected, rtol=0, atol=0)


def test_a_pass_comes_before_all_of_its_views():
    graph = torch.fx.Graph()
    parameter, x = graph.placeholder("parameter"), graph.placeholder("x")
    cast = graph.call_function(torch.ops.dorac.cast.default, (parameter, torch.bfloat16))
    views = [graph.call_function(torch.ops.aten.view.default, (cast, [n, -1])) for n in (2, 4)]
    other = graph.call_function(torch.ops.aten.neg.default, (x,))
    product = graph.call_function(torch.ops.aten.mm.default, tuple(views))
    graph.output((other, product))
    horizontal.late(graph)
    graph.lint()
    nodes = [*graph.nodes]
    assert nodes.index(other) < nodes.index(cast) < min(map(nodes.index, views))


@pytest.mark.parametrize("kind", ["linear", "bfloat16", "dropout", "norm_grad", "embedding"])
def test_no_buffer_of_the_weight_size(kind, device):
    """Forward and backward of an adapted layer: the weight is 24 x 40 in each of them, and nothing else is."""
    options = {"dropout": {"lora_dropout": 0.5}, "norm_grad": {"norm_grad": True}}.get(kind, {})
    dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
    x = torch.randn(7, 24, dtype=dtype, device=device, requires_grad=True)
    base = nn.Linear(24, 40, dtype=dtype)
    if kind == "embedding":
        x, base = torch.randint(0, 24, (7,), device=device), nn.Embedding(24, 40)
    function = torch.compile(block(device, base, **options), fullgraph=True)
    residual = torch.randn(7, 40, dtype=dtype, device=device)
    _, codes = run_and_get_code(lambda: function(x, residual).sum().backward())
    assert len(codes) == 2
    for code in codes:
        shapes = buffers(code)
        assert shapes
        assert shapes.isdisjoint({(40, 24), (24, 40), (960,)}), shapes


def test_the_dense_formula_builds_them(device):
    """What the test above looks for is there where the product of the factors is formed."""
    x, weight, lora_A, lora_B = (torch.randn(s, device=device) for s in ((7, 24), (40, 24), (4, 24), (40, 4)))
    magnitude = torch.rand(40, device=device)
    dense = torch.compile(dorac.reference.dora_linear, fullgraph=True)
    _, codes = run_and_get_code(dense, x, weight, lora_A, lora_B, magnitude, scaling=2.0)
    assert (40, 24) in buffers(codes[0])
