"""Whatever is raised at whichever write: afterwards the model is bit for bit what it was.

A call is run again and again on copies of one model, and an exception is raised at its first write, at its second, and
so on, once before that write and once after it. Writes are ops in place on any tensor, what torch's modules are told
(attributes, parameters, buffers, hooks, children), ``requires_grad_``, and files that are moved in place.
"""

import contextlib
import copy
import functools
import itertools
import os
import sys
from collections import OrderedDict

import pytest
import torch
from test_experts_module import adapted as adapted_experts
from test_experts_module import arguments, stock
from torch import nn
from torch.optim import optimizer
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.hooks import RemovableHandle

import dorac
from dorac.apply import dora_layers
from dorac.nn import DoraExperts, DoraLayer
from dorac.nn.keeper import KeptNorm
from dorac.testing import quantised_layers

ERRORS = (ValueError, MemoryError, KeyboardInterrupt)
EACH_ERROR = False  # see _each_error
CACHES = []  # of the models of a test
TOKENS = torch.arange(12).reshape(2, 6) % 7
METHODS = (
    (nn.Module, "__setattr__"),
    (nn.Module, "__delattr__"),
    (KeptNorm, "__setattr__"),
    (nn.Module, "register_parameter"),
    (nn.Module, "register_buffer"),
    (nn.Module, "register_load_state_dict_pre_hook"),
    (nn.Module, "register_load_state_dict_post_hook"),
    (nn.Module, "set_submodule"),
    (RemovableHandle, "__init__"),
    (RemovableHandle, "remove"),
    (torch.Tensor, "requires_grad_"),
    (os, "replace"),
)


def without_modes(function):
    """What safetensors makes its tensors with takes no storages while a mode is on."""

    @functools.wraps(function)
    def run(*args, **kwargs):
        with _disable_current_modes():
            return function(*args, **kwargs)

    return run


class Faults(TorchDispatchMode):
    """Counts writes, and raises at one of them, before it is made or after."""

    def __init__(self, at: int = -1, error: type[BaseException] = ValueError, *, after: bool = False):
        super().__init__()
        self.at, self.error, self.after, self.writes = at, error, after, 0

    def write(self, function, args, kwargs):
        number, self.writes = self.writes, self.writes + 1
        if number == self.at and not self.after:
            raise self.error("injected")
        result = function(*args, **kwargs)
        if number == self.at:
            raise self.error("injected")
        return result

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.is_mutable:
            return self.write(function, args, kwargs or {})
        return function(*args, **(kwargs or {}))

    def __enter__(self):
        self._patches = contextlib.ExitStack()
        for owner, name in METHODS:
            self._patch(owner, name)
        self._patches.callback(setattr, torch, "asarray", torch.asarray)
        torch.asarray = without_modes(torch.asarray)
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._patches.close()

    def _patch(self, owner, name):
        original, own = getattr(owner, name), name in vars(owner)

        @functools.wraps(original)
        def faulty(*args, **kwargs):
            return self.write(original, args, kwargs)

        setattr(owner, name, faulty)
        self._patches.callback(setattr, owner, name, original) if own else self._patches.callback(delattr, owner, name)


class Body(nn.Module):
    """Three kinds of layers, one with a bias, beside a module with buffers."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.linear = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.conv = nn.Conv1d(8, 4, 3, padding=1)
        self.norm.bias.requires_grad_(False)  # flags of both kinds

    def forward(self, tokens):
        return self.conv(self.norm(self.linear(self.embed(tokens)).mT))


class Net(nn.Module):
    """These inside a model, and a head that is trained whole."""

    def __init__(self):
        super().__init__()
        self.body = Body()
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        return self.head(self.body(tokens).mT)


def plain():
    torch.manual_seed(0)
    return Net().eval()


def wrap(model):
    dorac.apply_dora(
        model, ["embed", "linear", "conv"], r=2, lora_alpha=3, init_lora_weights=False, modules_to_save=["head"]
    )


def off_init(model):
    with torch.no_grad():
        for layer in dora_layers(model).values():
            for magnitude in layer._magnitudes():
                magnitude.mul_(0.8 + 0.4 * torch.rand_like(magnitude))
    return model


def adapted():
    model = plain()
    wrap(model)
    return off_init(model)


def cached(model):
    CACHES.append(dorac.cache_norms(model))
    return model


class Experts(nn.Module):
    """The experts of a mixture-of-experts block, with an adapter for each."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, tokens):
        return self.experts(*arguments("mixtral"))


def contents(tensor):
    return None if tensor is None else tensor.detach().clone()


def registries(module):
    """What a module holds, in its order: every attribute, and what is in the dictionaries that torch keeps."""
    for name, value in vars(module).items():
        yield name, value
        if type(value) in (dict, OrderedDict, KeptNorm):
            items = vars(value) if type(value) is KeptNorm else value
            yield from ((f"{name}.{key}", item) for key, item in items.items())
        elif isinstance(value, set):
            yield from ((f"{name}.{key}", None) for key in sorted(value))


