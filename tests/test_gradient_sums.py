"""The sums of gradients that compiled backwards of tensor-parallel layers leave: one collective for a graph's."""

import copy
import itertools
import re
from unittest import mock

import pytest
import torch
from processes import WORLD, run
from test_tensor_parallel import adapted, same
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.library import opcheck

import dorac
from dorac.bench import mesh as meshes
from dorac.ops import gradient_sums

fake_pg = pytest.importorskip("torch.testing._internal.distributed.fake_pg")

WIDTH, RANK = 24, 4


class Mlp(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.gate, self.up = (adapted(features=(WIDTH, 32), rank=RANK, **options) for _ in range(2))
        self.down = adapted(features=(32, WIDTH), rank=RANK, **options)

    def forward(self, x):
        return x + self.down(self.gate(x).sigmoid() * self.up(x))


def plan(blocks):
    from dorac.parallel import ColwiseParallel, RowwiseParallel

    styles = {"gate": ColwiseParallel, "up": ColwiseParallel, "down": RowwiseParallel}
    return {f"{i}.{name}": style() for i in range(blocks) for name, style in styles.items()}


def spread(model, mesh):
    from torch.distributed.tensor.parallel import parallelize_module

    return parallelize_module(model, mesh, plan(len(model)), src_data_rank=None)


def compiled(mesh_shape):
    """Numbers of one process, and the collectives of a step, as a graph of all blocks and as one a block."""
    from torch.distributed.tensor import init_device_mesh

    torch.set_default_dtype(torch.float64)
    device = torch.get_default_device().type
    mesh = init_device_mesh(device, mesh_shape)
    torch.manual_seed(0)
    reference = nn.Sequential(Mlp(), Mlp())
    x, dy = torch.randn(2, 3, WIDTH), torch.randn(2, 3, WIDTH)
    cases = [(*case, {}) for case in itertools.product((True, False), repeat=2)]
    for whole, cached, options in (*cases, (True, True, {"pattern_matcher": False})):
        expected = copy.deepcopy(reference)
        model = spread(copy.deepcopy(reference), mesh)
        cache = dorac.cache_norms(model) if cached else None
        torch._dynamo.reset()
        forward = torch.compile(model, fullgraph=True, options=options) if whole else model
        for block in () if whole else model:
            block.compile(fullgraph=True, options=options)
        optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1) for m in (expected, model)]
        for _ in range(3):
            inputs = [x.clone().requires_grad_() for _ in range(2)]
            expected(inputs[0]).backward(dy)
            forward(inputs[1]).backward(dy)
            same(inputs[1].grad, inputs[0].grad)
            own = dict(model.named_parameters())
            for name, p in expected.named_parameters():
                if p.grad is not None:
                    same(own[name].grad, p.grad)
                    gradient = own[name].grad._local_tensor
                    assert gradient.untyped_storage().nbytes() == gradient.nbytes, name
            copy.deepcopy(model)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        forward(x.clone().requires_grad_()).backward(dy)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            forward(x.clone().requires_grad_()).backward(dy)
        events = [e for e in profile.events() if e.name.startswith("_c10d_functional::all_")]
        names = [e.name for e in events if e.cpu_parent is None or e.cpu_parent.name != e.name]
        # Of each block down's y and in backward x, of gate and of up; of down without a kept norm its squares.
        expected = 2 * (3 + (not cached)) + (1 if whole else 2)
        assert options or names == ["_c10d_functional::all_reduce_"] * expected, (whole, cached, names)
        if cache is not None:
            cache.remove()


@pytest.mark.parametrize("world", [WORLD, pytest.param(4, marks=pytest.mark.full)])
def test_numbers_and_collectives(world, device, tmp_path):
    run(compiled, tmp_path, device, (world,), world=world)


@pytest.fixture
def mesh():
    from torch.distributed.tensor import init_device_mesh

    with meshes.fake_ranks(2), torch._inductor.config.patch(force_disable_caches=True):
        yield init_device_mesh("cpu", (2,))


def collectives(code):
    return re.findall(r"_c10d_functional\.all_reduce_\.default\((\w+)", code)


def op(tensors, group):
    return torch.ops.dorac.gradient_sums(list(tensors), group)


def graph_of(function, *inputs):
    torch._dynamo.reset()
    _, (code,) = run_and_get_code(torch.compile(function, fullgraph=True), *inputs)
    return code.partition("def call(")[2]


