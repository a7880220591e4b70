"""Compiled code launches dorac's kernels itself: no op whose implementation is Python runs in it."""

import os
import re
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from dorac import functional
from dorac.ops import front
from dorac.ops.library import inlined
from dorac.testing import linear_inputs, rms_error

TOKENS, OUT, IN = 4096, 4096, 2048
EXPERTS = 8
# And a view.
BUFFERS = {torch.ops.aten.empty, torch.ops.aten.empty_like, torch.ops.aten.new_empty, torch.ops.aten.transpose}
# Per op and rank the kernels, each with its grid, on tensors of these sizes.
LAUNCHES = {
    ("row_norm", 16): [("row_norm_kernel", (64, 4, 1)), ("finish_kernel", (16, 1, 1))],
    ("scale", 16): [("compose_kernel", (4096, 1, 1))],
    ("scale_backward", 16): [("compose_backward_kernel", (32, 16, 1)), ("strip_sum_kernel", (64, 1, 1))],
    ("lora_b_backward", 16): [("lora_b_backward_kernel", (32, 4, 1)), ("lora_b_sum_kernel", (192, 1, 1))],
    ("up_compose", 384): [("compose_kernel", (1024, 1, 1))],
    ("up_compose_forward", 16): [("compose_kernel", (512, 1, 1))],
    ("grouped_compose_value", 384): [("segment_compose_kernel", (2304, 1, 1))],
    ("grouped_compose_forward", 16): [("segment_compose_kernel", (1280, 1, 1))],
    ("grouped_compose_backward", 16): [
        ("segment_backward_kernel", (384, 1, 1)),
        ("segment_sum_kernel", (1088, 1, 1)),
        ("segment_product_kernel", (216, 1, 1)),
        ("strip_sum_kernel", (256, 1, 1)),
    ],
}


def leaf_arguments(op: torch._ops.OpOverload, rank: int) -> list[Tensor | bool | None]:
    half = {"dtype": torch.bfloat16, "device": "cuda"}
    vector, activation = torch.empty(OUT, device="cuda"), torch.empty(TOKENS, OUT, **half)
    known = {
        "weight": torch.empty(OUT, IN, **half),
        "lora_A": torch.empty(rank, IN, **half),
        "lora_B": torch.empty(OUT, rank, **half),
        "h": torch.empty(TOKENS, rank, **half),
        "scaling": torch.empty((), device="cuda"),
        **dict.fromkeys(("dy", "inner", "base"), activation),
        **dict.fromkeys(("magnitude", "weight_norm", "bias"), vector),
        **{"weight_sq": None, "budget": 1, "delta": False, "holds_bias": False, "h_is_scaled": True},
    }
    if op.name().startswith("dorac::grouped"):
        for name in ("lora_B", "magnitude", "weight_norm", "bias"):
            known[name] = known[name].new_empty(EXPERTS, *known[name].shape)
        known["offsets"] = torch.empty(EXPERTS, dtype=torch.int32, device="cuda")
    return [known[argument.name] for argument in op._schema.arguments]


def test_every_leaf_with_kernels_is_inlined():
    assert {op.name() for op in inlined} == {f"dorac::{name}" for name, _ in LAUNCHES}


interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="this is for Triton's interpreter")
compiled = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter traces nothing")


@interpreted
def test_what_is_traced_beside_tests_of_kernels():
    """Whoever runs those in the same process has the interpreter on: the tests below in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "test_what_is_traced"]
    result = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert f"{len(LAUNCHES)} passed" in result.stdout or "." * len(LAUNCHES) in result.stdout


@compiled
@pytest.mark.parametrize(("name", "rank"), LAUNCHES)
def test_what_is_traced(name, rank):
    """Buffers and the op's launches, and nothing else: no copy, no fill."""
    pytest.importorskip("triton")
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_mutation

    op = getattr(torch.ops.dorac, name).default
    with FakeTensorMode():
        arguments = leaf_arguments(op, rank)
        places = [i for i, a in enumerate(arguments) if isinstance(a, Tensor)]

        def launch(*tensors):
            given = dict(zip(places, tensors, strict=True))
            return inlined[op](*(given.get(i, a) for i, a in enumerate(arguments)))

        graph = make_fx(launch)(*(arguments[i] for i in places)).graph
    launches = []
    for node in graph.find_nodes(op="call_function", target=triton_kernel_wrapper_mutation):
        tuner = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
        launches.append((tuner.fn.__name__, *node.kwargs["grid"]))
    assert launches == LAUNCHES[name, rank]
    others = [n for n in graph.nodes if n.op == "call_function" and n.target is not triton_kernel_wrapper_mutation]
    assert {node.target.overloadpacket for node in others} <= BUFFERS


def relative_error(actual: Tensor, exact: Tensor) -> float:
    return rms_error(actual, exact) / exact.double().square().mean().sqrt().item()