class State:
    """All that a call could have changed: objects by identity, and tensors by their bits."""

    def __init__(self, model):
        self.model = model
        self.held = self._held()
        self.tensors = [(t, contents(t), t.requires_grad, t.dtype, t.data_ptr()) for t in self._tensors()]
        self.hooks = self._hooks()
        self.output = self._output()

    def _held(self):
        return [
            (f"{prefix}:{type(module).__name__}:{name}", value)
            for prefix, module in self.model.named_modules(remove_duplicate=False)
            for name, value in registries(module)
        ]

    def _tensors(self):
        found = {id(value): value for _, value in self.held if isinstance(value, torch.Tensor)}
        return list(found.values())

    @staticmethod
    def _hooks():
        return [
            list(hooks) for hooks in (optimizer._global_optimizer_pre_hooks, optimizer._global_optimizer_post_hooks)
        ]

    def _output(self):
        with torch.no_grad():
            return self.model(TOKENS)

    def assert_kept(self):
        held = self._held()
        assert [name for name, _ in held] == [name for name, _ in self.held]
        changed = [name for (name, now), (_, before) in zip(held, self.held, strict=True) if now is not before]
        assert not changed
        for tensor, bits, requires_grad, dtype, address in self.tensors:
            assert (tensor.requires_grad, tensor.dtype, tensor.data_ptr()) == (requires_grad, dtype, address)
            assert torch.equal(tensor, bits)
        assert self._hooks() == self.hooks
        assert torch.equal(self._output(), self.output)


def every_fault(make, call, *, floor, check=State.assert_kept, errors=ERRORS):
    """Makes the model, injects and checks: at every write, before it and after, errors in turn, or each (full)."""
    counted = Faults()
    model = make()
    with counted:
        call(model)
    assert counted.writes >= floor
    for at in range(counted.writes):
        in_turn = [(errors[(at + after) % len(errors)], bool(after)) for after in range(2)]
        for error, after in itertools.product(errors, (False, True)) if EACH_ERROR else in_turn:
            drop_caches()
            model = make()
            state = State(model)
            with pytest.raises(BaseException, match="injected"), Faults(at, error, after=after):
                call(model)
            check(state)


def drop_caches():
    """Takes back what caches have told torch's optimizers."""
    for cache in CACHES:
        cache.remove()
    CACHES.clear()


@pytest.fixture(autouse=True, params=[False, pytest.param(True, marks=pytest.mark.full)], ids=["in turn", "each"])
def _each_error(request, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "EACH_ERROR", request.param)


@pytest.fixture(autouse=True)
def _hooks_of_this_test(no_other_caches):
    yield
    drop_caches()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    directory = tmp_path_factory.mktemp("adapter")
    model = adapted()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.25)
    dorac.save_adapter(model, directory)
    return directory


def copies_of(model):
    return functools.partial(copy.deepcopy, model)


def cached_copies_of(model):
    return lambda: cached(copy.deepcopy(model))


def test_apply_dora():
    every_fault(copies_of(plain()), wrap, floor=60)


@pytest.mark.parametrize("unload", [False, True], ids=["merge", "unload"])
def test_merge(unload):
    original = adapted()
    every_fault(
        cached_copies_of(original),
        lambda m: dorac.merge(m, unload=unload),
        floor=6 + 6 * unload,
    )


def test_unmerge():
    original = adapted()
    dorac.merge(original)
    every_fault(cached_copies_of(original), dorac.unmerge, floor=6)


def quantised(kind):
    model = plain()
    model.body.linear = kind(6, 8).to("cpu")
    model(TOKENS)  # an 8-bit layer takes its scales over in its first forward
    return model


@pytest.mark.parametrize("kind", [quantised_layers.Linear4bit, quantised_layers.Linear8bitLt])
@pytest.mark.parametrize("call", ["apply_dora", "merge", "unload", "unmerge"])
def test_quantised(kind, call):
    original = quantised(kind)
    if call == "apply_dora":
        return every_fault(copies_of(original), wrap, floor=60, errors=ERRORS[:1])
    wrap(original)
    off_init(original)
    if call == "unmerge":
        dorac.merge(original)
        return every_fault(cached_copies_of(original), dorac.unmerge, floor=6)
    return every_fault(cached_copies_of(original), lambda m: dorac.merge(m, unload=call == "unload"), floor=6)


def test_merge_of_layers_that_were_put_in_by_hand():
    """Merging leaves its guard on such a model, and takes it back."""
    parts = adapted().body
    original = nn.Sequential(OrderedDict(embed=parts.embed, linear=parts.linear))
    every_fault(cached_copies_of(original), dorac.merge, floor=5)


@pytest.mark.parametrize("layer", ["embed", "linear", "conv"])
def test_layers_by_themselves(layer):
    original = adapted()
    merged = copy.deepcopy(original)
    dorac.merge(merged)
    new = {key: tensor * 1.25 for key, tensor in getattr(original.body, layer).state_dict().items()}
    every_fault(cached_copies_of(original), lambda m: getattr(m.body, layer).merge(), floor=2)
    every_fault(cached_copies_of(merged), lambda m: getattr(m.body, layer).unmerge(), floor=2)
    for call in (
        lambda m: getattr(m.body, layer).reset_parameters(),
        lambda m: DoraLayer.scaling.fset(getattr(m.body, layer), 3.0),
        lambda m: getattr(m.body, layer).load_state_dict(new),
    ):
        every_fault(cached_copies_of(original), call, floor=2)


