"""Experts that are spread over several processes: the numbers of one process, and the collectives of plain LoRA."""

import copy

import pytest
import torch
from processes import run
from test_experts_module import CONFIGS, E, adapted, arguments, language_model, off_init
from torch import nn

import dorac
from dorac.bench.mesh import Collectives
from dorac.nn import DoraExperts

STEPS = 3
RELATIVE = 1e-12  # of the largest element, in float64


def same(actual, expected):
    from torch.distributed.tensor import DTensor

    actual = actual.detach().full_tensor() if isinstance(actual, DTensor) else actual.detach()
    bound = RELATIVE * expected.detach().abs().max().clamp_min(1e-30).item()
    torch.testing.assert_close(actual, expected.detach(), rtol=0, atol=bound)


def spread(layer, mesh):
    from torch.distributed.tensor.parallel import parallelize_module

    from dorac.parallel import ExpertParallel

    return parallelize_module(nn.Sequential(copy.deepcopy(layer)), mesh, {"0": ExpertParallel()})[0]


def trained(layer):
    return {name: p for name, p in layer.named_parameters() if p.requires_grad}


def check(family, mesh, *, cached=False, compiled=False, base=False, **options):
    from torch.distributed.tensor import DTensor, Shard

    reference = adapted(family, **options)
    if base:  # weights and biases of the experts are trained, too
        reference.base_layer.requires_grad_()
    model = spread(reference, mesh)
    for p in model.parameters():
        assert p.placements == (Shard(0),)
        assert p.to_local().shape[0] == E // mesh.size()
    caches = [dorac.cache_norms(m) for m in (reference, model)] if cached else []
    optimizers = [torch.optim.SGD(trained(m).values(), lr=0.1) for m in (reference, model)]
    forward = torch.compile(model, backend="aot_eager") if compiled else model
    for step in range(STEPS):
        both = []
        for m in (reference, forward):
            args = [a.clone().requires_grad_(a.is_floating_point()) for a in arguments(family, 6 + step)]
            y = m(*args)
            y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
            both.append((y, [a.grad for a in args if a.is_floating_point()]))
        same(both[1][0], both[0][0])
        for actual, expected in zip(both[1][1], both[0][1], strict=True):
            same(actual, expected)
        own = trained(model)
        for name, p in trained(reference).items():
            assert type(own[name].grad) is DTensor, name
            assert own[name].grad.placements == (Shard(0),), name
            same(own[name].grad, p.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for name, p in trained(reference).items():
            same(own[name], p)
    for cache in caches:
        cache.check()
        cache.remove()
    return reference, model


def numbers(device):
    from torch.distributed.tensor import init_device_mesh

    mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    for family in CONFIGS:
        reference, model = check(family, mesh)
        args = arguments(family)
        given = [a.clone().requires_grad_(a.is_floating_point()) for a in args]
        with Collectives() as forward:
            y = model(*given)
        with Collectives() as backward:
            y.sum().backward()
        model.zero_grad()
        assert (forward.calls, backward.calls) == ((1, 1) if family == "llama4" else (1, 2)), family
        for m in (reference, model):
            dorac.merge(m)
        with torch.no_grad():
            same(model(*args), reference(*args))
            for name, p in reference.base_layer.named_parameters():
                same(model.base_layer.get_parameter(name), p)
        for m in (reference, model):
            dorac.unmerge(m)
            dorac.set_strength(m, 0.5)
        with torch.no_grad():
            same(model(*args), reference(*args))
    check("mixtral", mesh, cached=True)
    check("gpt_oss", mesh, cached=True)
    check("gpt_oss", mesh, norm_grad=True, base=True)
    check("mixtral", mesh, compiled=True)
    hidden, index, weights = arguments("mixtral")
    index[0, 0] = E
    with pytest.raises(IndexError):
        spread(adapted("mixtral"), mesh)(hidden, index, weights)


def refused(device):
    from torch.distributed.tensor import init_device_mesh

    mesh = init_device_mesh(device, (2,))
    with pytest.raises(ValueError, match=r"spreads dorac\.nn\.DoraExperts, got DoraLinear"):
        spread(dorac.nn.DoraLinear(nn.Linear(4, 4)), mesh)
    merged = adapted("mixtral")
    dorac.merge(merged)
    with pytest.raises(ValueError, match="the adapter is merged"):
        spread(merged, mesh)
    three = adapted("mixtral").base_layer
    for name in ("gate_up_proj", "down_proj"):
        setattr(three, name, nn.Parameter(getattr(three, name)[:3].detach(), requires_grad=False))
    with pytest.raises(ValueError, match="3 experts cannot be spread evenly over 2 ranks"):
        spread(DoraExperts(three, 2), mesh)
    with pytest.raises(ValueError, match="is not the same on all ranks"):
        spread(adapted("mixtral", lora_dropout=0.1 * torch.distributed.get_rank()), mesh)


def saved(device, folder):
    """The experts of a whole model: its adapter is written, and taken by a model on one process and by a spread one."""
    from torch.distributed.tensor import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    from dorac.parallel import ExpertParallel

    model = language_model("mixtral", torch.float64)
    names = [name for name, _ in model.named_modules() if name.endswith("experts")]
    dorac.apply_dora(model, names, r=3, init_lora_weights=False)
    for name in names:
        off_init(model.get_submodule(name))
    ids = torch.arange(8).view(1, 8)
    with torch.no_grad():
        expected = model(ids).logits
        parallelize_module(model, init_device_mesh(device, (2,)), {name: ExpertParallel() for name in names})
        same(model(ids).logits, expected)
        dorac.save_adapter(model, folder)
        torch.distributed.barrier()
        other = language_model("mixtral", torch.float64)
        dorac.load_adapter(other, folder)
        same(other(ids).logits, expected)
        for p in trained(model).values():
            p.mul_(0.5)
        dorac.load_adapter(model, folder)
        same(model(ids).logits, expected)


def on_every_rank(folder):
    numbers("cpu")
    refused("cpu")
    saved("cpu", folder)


def test_two_processes_give_the_numbers_of_one(tmp_path):
    run(on_every_rank, tmp_path, "cpu", tmp_path / "adapter")
