"""What compiled tensor-parallel layers take in the place of their parameters, and gradients on their way to DTensors.

Of one rank in this process: torch's fake group, whose sums over the ranks are then right.
"""

import copy

import pytest
import torch
from torch import nn

import dorac
from dorac.bench import mesh as meshes
from dorac.ops import crossing

pytest.importorskip("torch.testing._internal.distributed.fake_pg")


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12, bias=False), nn.Linear(12, 8)
        self.requires_grad_(False)
        dorac.apply_dora(self, ["up", "down"], r=2, init_lora_weights=False)
        for layer in (self.up, self.down):
            nn.init.uniform_(layer.lora_magnitude_vector, 0.5, 1.5)

    def forward(self, x):
        return self.down(nn.functional.gelu(self.up(x)))


@pytest.fixture
def mesh():
    from torch.distributed.tensor import init_device_mesh

    with meshes.fake_ranks(1):
        yield init_device_mesh("cpu", (1,))


def spread(model, mesh):
    from torch.distributed.tensor.parallel import parallelize_module

    from dorac.parallel import ColwiseParallel, RowwiseParallel

    styles = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    return parallelize_module(model, mesh, styles, src_data_rank=None)  # torch 2.11's fake group scatters nothing


def pair(mesh):
    torch.manual_seed(0)
    reference = Mlp()
    return reference, spread(copy.deepcopy(reference), mesh), torch.randn(3, 8)


class Graphs:
    """A backend that runs what was traced and notes the types of its inputs."""

    def __init__(self):
        self.inputs = []

    def __call__(self, graph, inputs):
        from torch._dynamo.backends.debugging import aot_eager

        self.inputs.append([type(t) for t in inputs if isinstance(t, torch.Tensor)])
        return aot_eager(graph, inputs)

    def saw_dtensors(self):
        from torch.distributed.tensor import DTensor

        return any(issubclass(kind, DTensor) for kinds in self.inputs for kind in kinds)


def compiled(model):
    torch._dynamo.reset()
    seen = Graphs()
    return torch.compile(model, backend=seen, fullgraph=True), seen


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def gradients(model):
    from torch.distributed.tensor import DTensor

    own = [p.grad for p in trained(model)]
    assert all(type(g) in (DTensor, torch.Tensor) for g in own)
    return [g.to_local() if isinstance(g, DTensor) else g for g in own]


def assert_trains_alike(model, function, reference, x):
    for m in (model, reference):
        m.zero_grad()
    torch.testing.assert_close(function(x), reference(x))
    function(x).square().sum().backward()
    reference(x).square().sum().backward()
    torch.testing.assert_close(gradients(model), gradients(reference))


def test_no_dtensor_is_at_the_edge_of_the_graph(mesh):
    reference, model, x = pair(mesh)
    function, seen = compiled(model)
    for _ in range(2):
        assert_trains_alike(model, function, reference, x)
        for m in (model, reference):
            torch.optim.SGD(trained(m), lr=0.1).step()
    assert len(seen.inputs) == 1
    assert not seen.saw_dtensors()
    with torch.no_grad():
        torch.testing.assert_close(function(x), reference(x))


def test_kept_norms(mesh):
    reference, model, x = pair(mesh)
    dorac.cache_norms(model)
    function, seen = compiled(model)
    assert_trains_alike(model, function, reference, x)
    assert not seen.saw_dtensors()


def test_gradients_reach_the_parameters_by_every_way(mesh):
    """autograd.grad, hooks, several backwards of one graph and of several, which add up."""
    reference, model, x = pair(mesh)
    function, seen = compiled(model)
    expected = torch.autograd.grad(reference(x).sum(), trained(reference))
    for given in (function, model):
        actual = torch.autograd.grad(given(x).sum(), trained(model))
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a.full_tensor(), e)
            torch.testing.assert_close((2 * a + a).full_tensor(), 3 * e)
            assert torch.nn.utils.get_total_norm([a]).full_tensor() > 0
        calls = []
        note = calls.append
        handles = [p.register_hook(lambda g, p=p, note=note: note(g.shape == p.shape)) for p in trained(model)]
        for p in trained(model):
            handles.append(p.register_post_accumulate_grad_hook(lambda p, note=note: note(p.grad is not None)))
        model.zero_grad()
        (given(x) + given(x)).sum().backward()
        given(x).sum().backward()
        for handle in handles:
            handle.remove()
        assert calls == [True] * 4 * len(trained(model))
        for a, e in zip(gradients(model), expected, strict=True):
            torch.testing.assert_close(a, 3 * e)
    assert not seen.saw_dtensors()


@pytest.mark.parametrize("is_compiled", [False, True])
def test_gradients_that_nobody_else_wants(is_compiled, mesh):
    """The leaf has it by the time that its node of autograd runs, which is then asked for nothing."""
    reference, model, x = pair(mesh)
    function = compiled(model)[0] if is_compiled else model
    loss = function(x).square().sum()
    ran = []  # of each node what the engine brought it, by a hook that does not hang on the tensor
    nodes = []
    for layer in (model.up, model.down):
        for p in layer._own_parameters():
            node = torch.autograd.graph.get_gradient_edge(p).node
            nodes.append(node)
            node.register_prehook(lambda grads, p=p: ran.append((grads[0] is None, p.grad is not None)))
    loss.backward()
    assert ran == [(True, True)] * 6
    reference(x).square().sum().backward()
    torch.testing.assert_close(gradients(model), gradients(reference))
    kept = model.up.lora_A.grad
    function(x).square().sum().backward()  # adds up where the gradient lies
    assert model.up.lora_A.grad is kept
    torch.testing.assert_close(gradients(model), [2 * g for g in gradients(reference)])


