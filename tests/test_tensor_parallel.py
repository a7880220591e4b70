"""Tensor-parallel layers on several processes: one process's numbers in every layout, at plain LoRA's collectives.

Each test starts processes, which run functions of this file.
"""

import contextlib
import copy
import functools
import pickle
from unittest import mock

import pytest
import torch
from processes import WORLD, run
from torch import nn

import dorac
from dorac import functional
from dorac.nn import DoraEmbedding, DoraLinear
from dorac.ops import front

SCALING = 1.5
STEPS = 3
# Of the largest element, after three steps, each of which takes roundings along. With float64 nothing else is left.
RELATIVE = {torch.float64: 1e-12, torch.float32: 4e-6}


def same(actual, expected):
    from torch.distributed.tensor import DTensor

    actual = actual.detach().full_tensor() if isinstance(actual, DTensor) else actual.detach()
    bound = RELATIVE[expected.dtype] * expected.detach().abs().max().clamp_min(1e-30).item()
    torch.testing.assert_close(actual, expected.detach(), rtol=0, atol=bound)


def adapted(kind="linear", *, features=(24, 40), rank=4, bias=False, **options):
    """A layer off its zero init; its base bias, if any, is trained."""
    if kind == "embedding":
        layer = DoraEmbedding(nn.Embedding(*features, padding_idx=3), rank, SCALING * rank, **options)
    else:
        layer = DoraLinear(nn.Linear(*features, bias=bias), rank, SCALING * rank, **options)
        if bias:
            layer.base_layer.bias.requires_grad_()
    _, lora_B, magnitude = layer._own_parameters()
    for factor in layer._own_parameters()[:2]:
        nn.init.normal_(factor, std=0.3)
    nn.init.normal_(lora_B, std=0.3)
    with torch.no_grad():
        magnitude.copy_(
            layer._norm().view_as(magnitude) * torch.linspace(0.7, 1.4, magnitude.numel()).view_as(magnitude)
        )
    return layer