def layer(x, weight, lora_A, lora_B, magnitude):
    return functional.dora_linear(x, weight, lora_A, lora_B, magnitude, scaling=0.7)


def layer_inputs(tokens: int, rank: int, dtype: torch.dtype) -> list[Tensor]:
    x, weight = torch.randn(tokens, 192, dtype=torch.bfloat16), torch.randn(320, 192, dtype=torch.bfloat16)
    lora_A, lora_B = torch.randn(rank, 192, dtype=dtype) / 14, torch.randn(320, rank, dtype=dtype) / 9
    magnitude = torch.linspace(10, 20, 320)
    return [t.cuda().requires_grad_() if t is not weight else t.cuda() for t in (x, weight, lora_A, lora_B, magnitude)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", [16, 24, 128])
@pytest.mark.parametrize("tokens", [48, 200, 256])
def test_no_op_in_generated_code(tokens, rank, dtype):
    """Forward and backward, with the results of eager to the rounding of another form."""
    inputs = layer_inputs(tokens, rank, dtype)
    leaves = [t for t in inputs if t.requires_grad]

    def train(function):
        y = function(*inputs)
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    compiled = torch.compile(layer, fullgraph=True)
    results, codes = run_and_get_code(train, compiled)
    assert len(codes) == 2
    for code in codes:
        assert "= torch.ops.dorac" not in code
        assert re.search(r"\w+_kernel_\d+\.run\(", code)
    for got, exact in zip(results, train(layer), strict=True):
        assert relative_error(got, exact) <= 2e-2
    with torch.no_grad():
        y, (code,) = run_and_get_code(compiled, *inputs)
    assert "= torch.ops.dorac" not in code
    assert relative_error(y, results[0]) <= 2e-2


@pytest.mark.parametrize("has_bias", [False, True])
def test_over_a_product(has_bias, device, monkeypatch):
    """``dora_over``, whose op has an argument with a default; on the CPU the kernels stay ops, with theirs."""
    if device == "cpu":
        monkeypatch.setattr(front, "has_kernels", lambda *tensors: True)
    inputs = linear_inputs((64, 48, 32, 8), dtype=torch.bfloat16, device=device)
    norm = functional.norm_factored(*inputs.tensors()[1:4], 0.7)
    bias = inputs.bias.detach() if has_bias else None
    base = torch.nn.functional.linear(inputs.x, inputs.weight, bias).detach()
    leaves = [t.detach().requires_grad_() for t in (base, inputs.x, inputs.lora_A, inputs.lora_B, inputs.magnitude)]

    def layer_over(*tensors):
        return functional.dora_over(*tensors, bias, weight_norm=norm, scaling=0.7, base_has_bias=has_bias)

    def train(function):
        y = function(*leaves)
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    results, codes = run_and_get_code(train, torch.compile(layer_over, fullgraph=True))
    for code in codes:
        assert ("= torch.ops.dorac" in code) is (device == "cpu")
    monkeypatch.undo()
    for got, exact in zip(results, train(layer_over), strict=True):
        assert relative_error(got, exact) <= 2e-2


def test_the_second_product_of_dropout_is_added_in_place(monkeypatch):
    """In the form that a GPU takes; on the CPU the kernel between the products stays an op."""
    monkeypatch.setattr(front, "has_kernels", lambda *tensors: True)
    inputs = linear_inputs((64, 48, 32, 8), dtype=torch.bfloat16).leaves()
    inputs.weight.requires_grad_(False)
    leaves = [t for t in inputs.tensors() if t.requires_grad]

    def dropped(*tensors):
        return functional.dora_linear(*tensors, scaling=0.7, dropout_p=1e-9)  # nothing

    def train(function):
        y = function(*inputs.tensors())
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    results, (code, *_) = run_and_get_code(train, torch.compile(dropped, fullgraph=True))
    assert "= torch.ops.dorac.delta_linear" not in code
    assert re.search(r"extern_kernels\.addmm\((\w+), .*, out=\1\)", code)
    monkeypatch.setattr(front, "has_kernels", lambda *tensors: False)
    for got, exact in zip(results, train(dropped), strict=True):
        assert relative_error(got, exact) <= 1e-2


def test_caches_are_keyed_by_the_sources():
    """What is generated for an op is no part of the graph, by which the compiler's caches on disk know it."""
    read = "import torch, dorac; print(torch.compiler.config.cache_key_tag)"
    environment = {**os.environ, "TORCH_COMPILE_CACHE_KEY_TAG": "theirs"}
    command = [sys.executable, "-c", read]
    tag = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip()
    assert re.fullmatch(r"theirsdorac:[0-9a-f]{64}", tag)
    assert torch.compiler.config.cache_key_tag.endswith(tag.removeprefix("theirs"))
