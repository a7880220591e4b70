"""Which way a PEFT layer takes, in one functional call or as PEFT does, follows whatever changes between two calls.

Every change is made to a layer that has run directly already, beside a stock one; where it can be taken back, the layer
runs directly again.
"""

import contextlib
import copy
import gc
import pickle
import sys
import types
import weakref
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.modules import module as all_modules
from torch.nn.utils import parametrize

peft = pytest.importorskip("peft")

from peft.tuners.lora import LoraLayer  # noqa: E402
from peft_models import KINDS, Conv1D, off_init, stock_model, target, twins  # noqa: E402
from test_peft_dropin import FUNCTIONS, assert_same, run  # noqa: E402

import dorac.peft  # noqa: E402
from dorac import functional  # noqa: E402
from dorac.peft.switch import ours_by_stock  # noqa: E402
from dorac.peft.variants import factors  # noqa: E402

SOME = ["linear", "gpt2_conv1d", "embedding", "conv2d"]
DROPOUT = {"lora_dropout": 0.4}


@pytest.fixture
def calls(monkeypatch):
    """The names of the functions that compute a whole layer, as they are called."""
    names = []
    for name in FUNCTIONS:
        function = getattr(functional, name)
        monkeypatch.setattr(functional, name, lambda *a, n=name, f=function, **k: (names.append(n), f(*a, **k))[1])
    return names


def input_of(kind):
    return KINDS[kind].input(3, torch.float64)


def module_of(layer: LoraLayer, name: str) -> nn.Module:
    return layer.base_layer if name == "base_layer" else getattr(layer, name)["default"]


# Hooks

MODULES = ["base_layer", "lora_A", "lora_B", "lora_dropout", "lora_magnitude_vector"]
HOOKS = ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook", "backward_hook"]


@pytest.mark.filterwarnings("ignore:Using non-full backward hooks:FutureWarning")
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("kind", SOME)
def test_hooks_run(kind, hook, calls):
    _, ours = twins(kind, **DROPOUT)
    target(ours).base_layer.weight.requires_grad_()
    names = MODULES
    if kind == "embedding":  # the others are not called, and a tuple of the magnitude's module has no backward hook
        names = ["base_layer"] if hook == "backward_hook" else ["base_layer", "lora_magnitude_vector"]
    for name in names:
        run(ours, input_of(kind))
        assert len(calls) == 1
        calls.clear()
        seen = []
        handle = getattr(module_of(target(ours), name), f"register_{hook}")(lambda *_, seen=seen: seen.append(1))
        run(ours, input_of(kind))
        assert seen, name
        assert not calls
        handle.remove()
    run(ours, input_of(kind))
    assert len(calls) == 1


@pytest.mark.parametrize("kind", SOME)
def test_hooks_in_another_dictionary(kind, calls):
    """What removes hooks by giving a module a new dictionary, or adds them so."""
    _, ours = twins(kind)
    base, x, seen = target(ours).base_layer, input_of(kind), []
    ours(x)
    before, base._forward_hooks = base._forward_hooks, OrderedDict({0: lambda *_: seen.append(1)})
    ours(x)
    base._forward_hooks = before
    ours(x)
    assert (len(seen), len(calls)) == (1, 2)


@pytest.mark.parametrize("hook", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
@pytest.mark.parametrize("kind", SOME)
def test_global_hooks_run(kind, hook, calls):
    _, ours = twins(kind)
    base, x, seen = target(ours).base_layer, input_of(kind), []
    base.weight.requires_grad_()
    run(ours, x)
    handle = getattr(all_modules, f"register_module_{hook}")(
        lambda module, *_: seen.append(1) if module is base else None
    )
    try:
        run(ours, x)
    finally:
        handle.remove()
    assert seen
    run(ours, x)
    assert len(calls) == 2


# Everything else: a context manager of a layer and its model, in which ``direct`` says whether it runs in one call


@contextlib.contextmanager
def replaced(owner: object, name: str, value: object):
    before = getattr(owner, name)
    setattr(owner, name, value)
    yield
    setattr(owner, name, before)


@contextlib.contextmanager
def entry_replaced(entries, key: str, value: object):
    before = entries[key]
    entries[key] = value
    yield
    entries[key] = before


def own_forward(layer, model):
    """As accelerate's hooks do."""
    base = layer.base_layer
    forward = base.forward

    @contextlib.contextmanager
    def hooked():
        base.forward = lambda x: forward(x) * 1.5
        yield
        del base.forward

    return hooked()


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    weight = property(lambda self: self.inner.weight)
    bias = property(lambda self: getattr(self.inner, "bias", None))

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x):
        return self.inner(x) * 1.5