def part(tensor, placement, mesh):
    """This rank's part of what all ranks hold."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.detach(), mesh, [placement], src_data_rank=None).to_local().clone()


def whole(tensor, placement, mesh):
    from torch.distributed.tensor import DTensor

    tensor = tensor if isinstance(tensor, DTensor) else DTensor.from_local(tensor, mesh, [placement], run_check=False)
    return tensor.full_tensor()


def check(layer, style, x, mesh, *, cached=False, compiled=False, mask=None, lr=0.1):
    """Output, gradients and three steps of SGD of the layer in this style are those of the layer on one process."""
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import parallelize_module

    reference, model = layer, parallelize_module(copy.deepcopy(layer), mesh, style)
    caches = [dorac.cache_norms(m) for m in (reference, model)] if cached else []
    given, wanted = style.input_layouts[0], style.output_layouts[0]
    seen = style.input_layouts[0] if model.shards.columns and not given.is_replicate() else Replicate()
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr) for m in (reference, model)]
    forward = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
    for _ in range(STEPS):
        inputs = [x.clone(), part(x, given, mesh)]
        if x.is_floating_point():
            inputs = [t.requires_grad_() for t in inputs]
        with dropping(mask):
            y = reference(inputs[0])
        with dropping(None if mask is None else part(mask, seen, mesh)):
            actual = forward(inputs[1])
        dy = torch.randn_like(y)
        y.backward(dy)
        if style.use_local_output:
            actual.backward(part(dy, wanted, mesh))
        else:
            from torch.distributed.tensor import Shard, distribute_tensor

            assert actual.placements == (Shard(wanted.dim % y.ndim) if wanted.is_shard() else wanted,)
            actual.backward(distribute_tensor(dy, mesh, actual.placements, src_data_rank=None))
        same(whole(actual.detach(), wanted, mesh), y)
        if x.is_floating_point():
            same(whole(inputs[1].grad, given, mesh), inputs[0].grad)
        own = dict(model.named_parameters())
        for name, p in reference.named_parameters():
            assert (p.grad is None) == (own[name].grad is None), name
            if p.grad is not None:
                assert own[name].grad.placements == own[name].placements, name
                same(own[name].grad, p.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for name, p in reference.named_parameters():
            same(own[name], p)
    for cache in caches:
        cache.check()
        cache.remove()


@contextlib.contextmanager
def dropping(mask):
    if mask is None:
        yield
        return
    with mock.patch.object(nn.functional, "dropout", lambda x, p: x * mask):
        yield


def styles():
    """By name: a style, of the layers without a bias."""
    from torch.distributed.tensor import Replicate, Shard

    from dorac.parallel import ColwiseParallel, RowwiseParallel

    return {
        "columns": ColwiseParallel(),
        "columns, sequence": ColwiseParallel(input_layouts=Shard(1)),
        "columns, lines": ColwiseParallel(input_layouts=Shard(0)),
        "columns, gathered": ColwiseParallel(output_layouts=Replicate()),
        "columns, to sequence": ColwiseParallel(output_layouts=Shard(1)),
        "columns, DTensor": ColwiseParallel(use_local_output=False),
        "rows": RowwiseParallel(),
        "rows, sequence": RowwiseParallel(output_layouts=Shard(1)),
        "rows, to features": RowwiseParallel(output_layouts=Shard(-1)),
        "rows, of whole": RowwiseParallel(input_layouts=Replicate()),
        "rows, of sequence": RowwiseParallel(input_layouts=Shard(1)),
        "rows, DTensor": RowwiseParallel(use_local_output=False),
    }


def linears(mesh):
    """Every pair of layouts; each option in the two usual ones."""
    x = torch.randn(4, 2 * mesh.size(), 24)
    for style in styles().values():
        check(adapted(bias=True), style, x, mesh)
    for name in ("columns", "rows"):
        style = styles()[name]
        check(adapted(rank=1, norm_grad=True), style, x, mesh, lr=0.01)
        check(adapted(), style, x, mesh, cached=True)
        check(adapted(rank=30), style, x[:1, :1], mesh)  # one token, and a rank above the features of a part
        layer = adapted(bias=True)
        layer.base_layer.weight.requires_grad_()
        check(layer, style, x.transpose(0, 1), mesh)
        zero_row = adapted()
        with torch.no_grad():
            for t in (zero_row.base_layer.weight, zero_row.lora_B):
                t[5] = 0
        check(zero_row, style, x, mesh)
        mask = (torch.arange(x.numel()).view(x.shape) % 3 > 0).to(x.dtype) / 0.6
        for meaning in ("adapter", "low_rank"):
            check(adapted(lora_dropout=0.4, dropout_on=meaning), style, x, mesh, mask=mask)
    for style in (styles()["columns, gathered"], styles()["rows, of whole"]):  # features that no part divides
        check(adapted(features=(23, 41)), style, torch.randn(3, 2, 23), mesh)


def square(mesh):
    """A weight [n, n] that is stored [in, out]."""
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    for name in ("columns", "rows"):
        layer = DoraLinear(conv1d(24, 24), 4, 6, init_lora_weights=False)
        assert layer.fan_in_fan_out
        check(layer, styles()[name], torch.randn(2, 3, 24), mesh)


def embeddings(mesh):
    """Over the features and over the vocabulary, with a row of padding and rows that one rank alone has."""
    from torch.distributed.tensor import Replicate, Shard

    from dorac.parallel import ColwiseParallel, RowwiseParallel

    ids = torch.tensor([[0, 3, 20, 7], [3, 19, 19, 1], [20, 11, 10, 9], [2, 2, 2, 2]])
    for style in (
        ColwiseParallel(output_layouts=Replicate()),
        RowwiseParallel(input_layouts=Replicate()),
        RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
    ):
        for options in ({}, {"norm_grad": True}):
            check(adapted("embedding", features=(21, 12), **options), style, ids, mesh, lr=0.01)
        check(adapted("embedding", features=(21, 12)), style, ids, mesh, cached=True)
    style = RowwiseParallel(input_layouts=Replicate())
    from torch.distributed.tensor.parallel import parallelize_module

    layer = parallelize_module(adapted("embedding", features=(21, 12)), mesh, style)
    if mesh.device_type == "cpu":
        for wrong in (21, -1):
            with pytest.raises(IndexError):
                layer(torch.tensor([wrong]))
    for base, reason in (
        (nn.Embedding(21, 12, sparse=True), "a sparse gradient cannot be summed"),
        (nn.Embedding(21, 12, scale_grad_by_freq=True), "shard the features: ColwiseParallel"),
        (nn.Embedding(mesh.size() - 1, 12), "too few for"),
    ):
        with pytest.raises(ValueError, match=f"RowwiseParallel.*{reason}"):
            parallelize_module(DoraEmbedding(base, 2), mesh, RowwiseParallel(input_layouts=Replicate()))


class Attention(nn.Module):
    """Three layers of one input, and one of what they give."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (adapted(features=(24, 32)) for _ in range(3))
        self.o = adapted(features=(32, 24))

    def forward(self, x):
        return self.o(self.q(x).sin() * self.k(x).cos() + self.v(x))


