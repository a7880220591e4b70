"""Compiled layers over the columns of a weight: what follows the ranks' sum, and what it saves.

On two ranks of torch's fake group, whose sums are the summands: the numbers are tests/test_tensor_parallel.py's.
"""

import pytest
import torch
from torch import nn

import dorac
from dorac.bench import mesh as meshes

pytest.importorskip("torch.testing._internal.distributed.fake_pg")

TOKENS, HIDDEN, INTERMEDIATE, RANK = 6, 8, 12, 2


class Block(nn.Module):
    """A layer whose input and output a residual's norm saves, too."""

    def __init__(self, bias):
        super().__init__()
        self.down = nn.Linear(INTERMEDIATE, HIDDEN, bias=bias)
        self.requires_grad_(False)
        dorac.apply_dora(self, ["down"], r=RANK, init_lora_weights=False)

    def forward(self, x, stream):
        stream = stream + self.down(x)
        return stream + nn.functional.rms_norm(stream, (HIDDEN,))


@pytest.fixture
def mesh():
    from torch.distributed.tensor import init_device_mesh

    with meshes.fake_ranks(2):
        yield init_device_mesh("cpu", (2,))


def graphs(mesh, block, **style):
    """Those of forward and backward of a step."""
    from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch.distributed.tensor.parallel import parallelize_module

    from dorac.parallel import RowwiseParallel

    model = parallelize_module(block, mesh, {"down": RowwiseParallel(**style)}, src_data_rank=None)
    seen = []

    def note(graph, inputs):
        seen.append(graph)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=note, bw_compiler=note, partition_fn=min_cut_rematerialization_partition)
    function = torch.compile(model, backend=backend, fullgraph=True)
    x = torch.randn(TOKENS, INTERMEDIATE // 2, requires_grad=True)
    stream = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    function(x, stream).sum().backward()
    return seen


def calls(graph, name):
    return [n for n in graph.graph.nodes if n.op == "call_function" and name in str(n.target)]


def sums(forward):
    """Of activations, not of norms."""
    return [n for n in calls(forward, "all_reduce") if n.meta["val"].shape == (TOKENS, HIDDEN)]


@pytest.mark.parametrize("bias", [False, True])
def test_g_is_applied_to_the_sum(bias, mesh):
    forward, backward = graphs(mesh, Block(bias))
    (summed,) = sums(forward)
    assert "low_rank_linear" in str(summed.args[0].target)
    # The magnitude's gradient is that of all ranks: lora_B's is summed alone.
    (due,) = calls(backward, "gradient_sums")
    assert [t.numel() for t in due.meta["val"]] == [HIDDEN * RANK]
    assert not calls(backward, "all_reduce")


def test_what_is_saved_is_the_sum_in_place_of_the_output(mesh):
    """LoRA saves the stream or the layer's output for the norm: nothing of that size comes to it."""
    forward, _ = graphs(mesh, Block(False))
    (output,) = (n for n in forward.graph.nodes if n.op == "output")
    saved = [n for n in output.args[0][1:] if n is not None and n.op == "call_function"]
    large = [n for n in saved if n.meta["val"].numel() == TOKENS * HIDDEN]
    assert [str(n.target) for n in large] == ["_c10d_functional.wait_tensor.default"]


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer, "norm_grad", True),
        lambda layer: setattr(layer, "lora_dropout", 0.5),
        lambda layer: layer.base_layer.weight.requires_grad_(),
        lambda layer: [setattr(layer, n, nn.Parameter(getattr(layer, n).double())) for n in ("lora_A", "lora_B")],
    ],
)
def test_other_layers_apply_it_before(change, mesh):
    block = Block(False)
    change(block.down)
    forward, _ = graphs(mesh, block)
    (summed,) = sums(forward)
    assert "low_rank_linear" not in str(summed.args[0].target)


@pytest.mark.parametrize("transform", ["grad", "jvp"])
def test_under_a_transform_the_sum_is_there(transform, mesh):
    """The op is aten there, and has none."""
    from torch._dynamo.testing import AotEagerAndRecordGraphs
    from torch.distributed.tensor.parallel import parallelize_module

    from dorac.parallel import RowwiseParallel

    model = parallelize_module(Block(False).down, mesh, RowwiseParallel(), src_data_rank=None)
    dorac.cache_norms(model)
    backend, x = AotEagerAndRecordGraphs(), torch.randn(TOKENS, INTERMEDIATE // 2)

    def run(x):
        if transform == "grad":
            return torch.func.grad(lambda x: model(x).square().sum())(x)
        return torch.func.jvp(model, (x,), (x,))[0]

    torch._dynamo.reset()
    torch.compile(run, backend=backend, fullgraph=True)(x)
    assert len(sums(backend.fw_graphs[0])) == 1