def wrapped_base(layer, model):
    return replaced(layer, "base_layer", Wrapped(layer.base_layer))


def other_base(layer, model):
    other = copy.deepcopy(layer.base_layer)
    with torch.no_grad():
        other.weight.mul_(1.5)
    return replaced(layer, "base_layer", other)


def other_class(layer, model):
    base = layer.base_layer
    doubling = type("Doubling", (type(base),), {"forward": lambda self, x: super(type(self), self).forward(x) * 2})
    return replaced(base, "__class__", doubling)


def parametrized(layer, model):
    base = layer.base_layer

    @contextlib.contextmanager
    def context():
        parametrize.register_parametrization(base, "weight", nn.Identity())
        yield
        parametrize.remove_parametrizations(base, "weight")

    return context()


def other_class_of_magnitude(layer, model):
    module = layer.lora_magnitude_vector["default"]
    return replaced(module, "__class__", type("OfAUser", (type(module),), {}))


def another_variant(layer, model):
    """Of the adapter, whose magnitude stays: it decides what forward is."""
    variants = {ours: stock for stock, ours in ours_by_stock().items()}
    kind = type(layer.lora_variant["default"])
    return entry_replaced(layer.lora_variant, "default", variants.get(kind, kind)())


def other_lora_A(layer, model):
    if "default" in layer.lora_A:
        other = copy.deepcopy(layer.lora_A["default"])
        with torch.no_grad():
            other.weight.mul_(1.5)
        return entry_replaced(layer.lora_A, "default", other)
    return entry_replaced(layer.lora_embedding_A, "default", nn.Parameter(layer.lora_embedding_A["default"] * 1.5))


def other_weight(layer, model):
    return replaced(layer.base_layer, "weight", nn.Parameter(layer.base_layer.weight.detach() * 1.5, False))


def other_bias(layer, model):
    if getattr(layer.base_layer, "bias", None) is None:
        pytest.skip("no bias")
    return replaced(
        layer.base_layer,
        "bias",
        None if type(layer.base_layer) is nn.Linear else nn.Parameter(layer.base_layer.bias.detach() * 1.5),
    )


def shadowed_weight(layer, model):
    """FSDP1 takes the parameter out of its dictionary and gives the module an attribute of its name."""
    base = layer.base_layer

    @contextlib.contextmanager
    def context():
        parameter = base._parameters.pop("weight")
        base.__dict__["weight"] = parameter.detach() * 1.5
        yield
        del base.__dict__["weight"]
        base._parameters["weight"] = parameter

    return context()


def other_data(layer, model):
    return replaced(factors(layer, "default")[1], "data", factors(layer, "default")[1].data * 1.5)


def other_magnitude(layer, model):
    module = layer.lora_magnitude_vector["default"]
    return replaced(module, "weight", nn.Parameter(module.weight.detach() * 1.5))


class Quantised(torch.Tensor):
    """A tensor of a class that dorac does not know."""


def subclass_of_tensor(layer, model):
    base = layer.base_layer
    weight = base.weight.detach().as_subclass(Quantised)

    @contextlib.contextmanager
    def context():
        parameter, base._parameters["weight"] = base._parameters["weight"], weight
        yield
        base._parameters["weight"] = parameter

    return context()


def disabled(layer, model):
    return model.disable_adapter()


@contextlib.contextmanager
def merged(layer, model):
    layer.merge()
    yield
    layer.unmerge()


@contextlib.contextmanager
def other_adapter(layer, model):
    model.set_adapter("other")
    yield
    model.set_adapter("default")


@contextlib.contextmanager
def two_adapters(layer, model):
    model.base_model.set_adapter(["default", "other"])
    yield
    model.base_model.set_adapter(["default"])


@contextlib.contextmanager
def one_of_two_elsewhere(layer, model):
    """Two are active of which one has no part in this layer."""
    layer.set_adapter(["default", "of other layers"])
    yield
    layer.set_adapter("default")