def one_move(mesh):
    """Layers of one input move it once: LoRA's collectives by hand, counted, in bytes too; the numbers are one's."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.parallel import parallelize_module

    from dorac.bench.scale import Collectives
    from dorac.parallel import ColwiseParallel, RowwiseParallel

    reference = Attention()
    rank_sizes = {"lora_A": 3 * 4 * 24, "lora_B": 4 * 24, "magnitude": 24}  # elements of what is summed in backward
    for sequence in (False, True):
        between = Shard(1) if sequence else None
        plan = {name: ColwiseParallel(input_layouts=between) for name in "qkv"}
        plan["o"] = RowwiseParallel(output_layouts=between)
        model = parallelize_module(copy.deepcopy(reference), mesh, plan)
        cache = dorac.cache_norms(model)
        x = torch.randn(2, 2 * mesh.size(), 24)
        inputs = x.clone().requires_grad_(), (part(x, between, mesh) if sequence else x.clone()).requires_grad_()
        y = reference(inputs[0])
        with Collectives() as forward:
            actual = model(inputs[1])
        dy = torch.randn_like(y)
        y.backward(dy)
        with Collectives() as backward:
            actual.backward(part(dy, between, mesh) if sequence else dy)
        size = x.numel() * x.element_size()
        # Forward, of LoRA and of this: x to q, k and v together (gathered, or there at once), o's sum (or its scatter).
        # Backward the same the other way, and four small sums: lora_A of q, k and v; lora_B of o with the magnitude.
        if sequence:
            assert forward.counts == {"all_gather": 1, "reduce_scatter": 1}
            assert backward.counts == {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 4}
        else:
            assert forward.counts == {"all_reduce": 1}
            assert forward.bytes == {"all_reduce": size}
            assert backward.counts == {"all_reduce": 5}
            assert backward.bytes == {"all_reduce": size + x.element_size() * sum(rank_sizes.values())}
        expected = dict(reference.named_parameters())
        for name, p in model.named_parameters():
            if p.grad is not None:
                same(p.grad, expected[name].grad)
        gradient = inputs[1].grad
        same(whole(gradient, between, mesh) if sequence else gradient, inputs[0].grad)
        reference.zero_grad()
        cache.remove()


def checkpointed(mesh):
    """Under activation checkpoints, of everything and of what a policy does not save."""
    from torch.distributed.tensor.parallel import parallelize_module
    from torch.utils import checkpoint

    from dorac.parallel import ColwiseParallel, RowwiseParallel

    reference = Attention()
    plan = {"q": ColwiseParallel(), "k": ColwiseParallel(), "v": ColwiseParallel(), "o": RowwiseParallel()}
    model = parallelize_module(copy.deepcopy(reference), mesh, plan)
    x, dy = torch.randn(2, 3, 24), torch.randn(2, 3, 24)
    reference(x).backward(dy)
    expected = dict(reference.named_parameters())
    products = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.add.Tensor]
    for contexts in (
        checkpoint.noop_context_fn,
        functools.partial(checkpoint.create_selective_checkpoint_contexts, products),
    ):

        def twice(x, contexts=contexts):  # what follows the sum is computed again, too
            return checkpoint.checkpoint(lambda x: model(x).exp().log(), x, use_reentrant=False, context_fn=contexts)

        leaf = x.clone().requires_grad_()
        twice(leaf).backward(dy)
        for name, p in model.named_parameters():
            if p.grad is not None:
                same(p.grad, expected[name].grad)
        model.zero_grad()


def safe(mesh):
    """What a move once, a sum in place, and parts without versions must not do."""
    from torch.distributed.tensor.parallel import parallelize_module

    layer, x = adapted(), torch.randn(4, 24)
    dy = torch.randn(4, 40)
    for name in ("columns", "rows"):
        style = styles()[name]
        model = parallelize_module(copy.deepcopy(layer), mesh, style)
        own = part(x, style.input_layouts[0], mesh)
        # Two calls of one input that was written to in between.
        changed = own.clone().requires_grad_()
        with torch.no_grad():
            first = model(changed)
            changed.mul_(2)
            second = model(changed)
        for y, factor in ((first, 1), (second, 2)):
            same(whole(y, style.output_layouts[0], mesh), layer(factor * x))
        # A parameter that changes between forward and backward.
        for parameter in (model.base_layer.weight, *model._own_parameters()):
            y = model(own)
            with torch.no_grad():
                parameter.mul_(1)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()
        # Second derivatives.
        values = []
        for m, given in ((layer, x), (model, own)):
            leaf, trained = given.clone().requires_grad_(), [p for p in m.parameters() if p.requires_grad]
            y = m(leaf)
            if m is model:
                y.backward(part(dy, style.output_layouts[0], mesh), create_graph=True)
            else:
                y.backward(dy, create_graph=True)
            firsts = [p.grad for p in trained]
            seconds = torch.autograd.grad(sum(d.pow(3).sum() for d in firsts), trained, allow_unused=True)
            values.append([*firsts, *seconds])
            m.zero_grad()
        for sharded, plain in zip(values[1], values[0], strict=True):
            assert (sharded is None) == (plain is None)
            if plain is not None:
                same(sharded, plain)
        again = pickle.loads(pickle.dumps(model.shards))
        assert again == model.shards
        assert again.group is model.shards.group
        # Frozen, switched off, at another strength, merged.
        for change in (
            lambda m: m.requires_grad_(False),
            lambda m: m.requires_grad_(False).lora_A.requires_grad_(),
            functools.partial(dorac.set_strength, strength=0.5),
            functools.partial(dorac.set_strength, strength=0),
            dorac.merge,
        ):
            pair = [copy.deepcopy(m) for m in (layer, model)]
            for m in pair:
                change(m)
            same(whole(pair[1](own).detach(), style.output_layouts[0], mesh), pair[0](x))


def kept(mesh):
    """Norms that were kept before the layers were sharded are those of the parts, and follow every write."""
    from torch.distributed.tensor.parallel import parallelize_module

    layer, x = adapted(), torch.randn(4, 24)
    for name in ("columns", "rows"):
        style = styles()[name]
        model, reference = copy.deepcopy(layer), copy.deepcopy(layer)
        cache = dorac.cache_norms(model)
        parallelize_module(model, mesh, style)
        own = part(x, style.input_layouts[0], mesh)
        for write in (
            lambda m: m,
            lambda m: m.lora_B.mul_(1.5),
            lambda m: getattr(m.lora_A, "_local_tensor", m.lora_A).mul_(1.5),
            lambda m: setattr(m, "scaling", 0.7),
        ):
            for m in (model, reference):
                with torch.no_grad():
                    write(m)
            for first in (True, False):
                with mock.patch.object(functional, "norm_factored", wraps=functional.norm_factored) as taken:
                    y = model(own)
                assert first or not taken.called
                same(whole(y, style.output_layouts[0], mesh), reference(x))
            cache.check()
        cache.remove()


def compiled(mesh):
    """Without a break, in the usual layouts; the sums are in the graph."""
    x = torch.randn(2, 2 * mesh.size(), 24)
    for name in ("columns", "columns, sequence", "columns, gathered", "rows", "rows, sequence"):
        torch._dynamo.reset()
        check(adapted(bias=name == "rows"), styles()[name], x, mesh, compiled=True, cached=name == "rows, sequence")
    torch._dynamo.reset()
    check(adapted(), styles()["rows"], x, mesh, compiled=True, cached=True)


def half(mesh):
    """In bfloat16, by the kernels, on the CPU in the interpreter: the numbers of one process, outputs saved or not."""
    from torch.distributed.tensor.parallel import parallelize_module

    torch.set_default_dtype(torch.float32)
    x = torch.randn(4, 24).bfloat16()
    narrow = {"adapter_dtype": torch.bfloat16}
    for name, saves, options in (
        ("columns", True, {}),
        ("columns", True, narrow),
        ("columns, DTensor", False, narrow),
        ("columns, gathered", False, {}),
        ("rows", False, {}),
        ("rows", False, narrow),
    ):
        style = styles()[name]
        layer = adapted(features=(24, 48), **options)
        layer.base_layer.bfloat16()
        with torch.autocast(x.device.type, torch.bfloat16):
            reference = copy.deepcopy(layer)
            inputs = x.clone().requires_grad_()
            y = reference(inputs)
            dy = torch.randn_like(y)
            y.mul(2).backward(dy)
            for saved in (False, True):
                model = parallelize_module(copy.deepcopy(layer), mesh, style)
                dorac.save_outputs(model, saved)
                given = part(x, style.input_layouts[0], mesh).requires_grad_()
                actual, places = places_saved(model, given)
                local = getattr(actual, "_local_tensor", actual)
                assert (local.untyped_storage().data_ptr() in places) == (saved and saves), name
                near(whole(actual.detach(), style.output_layouts[0], mesh), y)
                (actual.mul(2) if style.use_local_output else actual.mul_(2)).backward(
                    part(dy, style.output_layouts[0], mesh) if style.use_local_output else as_dtensor(dy, actual)
                )
                near(whole(given.grad, style.input_layouts[0], mesh), inputs.grad)
                expected = dict(reference.named_parameters())
                for key, p in model.named_parameters():
                    if p.requires_grad:
                        assert p.grad.placements == p.placements
                        near(p.grad, expected[key].grad)
        if style.use_local_output and options:
            twice(layer, model, style, x, mesh)


def twice(layer, model, style, x, mesh):
    """Second derivatives, and a parameter that changes between forward and backward."""
    from dorac.ops import eager_parts

    values = []
    for m, given in ((layer, x), (model, part(x, style.input_layouts[0], mesh))):
        m.zero_grad()
        trained = [p for p in m.parameters() if p.requires_grad]
        y = m(given.clone().requires_grad_())
        firsts = torch.autograd.grad(y, trained, torch.ones_like(y), create_graph=True)
        values.append(torch.autograd.grad(sum(d.square().sum() for d in firsts), trained, allow_unused=True))
    for sharded, plain in zip(values[1], values[0], strict=True):
        assert (sharded is None) == (plain is None)
        if plain is not None:
            near(sharded, plain)
    for parameter in (model.base_layer.weight, *model._own_parameters()):
        with mock.patch.object(eager_parts, "_apply", wraps=eager_parts._apply) as applied:
            y = model(given)
        assert applied.called
        with torch.no_grad():
            parameter.mul_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def places_saved(model, x):
    """The result, and where what is saved for backward lies."""
    places = []

    def pack(tensor):
        places.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return model(x), places


def near(actual, expected):
    """Up to roundings of bfloat16, which the interpreter truncates to."""
    from torch.distributed.tensor import DTensor

    actual = actual.full_tensor() if isinstance(actual, DTensor) else actual
    bound = 3e-2 * expected.abs().max().item()
    torch.testing.assert_close(actual, expected.detach(), rtol=3e-2, atol=bound)


def as_dtensor(dy, like):
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(dy, like.device_mesh, like.placements, src_data_rank=None)


def in_half(world):
    from torch.distributed.tensor import init_device_mesh

    mesh = init_device_mesh(torch.get_default_device().type, (world,))
    torch.manual_seed(0)
    with mock.patch.object(front, "has_kernels", return_value=True):
        half(mesh)


def in_turn(workers, kernels, world):
    from torch.distributed.tensor import init_device_mesh

    mesh = init_device_mesh(torch.get_default_device().type, (world,))
    form = contextlib.nullcontext()
    torch.set_default_dtype(torch.float32 if kernels else torch.float64)
    if kernels:  # the form with an autograd.Function of its own, which CUDA tensors take, wherever this runs
        form = mock.patch.object(front, "has_kernels", lambda *tensors: all(t.dtype is torch.float32 for t in tensors))
    with form:
        for worker in workers:
            torch.manual_seed(0)
            worker(mesh)


def both_forms(world):
    in_turn((linears, square, embeddings, one_move, checkpointed, safe, kept), False, world)
    in_turn((linears,), True, world)


@pytest.mark.parametrize("world", [WORLD, pytest.param(4, marks=pytest.mark.full)])
def test_layers_have_the_numbers_of_one_process(world, device, tmp_path):
    run(both_forms, tmp_path, device, world, world=world)


def test_layers_in_half_precision(device, tmp_path):
    run(in_half, tmp_path, device, WORLD)


@pytest.mark.full
def test_compiled_layers_have_the_numbers_of_one_process(device, tmp_path):
    run(in_turn, tmp_path, device, (compiled,), False, WORLD)
