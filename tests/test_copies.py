"""Copies of adapted layers: they behave as those of ``nn.Linear`` do, and share nothing with the original."""

import copy
import io
import pickle

import pytest
import torch
from test_experts_module import adapted as adapted_experts
from test_experts_module import arguments
from torch import nn
from torch.optim.swa_utils import AveragedModel

import dorac
from dorac.apply import dora_layers
from dorac.nn import DoraConv1d, DoraConv2d, DoraConv3d, DoraEmbedding, DoraLinear

R = 2
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def gpt2_conv1d():
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 8)


LAYERS = {
    "linear": (lambda: DoraLinear(nn.Linear(8, 6), R, init_lora_weights=False), (X,)),
    "gpt2_conv1d": (lambda: DoraLinear(gpt2_conv1d(), R, init_lora_weights=False), (X,)),
    "embedding": (lambda: DoraEmbedding(nn.Embedding(7, 6), R, init_lora_weights=False), (torch.arange(7),)),
    "conv1d": (lambda: DoraConv1d(nn.Conv1d(3, 4, 3), R, init_lora_weights=False), (X.view(1, 3, 8),)),
    "conv2d": (lambda: DoraConv2d(nn.Conv2d(3, 4, 2), R, init_lora_weights=False), (X.view(1, 3, 2, 4),)),
    "conv3d": (lambda: DoraConv3d(nn.Conv3d(3, 4, 2), R, init_lora_weights=False), (X.view(1, 3, 2, 2, 2),)),
    "experts": (lambda: adapted_experts("mixtral", torch.float32), arguments("mixtral", dtype=torch.float32)),
}
KINDS = pytest.mark.parametrize("kind", LAYERS)
STATES = pytest.mark.parametrize("merged", [False, True], ids=["", "merged"])
CACHES = pytest.mark.parametrize("cached", [False, True], ids=["", "cached"])
COMPILED = pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


CLONES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": saved}


def build(kind, *, cached=False, merged=False, compiled=False):
    """A layer off its init, with what it is called with."""
    torch.manual_seed(0)
    make, args = LAYERS[kind]
    layer = make()
    with torch.no_grad():
        for magnitude in layer._magnitudes():
            magnitude.mul_(0.8 + 0.4 * torch.rand_like(magnitude))
    if cached:
        dorac.cache_norms(layer)
    if merged:
        layer.merge()
    if compiled:
        layer.compile(backend="eager")
    layer(*args)
    return layer, args


def storages(module):
    """Where all that a module holds lies, however it holds it."""
    held = [*module.parameters(), *module.buffers()]
    held += [v for m in module.modules() for v in vars(m).values() if isinstance(v, torch.Tensor)]
    return {tensor.data_ptr() for tensor in held if tensor.numel()}


@KINDS
@STATES
@CACHES
@COMPILED
@pytest.mark.parametrize("clone", CLONES.values(), ids=CLONES)
def test_a_copy_is_a_layer_of_its_own(kind, merged, cached, compiled, clone):
    layer, args = build(kind, cached=cached, merged=merged, compiled=compiled)
    y = layer(*args).detach().clone()
    twin = clone(layer)
    if compiled:  # which the copy is not: a convolution takes its bias elsewhere
        torch.testing.assert_close(twin(*args), y)
    else:
        assert torch.equal(twin(*args), y)
    assert (twin.merged, twin.scaling, twin.training) == (layer.merged, layer.scaling, layer.training)
    assert [(n, p.requires_grad) for n, p in twin.named_parameters()] == [
        (n, p.requires_grad) for n, p in layer.named_parameters()
    ]
    assert not storages(twin) & storages(layer)
    assert not {id(m) for m in twin.modules()} & {id(m) for m in layer.modules()}

    with torch.no_grad():  # what the copy computes is made of the copy's tensors alone
        for parameter in twin.parameters():
            parameter.zero_()
    assert not twin(*args).any()
    assert torch.equal(layer(*args), y)
    if not merged:
        twin(*args).sum().backward()
        assert all(p.grad is None for p in layer.parameters())
        assert all((p.grad is None) != p.requires_grad for p in twin.parameters())


@KINDS
@CACHES
@pytest.mark.parametrize("clone", CLONES.values(), ids=CLONES)
def test_a_copy_of_a_merged_layer_unmerges_to_the_same_bits(kind, cached, clone):
    layer, args = build(kind, cached=cached, merged=True)
    twin = clone(layer)
    layer.unmerge()
    assert twin.merged
    twin.unmerge()
    assert all(torch.equal(a, b) for a, b in zip(twin.base_weights(), layer.base_weights(), strict=True))
    assert torch.equal(twin(*args), layer(*args))


@KINDS
def test_the_copy_of_a_compiled_layer_is_not_compiled(kind):
    """As that of ``nn.Linear``: it may be compiled by itself."""
    layer, args = build(kind, compiled=True)
    twin, stock = copy.deepcopy(layer), nn.Linear(2, 2)
    stock.compile(backend="eager")
    assert twin._compiled_call_impl is copy.deepcopy(stock)._compiled_call_impl is None
    assert vars(twin).keys() | {"_compiled_call_impl"} == vars(layer).keys() | {"_compiled_call_impl"}
    twin.compile(backend="eager", fullgraph=True)
    assert torch.equal(twin(*args), layer(*args))


@CACHES
@COMPILED
@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("later", [False, True], ids=["", "changed_later"])
def test_averaged_models(cached, compiled, use_buffers, later):
    """The average keeps in step with the model, also one that is merged or cached after the average was made."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 6))
    dorac.apply_dora(model, ["0", "2"], r=R, init_lora_weights=False)
    if compiled:
        model.compile(backend="eager")
    if cached and not later:
        dorac.cache_norms(model)
    average = AveragedModel(model, use_buffers=use_buffers)
    if cached and later:
        dorac.cache_norms(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1)
    seen = []
    for _ in range(3):
        model(X).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
        seen.append([p.detach().clone() for p in model.parameters()])
    for mean, steps in zip(average.module.parameters(), zip(*seen, strict=True), strict=True):
        torch.testing.assert_close(mean, torch.stack(steps).mean(0))
    if not use_buffers:
        for mine, its in zip(average.module[1].buffers(), model[1].buffers(), strict=True):
            assert torch.equal(mine, its)
    plain = copy.deepcopy(average.module)
    assert torch.equal(average.eval()(X), plain.eval()(X))
    if later:
        dorac.merge(model)
        average.update_parameters(model)


@pytest.mark.parametrize("clone", CLONES.values(), ids=CLONES)
def test_a_copied_model_guards_its_own_layers(clone):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 6))
    dorac.apply_dora(model, ["1"], r=R)
    twin = clone(model)
    state = {key: 2 * value for key, value in model.state_dict().items()}
    twin[1].merge()
    before = copy.deepcopy(twin.state_dict())
    with pytest.raises(ValueError, match="1 is merged"):
        twin.load_state_dict(state)
    assert all(torch.equal(before[key], value) for key, value in twin.state_dict().items())
    model.load_state_dict(state)
    plain = dorac.merge(twin, unload=True)
    assert not dora_layers(plain)
    assert vars(plain).keys() == vars(nn.Sequential()).keys()
    plain.load_state_dict(plain.state_dict())
