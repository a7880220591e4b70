"""The compile contract: every function, module and PEFT layer under every guarantee. A cell of the table is one test.

``python -m pytest compile_tests/test_contract.py -m ""`` runs all of them and prints the table; CI runs a sample.
"""

import functools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from contract import ROWS, Row
from torch import Tensor, nn
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from dorac.testing import releases, rms_error

SIZES = ((2, 8), (2, 12), (3, 12), (5, 33), (4, 7))  # of batch and length; the first three warm up
SCALINGS = (0.5, 2.0, 1.3, -1.0, 0.25)
EAGER = {"fullgraph": True, "backend": "aot_eager"}
# What is worth keeping when activations are recomputed: products and the norm. A name that this torch has no op for
# would raise here.
EXPENSIVE = [
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.convolution.default,
    torch.ops.dorac.row_norm.default,
    torch.ops.dorac.low_rank_linear.default,
    torch.ops.dorac.up_compose_forward.default,
]


def outcome(forward, module: nn.Module, arguments: tuple[Tensor, ...]) -> list[Tensor]:
    """The result, then the gradients of inputs and parameters that have one; the same dropout mask every time."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in arguments]
    wanted = [t for t in (*leaves, *module.parameters()) if t.requires_grad]
    torch.manual_seed(1)
    y = forward(*leaves)
    if not y.requires_grad:
        return [y]
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), wanted)]


def check(forward, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    """Float32 results of two orders of one sum lie within torch's own tolerances, of the largest element's size."""
    actual = outcome(forward, module, arguments)
    for got, exact in zip(actual, outcome(module, module, arguments), strict=True):
        atol = 1e-5 * max(1.0, exact.abs().max().item())
        torch.testing.assert_close(got, exact, rtol=1.3e-6, atol=atol)
        assert got.count_nonzero()


def check_recomputed(row: Row, forward, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    """As ``check``, where backward draws the dropout mask again.

    On CUDA the compiler gives such graphs a generator of their own, so that their masks are others than in eager. That
    backward has the mask of forward shows without them: y is linear in x, hence ``<x, dx> = <y - b, dy>``.
    """
    if not (row.drops and arguments[0].is_cuda):
        check(forward, module, arguments)
        return
    y, dx, *_ = outcome(forward, module, arguments)
    bias = module(torch.zeros_like(arguments[0])).detach()
    torch.testing.assert_close((arguments[0] * dx).sum(), ((y - bias) * 2 * y).sum())
    undropped, *_ = outcome(module.eval(), module, arguments)
    module.train()
    assert not torch.allclose(y, undropped)


def fullgraph(row: Row, device: str) -> None:
    module = row.make(device)
    counter = CompileCounterWithBackend("aot_eager")
    check(torch.compile(module, fullgraph=True, backend=counter), module, row.arguments(device))
    assert counter.frame_count == 1


def cold_start(row: Row, device: str) -> None:
    name = next(name for name, other in ROWS.items() if other is row)
    code = (
        "import torch, contract\n"
        f"row = contract.ROWS[{name!r}]\n"
        f"module = row.make({device!r})\n"
        f"arguments = [t.requires_grad_(t.is_floating_point()) for t in row.arguments({device!r})]\n"
        "y = torch.compile(module, fullgraph=True, backend='aot_eager')(*arguments)\n"
        "assert y.isfinite().all()\n"
        "if y.requires_grad:\n"
        "    y.sum().backward()\n"
        "    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)\n"
    )
    folder = Path(__file__).parent
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=folder)
    assert run.returncode == 0, run.stderr


def recompiles(row: Row, device: str) -> None:
    """Neither batch nor length, scaling nor layer, after two of each."""
    layers = [row.make(device, scaling=scaling, seed=i) for i, scaling in enumerate(SCALINGS)]
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(lambda module, *arguments: module(*arguments), fullgraph=True, backend=counter)

    def step(layer: nn.Module, size: tuple[int, int]) -> None:
        check(functools.partial(run, layer), layer, row.arguments(device, *size))

    step(layers[0], SIZES[0])
    for layer in layers[:2]:
        for size in SIZES[:3]:
            step(layer, size)
    # The first, and one for each of scaling, length and batch as it becomes symbolic; PEFT's scaling is compared with
    # lora_alpha / r of its layer, another number.
    of_peft = next(name for name, other in ROWS.items() if other is row).startswith("PEFT")
    assert counter.frame_count <= 4 + of_peft
    with torch.compiler.set_stance("fail_on_recompile"):
        for layer in layers:
            for size in SIZES:
                step(layer, size)


class Several(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, *arguments: Tensor) -> Tensor:
        return torch.stack([layer(*arguments) for layer in self.layers])


def ranks(row: Row, device: str) -> None:
    """More ranks than torch recompiles for: one graph for a whole model, and two where layers share their code."""
    layers = [row.make(device, rank=rank) for rank in (4, 8, *range(9, 17))]
    counter = CompileCounterWithBackend("aot_eager")
    model = Several(layers)
    check(torch.compile(model, fullgraph=True, backend=counter), model, row.arguments(device))
    assert counter.frame_count == 1
    counter.clear()
    run = torch.compile(lambda module, *arguments: module(*arguments), fullgraph=True, backend=counter)
    # PEFT's factors are the parameters of layers of torch's, whose shapes the second flag is about.
    flags = {"force_parameter_static_shapes": False, "force_nn_module_property_static_shapes": False}
    with torch._dynamo.config.patch(flags):
        for layer in layers:
            check(functools.partial(run, layer), layer, row.arguments(device))
    assert counter.frame_count == 2


def flips(row: Row, device: str) -> None:
    """Train and eval, with and without gradients, frozen and not: a graph for each, and none on the way back.

    A cached norm is in doubt after a flip, for which each of them may have a second graph, seen in the second round.
    """
    module = row.make(device)
    compiled = torch.compile(module, **EAGER)
    arguments = row.arguments(device)
    trained = [p for p in module.parameters() if p.requires_grad]

    def go_round() -> None:
        for mode in (True, False):
            module.train(mode)
            check(compiled, module, arguments)
            with torch.no_grad():
                check(compiled, module, arguments)

    def frozen(flag: bool) -> None:
        trained[-1].requires_grad_(not flag)
        if not releases.SEES_FLIPPED_FLAGS:  # dorac/docs/compiling.md says so
            torch._dynamo.reset()

    graphs = 2 if getattr(module, "kept", None) is not None else 1
    with torch._dynamo.config.patch(recompile_limit=8 * graphs):
        for flag in (False, True) * graphs:
            frozen(flag)
            go_round()
    stance = "fail_on_recompile" if releases.SEES_FLIPPED_FLAGS else "default"
    with torch.compiler.set_stance(stance):
        for flag in (False, True, False):
            frozen(flag)
            go_round()


def dynamic(row: Row, device: str) -> None:
    """One graph for all sizes, from the first call on."""
    module = row.make(device)
    compiled = torch.compile(module, dynamic=True, **EAGER)
    check(compiled, module, row.arguments(device, *SIZES[0]))
    with torch.compiler.set_stance("fail_on_recompile"):
        for size in SIZES:
            check(compiled, module, row.arguments(device, *size))


def max_autotune(row: Row, device: str) -> None:
    module = row.make(device)
    with torch._inductor.config.patch(fallback_random=True):
        compiled = torch.compile(module, fullgraph=True, mode="max-autotune-no-cudagraphs")
        check(compiled, module, row.arguments(device))


def reduce_overhead(row: Row, device: str) -> None:
    """Recorded, replayed on other values, and replayed after the parameters have changed in place."""
    module = row.make(device)
    skips = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
    with torch._inductor.config.patch(fallback_random=True):
        compiled = torch.compile(module, fullgraph=True, mode="reduce-overhead")

        def forward(*arguments: Tensor) -> Tensor:
            torch.compiler.cudagraph_mark_step_begin()
            return compiled(*arguments).clone()

        arguments = row.arguments(device)
        for _ in range(3):
            check(forward, module, arguments)
            arguments = tuple(t.mul(1.1) if t.is_floating_point() else t for t in arguments)
        optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1)
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        optimizer.step()
        check(forward, module, arguments)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == skips


def optimizer(row: Row, device: str) -> None:
    """Training with model and optimizer step compiled, as without."""

    def train(compiled: bool) -> list[Tensor]:
        module = row.make(device)
        trained = [p for p in module.parameters() if p.requires_grad]
        adam = torch.optim.AdamW(trained, lr=1e-2)
        forward = torch.compile(module, **EAGER) if compiled else module
        step = torch.compile(adam.step, backend="aot_eager") if compiled else adam.step
        arguments = row.arguments(device)
        results = []
        for _ in range(3):
            y, *grads = outcome(forward, module, arguments)
            for p, grad in zip(trained, grads[-len(trained) :], strict=True):
                p.grad = grad
            step()
            results.append(y)
        return [*results, *trained]

    actual, expected = train(True), train(False)
    torch.testing.assert_close(actual, expected)
    assert not torch.equal(actual[0], actual[2])


def checkpointed(row: Row, device: str) -> None:
    module = row.make(device)

    def forward(*arguments: Tensor) -> Tensor:
        return checkpoint(module, *arguments, use_reentrant=False)

    check_recomputed(row, torch.compile(forward, **EAGER), module, row.arguments(device))
    check(forward, module, row.arguments(device))


def selective(row: Row, device: str) -> None:
    """With products and norms saved, none of them runs again in backward."""
    module = row.make(device)
    arguments = row.arguments(device)
    save = functools.partial(create_selective_checkpoint_contexts, EXPENSIVE)

    def expensive_calls(forward) -> int:
        backend = AotEagerAndRecordGraphs()
        torch._dynamo.reset()
        check_recomputed(row, torch.compile(forward, fullgraph=True, backend=backend), module, arguments)
        graphs = (*backend.fw_graphs, *backend.bw_graphs)
        return sum(node.target in EXPENSIVE for graph in graphs for node in graph.graph.nodes)

    def saved(*arguments: Tensor) -> Tensor:
        return checkpoint(module, *arguments, use_reentrant=False, context_fn=save)

    assert expensive_calls(saved) == expensive_calls(module)
    check(saved, module, arguments)


def autocast(row: Row, device: str) -> None:
    """Compiled under autocast as exact as eager under autocast, against the truth without it.

    By RMS error, not by the largest: dy = 2 y carries y's own roundings, so that the two round different numbers; the
    largest error among the few elements of a magnitude's gradient varies threefold from draw to draw where RMS errors
    over 165 tokens stay within 1.3.
    """
    module = row.make(device)
    compiled = torch.compile(module, **EAGER)
    arguments = row.arguments(device, 5, 33)
    with torch.autocast(device, dtype=torch.bfloat16):
        actual = outcome(compiled, module, arguments)
        eager = outcome(module, module, arguments)
    truth = outcome(module, module, arguments)
    for got, dense, exact in zip(actual, eager, truth, strict=True):
        assert got.dtype == dense.dtype
        # What stays in float32 is the truth itself in eager; its sums run in another order compiled.
        rounding = 2 * torch.finfo(torch.float32).eps * exact.abs().max().item()
        assert rms_error(got, exact) <= 1.5 * rms_error(dense, exact) + rounding


COLUMNS = {
    "fullgraph": fullgraph,
    "cold start": cold_start,
    "recompiles": recompiles,
    "ranks": ranks,
    "flips": flips,
    "dynamic": dynamic,
    "max-autotune": max_autotune,
    "reduce-overhead": reduce_overhead,
    "optimizer": optimizer,
    "checkpoint": checkpointed,
    "selective": selective,
    "autocast": autocast,
}
SLOW = ("cold start", "max-autotune")  # a process, or a C++ compiler
GPU_ONLY = ("reduce-overhead",)


def all_cells() -> list:
    """Every cell; CI runs one of each row, taking the columns in turns."""
    cells, quick = [], [column for column in COLUMNS if column not in (*SLOW, *GPU_ONLY)]
    for i, (name, row) in enumerate(ROWS.items()):
        for column in COLUMNS:
            if column in row.lacks:
                continue
            sampled = column == quick[i % len(quick)]
            cells.append(pytest.param(name, column, id=f"{name}-{column}", marks=[] if sampled else pytest.mark.full))
    return cells


@pytest.mark.parametrize(("name", "column"), all_cells())
def test_contract(name, column, device, record_property):
    record_property("contract", [device, name, column])
    if column in GPU_ONLY and device == "cpu":
        pytest.skip("needs a CUDA device")
    COLUMNS[column](ROWS[name], device)