def test_backward_into_some_inputs(mesh):
    """What ``inputs`` leaves out gets no gradient, as with one process."""
    reference, model, x = pair(mesh)
    for m in (reference, model):
        own = x.clone().requires_grad_()
        loss = m(own).square().sum()
        loss.backward(inputs=[own], retain_graph=True)
        assert all(p.grad is None for p in trained(m))
        loss.backward(inputs=[m.down.lora_B, m.up.lora_A])
        assert [p.grad is not None for p in trained(m)] == [
            any(p is q for q in (m.down.lora_B, m.up.lora_A)) for p in trained(m)
        ]
    for name in ("up.lora_A", "down.lora_B"):
        actual, expected = (m.get_parameter(name).grad for m in (model, reference))
        torch.testing.assert_close(actual.full_tensor(), expected)


def test_a_second_use_of_a_parameter(mesh):
    """A gradient that comes by another way, as a penalty's, is added."""
    from torch.distributed.tensor import DTensor

    reference, model, x = pair(mesh)
    for m in (reference, model):
        penalty = sum(p.square().sum() for p in trained(m))
        penalty = penalty.full_tensor() if isinstance(penalty, DTensor) else penalty
        (m(x).square().sum() + penalty).backward()
    torch.testing.assert_close(gradients(model), gradients(reference))


def moved(model):
    return model.double().float()


def assigned(model):
    model.load_state_dict({name: p.detach().clone() for name, p in model.state_dict().items()}, assign=True)
    return model


def loaded(model):
    model.load_state_dict({name: 2 * p.detach() for name, p in model.state_dict().items()})
    return model


def swapped(model):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return loaded(model)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.parametrize("replace", [assigned, loaded, copy.deepcopy, moved, swapped])
def test_what_replaces_parameters(replace, mesh):
    """Parts are of what is there then, for compiled code, too. (Compiled code keeps torch from swapping.)"""
    reference, model, x = pair(mesh)
    function, seen = compiled(model)
    if replace not in (moved, swapped):
        assert_trains_alike(model, function, reference, x)
    reference, after = replace(reference), replace(model)
    for layer in (after.up, after.down):
        if after is model:
            assert [*map(id, layer.lasting.sources)] == [id(p._local_tensor) for p in layer._own_parameters()]
        else:
            assert layer.lasting is None
    if after is not model:
        function, seen = compiled(after)
    assert_trains_alike(after, function, reference, x)
    assert seen.saw_dtensors() == (after is not model)


def test_others_in_the_place_of_the_parameters(mesh):
    """functional_call, a parameter that was set, frozen ones."""
    reference, model, x = pair(mesh)
    function, _ = compiled(model)
    assert_trains_alike(model, function, reference, x)
    others = [{name: (1.5 * p).detach() for name, p in m.named_parameters()} for m in (model, reference)]
    named = {f"_orig_mod.{name}": value for name, value in others[0].items()}
    actual, expected = (
        torch.func.functional_call(function, named, (x,)),
        torch.func.functional_call(reference, others[1], (x,)),
    )
    torch.testing.assert_close(actual, expected)
    for m in (model, reference):
        m.up.lora_B = nn.Parameter(2 * m.up.lora_B.detach())
    assert_trains_alike(model, function, reference, x)
    for m in (model, reference):
        m.down.lora_A.requires_grad_(False)
    torch._dynamo.reset()  # torch 2.11 sees no such change
    assert_trains_alike(model, function, reference, x)


def test_a_base_weight_that_is_trained_too(mesh):
    reference, model, x = pair(mesh)
    for m in (reference, model):
        m.up.base_layer.weight.requires_grad_()
        m.down.base_layer.bias.requires_grad_()
    function, _ = compiled(model)
    assert_trains_alike(model, function, reference, x)


def test_gradients_on_their_way_are_dtensors(mesh):
    """The subclass that answers ``detach()`` by itself leaves every other op to DTensor; torch moves what it needs."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    like = distribute_tensor(torch.arange(6.0).view(2, 3), mesh, [Shard(0)], src_data_rank=None)
    fresh = crossing._dtensor(like.to_local(), like._spec, crossing._Fresh)
    assert type(fresh) is crossing._Fresh, "DTensor.__new__ makes no subclasses any more"
    assert type(fresh.detach()) is DTensor
    if torch.torch_version.TorchVersion(torch.__version__) >= (2, 13):
        is_asked = fresh.detach()._local_tensor is fresh._local_tensor
        assert is_asked, (
            "__torch_dispatch__ of a subclass of DTensor is not asked any more: gradients cost what they did"
        )
    for result in (fresh + like, like + fresh, like.clone().add_(fresh), torch.cat([fresh, like]), fresh.clone()):
        assert type(result) is DTensor
    torch.testing.assert_close((like + fresh).full_tensor(), 2 * like.full_tensor())
    torch.testing.assert_close(fresh.full_tensor(), like.full_tensor())
    assert fresh.placements == like.placements