@contextlib.contextmanager
def as_a_string(layer, model):
    """PEFT keeps one name or a list of names."""
    layer.set_adapter("other")
    layer._active_adapter = "other"
    yield
    layer.set_adapter("default")


@contextlib.contextmanager
def deleted_and_added(layer, model):
    config = copy.deepcopy(model.peft_config["other"])
    model.delete_adapter("other")
    model.add_adapter("other", config)
    off_init(model, seed=5)
    model.set_adapter("other")
    yield
    model.set_adapter("default")


def dropout_of_another_kind(layer, model):
    return entry_replaced(layer.lora_dropout, "default", nn.AlphaDropout(0.4))


def dropout_of_another_p(layer, model):
    return entry_replaced(layer.lora_dropout, "default", nn.Dropout(0.9))


def dropout_of_all(layer, model):
    return entry_replaced(layer.lora_dropout, "default", nn.Dropout(1.0))


def identity(layer, model):
    return entry_replaced(layer.lora_dropout, "default", nn.Identity())


@contextlib.contextmanager
def no_dropout_in_eval(layer, model):
    model.eval()
    yield
    model.train()


@contextlib.contextmanager
def dropout_in_eval(layer, model):
    layer.lora_dropout.eval()
    yield
    layer.lora_dropout.train()


def layer_alone_in_eval(layer, model):
    return replaced(layer, "training", False)


@contextlib.contextmanager
def set_scale(layer, model):
    layer.set_scale("default", 3)
    yield
    layer.set_scale("default", 1)


@contextlib.contextmanager
def scale_layer(layer, model):
    layer.scale_layer(0.5)
    yield
    layer.unscale_layer()


@contextlib.contextmanager
def scaling_in_the_dictionary(layer, model):
    with entry_replaced(layer.scaling, "default", -0.5):
        yield


@contextlib.contextmanager
def frozen(layer, model):
    for factor in factors(layer, "default"):
        factor.requires_grad_(False)
    yield
    for factor in factors(layer, "default"):
        factor.requires_grad_()


@contextlib.contextmanager
def base_is_trained(layer, model):
    if type(layer.base_layer) is Conv1D:
        pytest.skip("stock PEFT makes another parameter of the transposed weight, and its gradient is lost")
    layer.base_layer.weight.requires_grad_()
    yield
    layer.base_layer.weight.requires_grad_(False)


@contextlib.contextmanager
def cast_and_back(layer, model):
    model.float().double()
    yield


DIRECT = [
    other_base,
    other_lora_A,
    other_weight,
    other_bias,
    shadowed_weight,
    other_data,
    other_magnitude,
    other_adapter,
    one_of_two_elsewhere,
    as_a_string,
    deleted_and_added,
    dropout_of_another_p,
    identity,
    no_dropout_in_eval,
    dropout_in_eval,
    layer_alone_in_eval,
    set_scale,
    scale_layer,
    scaling_in_the_dictionary,
    frozen,
    base_is_trained,
    cast_and_back,
]
STRENGTHS = {set_scale: 3, scale_layer: 0.5, scaling_in_the_dictionary: -0.5 / 1.5}  # stock PEFT scales BA alone
AS_PEFT = [
    another_variant,
    own_forward,
    wrapped_base,
    other_class,
    other_class_of_magnitude,
    parametrized,
    subclass_of_tensor,
    disabled,
    merged,
    two_adapters,
    dropout_of_another_kind,
    dropout_of_all,
]


def seeded(model, x):
    torch.manual_seed(1)
    return model(x)