def test_large_graphs_fill_several(mesh, monkeypatch):
    """A collective of a graph's first layers does not wait for those of its last."""
    name, tensors = mesh.get_group().group_name, [torch.randn(10) for _ in range(3)]

    def summed(*tensors):
        return [y for t in tensors for y in op([t + 1], name)]

    for limit, expected in ((3, [30]), (2, [20, 10]), (1, [10, 10, 10]), (0, [10, 10, 10])):
        monkeypatch.setattr(gradient_sums, "BUCKET_BYTES", limit * 40)
        code = graph_of(summed, *tensors)
        sizes = [int(re.search(rf"\b{n} = empty_strided_cpu\(\((\d+), \)", code)[1]) for n in collectives(code)]
        assert sizes == expected


def test_what_is_apart(mesh):
    """Groups, dtypes, and what the graph reads."""
    name, group = mesh.get_group().group_name, torch.distributed.new_group([0, 1])
    a, b = torch.randn(3, 5), torch.randn(7)

    def groups(a, b):
        return op([a + 1], name) + op([b + 1], group.group_name) + op([a + 2, b + 2], name)

    assert len(collectives(graph_of(groups, a, b))) == 2

    def dtypes(a, b):  # the second has the layer's own dtype, the wider of its two
        return op([a.bfloat16() * 2], name) + op([b + 1, b.bfloat16() * 2], name) + op([b.bfloat16() * 4], name)

    code = graph_of(dtypes, a, b)
    assert len(collectives(code)) == 2
    for actual, wanted in zip(torch.compile(dtypes)(a, b), dtypes(a, b), strict=True):
        assert actual.dtype is wanted.dtype
        torch.testing.assert_close(actual, wanted)

    def reads(a, b):
        (total,) = op([a + 1], name)
        return total.sin(), *op([b + 1], name), *op([total], name)

    assert len(collectives(graph_of(reads, a, b))) == 2
    for actual, wanted in zip(torch.compile(reads)(a, b), reads(a, b), strict=True):
        torch.testing.assert_close(actual, wanted)


def test_casts_go_into_the_buffer(mesh):
    """What a factor's gradient has under autocast: no buffer of its own comes to that of all sums and the results."""
    name, cast = mesh.get_group().group_name, torch.ops.dorac.cast

    def summed(a, b):
        return op([cast(a * 2, torch.float32)], name) + op([cast(b * 2, torch.float32)], name)

    tensors = torch.randn(3, 5).bfloat16(), torch.randn(7).bfloat16()
    code = graph_of(summed, *tensors)
    assert sorted(re.findall(r"= empty_strided_cpu\(\(([\d, ]+)\)", code)) == ["22, ", "3, 5", "7, "]
    for actual, wanted in zip(torch.compile(summed)(*tensors), summed(*tensors), strict=True):
        assert actual.dtype is torch.float32
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0)


def test_one_launch_each_way(mesh, device):
    """On CUDA, of more tensors than one launch of Inductor's ``cat`` takes."""
    name, tensors = mesh.get_group().group_name, [torch.randn(3, 5 + i, device=device) for i in range(12)]

    def summed(*tensors):
        return [y for t in tensors for y in op([t], name)]

    code = graph_of(summed, *tensors)
    assert len(collectives(code)) == 1
    assert len(re.findall(r"\btriton_for_fused_\w+\.run\(", code)) == (2 if device == "cuda" else 0)
    assert not re.findall(r"\btriton_poi_\w+\.run\(", code)
    for actual, tensor in zip(torch.compile(summed)(*tensors), tensors, strict=True):
        torch.testing.assert_close(actual, tensor)  # of the fake group


def test_opcheck(mesh):
    name = mesh.get_group().group_name
    for tensors in ([torch.randn(3, 5).t()], [torch.randn(3, 5).t(), torch.randn(7).bfloat16(), torch.randn(0)]):
        opcheck(torch.ops.dorac.gradient_sums.default, (tensors, name))
        opcheck(torch.ops.dorac.flat.default, (tensors, torch.float32))


def test_other_backends_have_one_a_layer(mesh):
    from torch._dynamo.testing import AotEagerAndRecordGraphs

    model, backend = spread(nn.Sequential(Mlp(), Mlp()), mesh), AotEagerAndRecordGraphs()
    dorac.cache_norms(model)
    torch._dynamo.reset()
    with mock.patch.object(torch.distributed, "all_reduce", wraps=torch.distributed.all_reduce) as reduced:
        torch.compile(model, fullgraph=True, backend=backend)(torch.randn(5, WIDTH)).sum().backward()
    (graph,) = backend.bw_graphs
    assert sum("gradient_sums" in str(n.target) for n in graph.graph.nodes) == 6
    assert reduced.call_count == 6