def test_experts():
    pytest.importorskip("transformers")
    original = Experts(adapted_experts("mixtral"))
    merged = copy.deepcopy(original)
    dorac.merge(merged)
    base = Experts(stock("mixtral"))
    every_fault(copies_of(base), lambda m: dorac.apply_dora(m, ["experts"], r=2, init_lora_weights=False), floor=40)
    every_fault(cached_copies_of(original), lambda m: dorac.merge(m, unload=True), floor=5)
    every_fault(cached_copies_of(merged), dorac.unmerge, floor=3)
    assert isinstance(original.experts, DoraExperts)


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
def test_load_adapter(adapter, wrapped):
    original = adapted() if wrapped else plain()
    every_fault(
        cached_copies_of(original) if wrapped else copies_of(original),
        lambda m: dorac.load_adapter(m, adapter),
        floor=12 if wrapped else 70,
    )


def named():
    """A model with two adapters, whose norms are both kept."""
    model = cached(adapted())
    dorac.add_adapter(model, "b", r=4, init_lora_weights=False)
    dorac.set_adapter(model, "b")
    off_init(model)
    dorac.set_adapter(model, "default")
    return model


class NamedState(State):
    """The other adapter's tensors, too."""

    def _tensors(self):
        shelves = [getattr(m, "adapters", None) or vars(m).get("dora_adapters", {}) for m in self.model.modules()]
        shelved = [adapter for shelf in shelves for adapter in shelf.values() if adapter is not None]
        others = [t for adapter in shelved for t in (*adapter.parameters(), *adapter.buffers())]
        return [*super()._tensors(), *others]


NAMED = {
    "set": (lambda m, *_: dorac.set_adapter(m, "b"), 6),
    "delete": (lambda m, *_: dorac.delete_adapter(m, "b"), 3),
    "add": (lambda m, *_: dorac.add_adapter(m, "c", r=3), 20),
    "load": (lambda m, adapter, _: dorac.load_adapter(m, adapter, adapter_name="c"), 20),
    "save": (lambda m, _, directory: dorac.save_adapter(m, directory, adapter_name="b"), 6),
}


@pytest.mark.parametrize(
    "call", [call if call in ("set", "delete") else pytest.param(call, marks=pytest.mark.full) for call in NAMED]
)
def test_named_adapters(call, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(f"{__name__}.State", NamedState)
    change, floor = NAMED[call]
    every_fault(named, lambda m: change(m, adapter, tmp_path), floor=floor, errors=ERRORS[:1])


def test_cache_norms():
    every_fault(copies_of(adapted()), cached, floor=5)


@pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
@pytest.mark.parametrize("part", ["", "lora_"], ids=["all", "adapter"])
def test_load_state_dict(assign, part):
    original = adapted()
    new = {key: tensor * 1.25 for key, tensor in original.state_dict().items() if part in key}
    every_fault(
        cached_copies_of(original),
        lambda m: m.load_state_dict(new, strict=not part, assign=assign),
        floor=9 if part else 20,
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.body.linear.lora_A.data.zero_(),
        lambda m: torch._foreach_mul_([m.body.linear.lora_A.data], 2.0),
        lambda m: setattr(m, "x", 1),
        lambda m: delattr(m, "training"),
        lambda m: m.body.linear.requires_grad_(False),
        lambda m: m.register_buffer("y", torch.ones(1)),
        lambda m: m.body.linear.register_forward_hook(print),
        lambda m: m.set_submodule("body.linear", nn.Linear(6, 8)),
    ],
    ids=["op", "ops", "attribute", "delattr", "requires_grad", "buffer", "hook", "child"],
)
def test_faults_and_changes_are_seen(change):
    """An injector that misses writes, or a comparison that misses changes, would let every test here pass."""
    model = adapted()
    state = State(model)
    with Faults() as faults:
        change(model)
    assert faults.writes
    with pytest.raises((AssertionError, AttributeError)):
        state.assert_kept()


def interrupted(*_):
    raise KeyboardInterrupt


def test_an_interrupted_refresh_leaves_no_stale_norm(monkeypatch):
    model = cached(adapted())
    with torch.no_grad():
        model.body.linear.lora_B.mul_(3)
        monkeypatch.setattr(torch, "_foreach_copy_", interrupted)
        with pytest.raises(KeyboardInterrupt):
            CACHES[0].refresh()
        monkeypatch.undo()
        assert torch.equal(model(TOKENS), copy.deepcopy(model)(TOKENS))  # a copy takes its own norms


def test_an_interrupted_move_leaves_no_stale_norm():
    model = cached(adapted())
    layer, x = model.body.linear, torch.randn(3, 6)
    seen = iter([False, False, False, True])

    def change(tensor):
        return interrupted() if next(seen) else 2 * tensor

    with pytest.raises(KeyboardInterrupt):
        layer._apply(change)
    assert torch.equal(layer(x), copy.deepcopy(layer)(x))