@pytest.mark.filterwarnings("ignore:Adapter other was active")
@pytest.mark.parametrize("change", [*DIRECT, *AS_PEFT], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", SOME)
def test_changes(kind, change, calls):
    stock, ours = twins(kind, adapters=("default", "other"), **DROPOUT)
    direct = change in DIRECT
    if "dropout" in change.__name__ and kind == "embedding":
        direct = True  # which has none
    x = input_of(kind)
    assert_same(ours, stock, x)
    assert len(calls) == 1
    before = run(ours, x)
    low, high = target(ours).base_layer(x), seeded(ours, x)
    calls.clear()
    with contextlib.ExitStack() as changes:
        for model in (stock, ours):
            torch.manual_seed(0)
            changes.enter_context(change(target(model), model))
        if change in (merged, disabled):
            torch.testing.assert_close(ours(x), stock(x))
        elif change in STRENGTHS:
            torch.testing.assert_close(seeded(ours, x), low + STRENGTHS[change] * (high - low))
        else:
            assert_same(ours, stock, x)
        assert bool(calls) == direct
    calls.clear()
    assert_same(ours, stock, x)
    assert len(calls) == 1
    if change not in (cast_and_back, merged, deleted_and_added):
        torch.testing.assert_close(run(ours, x), before)


@pytest.mark.parametrize("kind", SOME)
def test_switched_off_and_on(kind, calls):
    _, ours = twins(kind)
    x = input_of(kind)
    expected = ours(x)
    for switch, direct in (
        (dorac.peft.enable, True),
        (dorac.peft.disable, False),
        (dorac.peft.disable, False),
        (dorac.peft.enable, True),
        (dorac.peft.enable, True),
    ):
        switch(ours)
        calls.clear()
        torch.testing.assert_close(ours(x), expected)
        assert bool(calls) == direct


@pytest.mark.parametrize("kind", SOME)
def test_deepspeed_comes_later(kind, calls, monkeypatch):
    """ZeRO-3 marks parameters that a model has had from the start; until it gathers them, more is said to be there."""
    asked = []

    @contextlib.contextmanager
    def gathered(parameters, modifier_rank=None, fwd_module=None):
        asked.extend(parameters)
        for parameter in parameters:
            parameter.ds_shape = parameter.shape
        yield

    module = types.ModuleType("deepspeed")
    module.zero = types.SimpleNamespace(GatheredParameters=gathered)
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    _, ours = twins(kind)
    layer, x = target(ours), input_of(kind)
    for parameter in (layer.base_layer.weight, *factors(layer, "default")):
        expected = ours(x)
        assert len(calls) == 1
        parameter.ds_id, parameter.ds_shape = 0, (2, *parameter.shape)
        asked.clear()
        torch.testing.assert_close(ours(x), expected)
        assert any(p is parameter for p in asked)
        assert len(calls) == 1
        del parameter.ds_id, parameter.ds_shape
        calls.clear()


@pytest.mark.parametrize("kind", SOME)
def test_fsdp_parts_come_later(kind, calls):
    pytest.importorskip("torch.distributed.fsdp")
    _, ours = twins(kind)
    x = input_of(kind)
    for parameter in (target(ours).base_layer.weight, *factors(target(ours), "default")):
        ours(x)
        assert len(calls) == 1
        with (
            replaced(parameter, "data", parameter.data.flatten()[:5]),
            pytest.raises(RuntimeError, match="FSDP holds a parameter"),
        ):
            ours(x)
        calls.clear()
    ours(x)
    assert len(calls) == 1


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_the_dtype_of_x(kind, calls):
    """What the base layer does not take stock PEFT refuses, and takes under autocast."""
    stock, ours = twins(kind, dtype=torch.float32)
    x = KINDS[kind].input(3, torch.float32)
    ours(x)
    for model in (ours, stock):
        with pytest.raises(RuntimeError):
            model(x.bfloat16())
    assert len(calls) == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x.bfloat16()).dtype == torch.bfloat16
    ours(x)
    assert len(calls) == 3


def test_a_batch_of_one_adapter_by_name(calls):
    _, ours = twins("linear")
    x = input_of("linear")
    y = ours(x)
    assert torch.equal(target(ours)(x, adapter_names=["default"] * len(x)), y)
    ours(x)
    assert len(calls) == 3


@pytest.mark.parametrize("kind", ["linear", "gpt2_conv1d"])
def test_another_device(kind, calls):
    """Parameters that are elsewhere than x are refused in the base layer's words; directly again with x there, too."""
    stock, ours = twins(kind)
    x = input_of(kind)
    ours(x)
    errors = []
    for model in (stock, ours):
        model.to("meta")
        with pytest.raises(RuntimeError) as refused:
            model(x)
        errors.append(str(refused.value))
    assert errors[0] == errors[1]
    assert len(calls) == 1
    assert ours(x.to("meta")).device.type == "meta"
    assert len(calls) == 2


@pytest.mark.parametrize("kind", SOME)
def test_a_magnitude_on_another_device(kind, calls):
    """It is brought to x, as stock PEFT does for its ephemeral offload."""
    _, ours = twins(kind)
    module, x = target(ours).lora_magnitude_vector["default"], input_of(kind)
    ours.to("meta")
    module.weight = nn.Parameter(torch.ones(module.weight.shape, dtype=torch.float64, device="cpu"))
    assert ours(x.to("meta")).device.type == "meta"
    assert len(calls) == 1


@pytest.mark.parametrize("kind", SOME)
def test_factors_of_two_dtypes(kind, calls):
    """They are refused, and not by the function of the whole layer."""
    _, ours = twins(kind)
    x = input_of(kind)
    ours(x)
    factor = factors(target(ours), "default")[1]
    with replaced(factor, "data", factor.data.float()), pytest.raises(TypeError, match="must share a dtype"):
        ours(x)
    assert len(calls) == 1
    ours(x)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "options", [{"max_norm": 1.0}, {"sparse": True, "scale_grad_by_freq": True}], ids=["max_norm", "sparse_by_freq"]
)
def test_options_of_an_embedding(options, calls):
    """What the function does not compute."""
    _, ours = twins("embedding")
    base, x = target(ours).base_layer, input_of("embedding")
    with torch.no_grad():
        ours(x)
        with contextlib.ExitStack() as changes:
            for name, value in options.items():
                changes.enter_context(replaced(base, name, value))
            ours(x)
            assert len(calls) == 1
        ours(x)
    assert len(calls) == 2


def test_tensor_parallel_embeddings(calls):
    """Where PEFT has functions of its own around the look-up."""
    _, ours = twins("embedding")
    layer, x = target(ours), input_of("embedding")
    ours(x)
    layer.input_fns["default"] = layer.output_fns["default"] = lambda module, tensor: tensor
    with contextlib.suppress(Exception):  # they are not what is tested
        ours(x)
    assert len(calls) == 1
    layer.input_fns.clear()
    layer.output_fns.clear()
    ours(x)
    assert len(calls) == 2


# Nothing is kept


@pytest.mark.parametrize("kind", SOME)
def test_copies_are_models_of_their_own(kind, calls):
    _, ours = twins(kind)
    x = input_of(kind)
    expected = ours(x)
    for copied in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        calls.clear()
        torch.testing.assert_close(copied(x), expected, rtol=0, atol=0)
        with torch.no_grad():
            target(copied).base_layer.weight.mul_(1.5)
        assert not torch.equal(copied(x), expected)
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=0)
        target(copied).base_layer.register_forward_hook(lambda *_: None)
        assert len(calls) == 3
        copied(x)
        assert len(calls) == 3
        ours(x)
        assert len(calls) == 4


@pytest.mark.parametrize("kind", SOME)
def test_a_layer_that_has_run_is_freed_at_once(kind):
    _, ours = twins(kind)
    with torch.no_grad():
        ours(input_of(kind))
    layer = target(ours)
    alive = [weakref.ref(t) for t in (layer.base_layer.weight, *factors(layer, "default"), layer.base_layer, layer)]
    gc.collect()
    gc.disable()
    try:
        del layer, ours, _
        assert [reference() for reference in alive] == [None] * len(alive)
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", SOME)
def test_a_replaced_parameter_is_freed_at_once(kind):
    _, ours = twins(kind)
    with torch.no_grad():
        ours(input_of(kind))
    base = target(ours).base_layer
    old = weakref.ref(base.weight)
    base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
    assert old() is None


@pytest.mark.parametrize("kind", SOME)
def test_running_leaves_no_trace(kind):
    ours = stock_model(kind)
    dorac.peft.enable(ours)
    before = {name: set(vars(module)) for name, module in ours.named_modules()}
    run(ours, input_of(kind))
    assert {name: set(vars(module)) for name, module in ours.named_modules()} == before


@pytest.mark.parametrize(("kind", "limit"), [("linear", 40), ("embedding", 40), ("conv2d", 40)])
def test_python_calls_around_the_function(kind, limit, monkeypatch):
    """How many Python functions a layer calls beside the function that computes it; there were 75 to 87."""
    _, ours = twins(kind)
    layer, x = target(ours), input_of(kind)
    y, called = ours(x), []
    for name in FUNCTIONS:
        monkeypatch.setattr(functional, name, lambda *args, **options: y)
    sys.setprofile(lambda frame, event, argument: called.append(frame.f_code.co_name) if event == "call" else None)
    try:
        layer.forward(x)
    finally:
        sys.setprofile(None)
    assert len(called) <= limit, called
