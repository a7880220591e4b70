"""``dorac.cache_norms`` in models of PEFT's: the bits of a model without it, and no stale norm."""

import copy
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

peft = pytest.importorskip("peft")

import test_peft_caching as writes  # noqa: E402
from peft.helpers import rescale_adapter_scale  # noqa: E402
from peft_models import KINDS, off_init, target, twins  # noqa: E402
from test_norm_cache import computed_norms, trained  # noqa: E402
from test_norm_cache_tools import Average, FlatMaster, ScheduleFree  # noqa: E402
from test_peft_caching import factor, input_of  # noqa: E402
from test_peft_quantised import SCHEMES, quantised_model, torchao_int8  # noqa: E402

import dorac.peft  # noqa: E402

SOME = ["linear", "gpt2_conv1d", "embedding", "conv2d"]


def cached(kind, dtype=torch.float32, **options):
    """A model with a cache that a forward has used."""
    _, model = twins(kind, dtype=dtype, **options)
    cache = dorac.cache_norms(model)
    model(input_of(kind, model))
    return model, cache


def keepers(model):
    return [module.keeper for module in model.modules() if getattr(module, "keeper", None) is not None]


def assert_fresh(model, forward=None, x=None, kind="linear"):
    """What ``forward`` computes is what a copy of the model computes, which keeps nothing."""
    x = input_of(kind, model) if x is None else x
    y = (model if forward is None else forward)(x).detach()
    assert torch.equal(y, copy.deepcopy(model)(x))
    return y


@pytest.mark.parametrize("kind", KINDS)
def test_forward_computes_no_norm(kind):
    model, cache = cached(kind)
    x = input_of(kind, model)
    assert computed_norms(lambda: model(x).sum().backward()) == 0 < computed_norms(lambda: copy.deepcopy(model)(x))
    assert_fresh(model, kind=kind)
    cache.check()
    cache.remove()
    assert computed_norms(lambda: model(x)) > 0


# --- writes -----------------------------------------------------------------------------------------------------------


def unscaled(model):
    target(model).unscale_layer(0.5)
    target(model).scaling["default"] *= 1.25  # PEFT's ignores embeddings


def loaded_adapter(model, tmp_path):
    other = off_init(copy.deepcopy(model), seed=7)
    other.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "default")


def deleted_adapter(model):
    writes.another_adapter(model)
    model.delete_adapter("default")


def switched_and_written(model):
    writes.another_adapter(model)
    with torch.no_grad():
        factor(model).mul_(2)
    model.set_adapter("default")


def cast_there_and_back(model):
    model.double().bfloat16().float()


def through_data_and_eval(model):
    """As an average of weights that is swapped in for an evaluation."""
    writes.data_copy(model)
    model.eval()


def base_data_and_eval(model):
    writes.base_data(model)
    model.eval()


def data_and_cast(model):
    writes.data_lerp_of_lora_A(model)
    model.float()


WRITES = [
    writes.set_scale,
    writes.scale_layer,
    unscaled,
    writes.load_state_dict,
    writes.set_peft_state,
    loaded_adapter,
    writes.base_in_place,
    writes.other_data,
    writes.other_parameter,
    writes.swapped,
    writes.another_adapter,
    deleted_adapter,
    switched_and_written,
    writes.merged_and_back,
    writes.optimizer_step,
    cast_there_and_back,
    through_data_and_eval,
    base_data_and_eval,
    data_and_cast,
    writes.to_float32,
]
# Between two calls of compiled code the host looks at nothing: of these it hears at the optimizer's next step.
COMPILED_APART = [writes.merged_and_back]  # a cast, which torch 2.11 does not notice in an embedding's adapter
UNHEARD = [writes.base_in_place, writes.swapped, writes.other_data, switched_and_written]


def written(model, write, tmp_path):
    torch.manual_seed(0)
    write(model, tmp_path) if write is loaded_adapter else write(model)


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", SOME)
def test_a_write_is_followed(kind, write, tmp_path):
    model, cache = cached(kind)
    x = input_of(kind, model)
    before = model(x).detach()
    written(model, write, tmp_path)
    y = assert_fresh(model, kind=kind)
    if write is not writes.another_adapter:  # which writes to the one that no forward uses, too
        cache.check()
    if write not in (writes.merged_and_back, writes.to_float32):
        assert not torch.equal(y, before)
    if write not in (writes.other_parameter, writes.another_adapter, deleted_adapter):  # others than it knows
        assert computed_norms(lambda: model(x.to(y.dtype) if x.is_floating_point() else x)) == 0


@pytest.mark.parametrize("write", [w for w in WRITES if w not in UNHEARD + COMPILED_APART], ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ["linear", "embedding"])
def test_a_write_is_followed_by_compiled_code(kind, write, tmp_path):
    torch._dynamo.reset()
    model, cache = cached(kind)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    before = assert_fresh(model, compiled, kind=kind)
    written(model, write, tmp_path)
    y = assert_fresh(model, compiled, kind=kind)
    if write is not writes.to_float32:
        assert not torch.equal(y, before)
    cache.refresh()
    assert_fresh(model, compiled, kind=kind)


@pytest.mark.parametrize("write", UNHEARD, ids=lambda f: f.__name__)
def test_a_write_that_compiled_code_does_not_hear_of(write, tmp_path):
    torch._dynamo.reset()
    model, cache = cached("linear")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(input_of("linear", model))
    written(model, write, tmp_path)
    with pytest.raises(RuntimeError, match=r"cached norm of base_model.model.target \(adapter default\) is stale"):
        cache.check()
    cache.refresh()
    assert_fresh(model, compiled)
    writes.base_in_place(model)
    optimizer = torch.optim.SGD(trained(model), lr=0.1)
    compiled(input_of("linear", model)).sum().backward()
    with pytest.warns(UserWarning, match="were written to between two steps") as caught:
        optimizer.step()
    assert [warning.filename for warning in caught] == [__file__]
    assert_fresh(model, compiled)


@pytest.mark.parametrize("use_compile", [False, True])
def test_rescaled_for_a_while(use_compile):
    """As diffusers does for one image."""
    torch._dynamo.reset()
    model, _ = cached("linear")
    counter = CompileCounterWithBackend("aot_eager")
    forward = torch.compile(model, backend=counter, fullgraph=True) if use_compile else model
    outputs = []
    for _ in range(2):
        outputs.append(assert_fresh(model, forward))
        with rescale_adapter_scale(model, 0.5):
            outputs.append(assert_fresh(model, forward))
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
    assert not torch.equal(outputs[0], outputs[1])
    assert counter.frame_count <= 3


def whole_model(model):
    model.merge_adapter()
    model.unmerge_adapter()


def one_layer(model):
    target(model).merge()
    target(model).unmerge()


@pytest.mark.parametrize("round_trip", [whole_model, one_layer])
@pytest.mark.parametrize("use_compile", [False, True])
def test_merged_and_unmerged(use_compile, round_trip):
    """In float16 the weight that comes back is another one, where the norm is not the magnitude."""
    torch._dynamo.reset()
    model, cache = cached("linear", torch.float16)
    with torch.no_grad():
        target(model).lora_magnitude_vector["default"].weight.mul_(1.7)
    forward = torch.compile(model, backend="aot_eager", fullgraph=True) if use_compile else model
    assert_fresh(model, forward)
    before = keepers(model)[0].kept.norm.clone()
    round_trip(model)
    assert_fresh(model, forward)
    assert not torch.equal(keepers(model)[0].kept.norm, before)
    model.merge_adapter()
    assert keepers(model)[0].kept.of is None  # a quantised weight of before would stay in memory
    trained(model)[0].grad = torch.ones_like(trained(model)[0])
    torch.optim.SGD(trained(model), lr=0.1).step()  # of merged layers none is taken
    model.unmerge_adapter()
    assert_fresh(model, forward)
    cache.check()


def test_a_refused_merge_leaves_the_norms():
    torch._dynamo.reset()
    model, cache = cached("linear", adapters=["default", "other"])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(input_of("linear", model)).sum().backward()
    with torch.no_grad():
        target(model).lora_magnitude_vector["other"].weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="NaNs"):
        model.merge_adapter(["default", "other"], safe_merge=True)
    cache.check()
    assert keepers(model)[0].kept.of is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing was written to between two steps
        torch.optim.SGD(trained(model), lr=0.1).step()
    assert_fresh(model, compiled)
    assert_fresh(model)


# --- training ---------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(24, 17), nn.Linear(17, 24)
        self.checkpoint = None

    def run(self, x):
        return self.down(torch.nn.functional.gelu(self.up(x)))

    def forward(self, x):
        if self.checkpoint is None:
            return self.run(x)
        return torch.utils.checkpoint.checkpoint(self.run, x, use_reentrant=self.checkpoint)


def adapted(*adapters, **options):
    torch.manual_seed(1)
    config = peft.LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules=["up", "down"], **options)
    model = peft.get_peft_model(Net(), config)
    for name in adapters:
        model.add_adapter(name, config)
    dorac.peft.enable(model)
    return off_init(model)


def train(model, forward=None, steps=4, features=24, lr=1e-2):
    optimizer = torch.optim.AdamW(trained(model), lr=lr)
    generator = torch.Generator().manual_seed(3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(2):
            x = torch.randn(6, features, generator=generator).requires_grad_()
            loss = (model if forward is None else forward)(x).square().mean()
            loss.backward()
            losses.append(loss.item())
        optimizer.step()
    return losses


@pytest.mark.parametrize("lora_dropout", [0.0, 0.2])
@pytest.mark.parametrize("checkpoint", [None, False, True])
def test_losses_are_the_same_bits(checkpoint, lora_dropout):
    model = adapted(lora_dropout=lora_dropout)
    model.base_model.model.checkpoint = checkpoint
    torch.manual_seed(5)
    expected = train(copy.deepcopy(model))
    cache = dorac.cache_norms(model)
    losses = []
    torch.manual_seed(5)
    # Two norms for each of 4 steps, and none in a forward.
    assert computed_norms(lambda: losses.extend(train(model))) == 8
    assert losses == expected
    assert len(set(losses)) == len(losses)
    cache.check()


@pytest.mark.parametrize("adapters", [[], ["other"]])
def test_compiled_losses_are_the_same_bits(adapters):
    torch._dynamo.reset()
    model = adapted(*adapters)
    twin = copy.deepcopy(model)
    expected = train(twin, torch.compile(twin, backend="aot_eager", fullgraph=True))
    torch._dynamo.reset()
    cache = dorac.cache_norms(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(torch.randn(6, 24, requires_grad=True)).sum().backward()
    model.zero_grad()
    with torch.compiler.set_stance("fail_on_recompile"):
        assert train(model, compiled) == expected
    cache.check()
    assert all(keeper.kept.traced for keeper in keepers(model) if keeper.adapter == "default")


def evaluated_average(model, optimizer):
    average = Average(trained(model))
    average.shadow = [1.5 * p for p in average.shadow]
    model.eval()
    with average.average_parameters():
        yield
    model.train()


def schedule_free(model, optimizer):
    optimizer.eval()
    yield
    optimizer.train()


def nothing(model, optimizer):
    yield


TOOLS = {
    "average": (lambda p: torch.optim.AdamW(p, lr=1e-2), evaluated_average),
    "schedule_free": (lambda p: ScheduleFree(p, lr=0.1, through_data=True), schedule_free),
    "copies": (FlatMaster, nothing),  # a flat copy of the parameters is stepped and copied to them
}


@pytest.mark.parametrize("use_compile", [False, True])
@pytest.mark.parametrize("tool", TOOLS)
def test_tools_that_write_to_parameters(tool, use_compile):
    torch._dynamo.reset()
    model = adapted()
    dorac.cache_norms(model)
    make, around = TOOLS[tool]
    optimizer = make(trained(model))
    forward = torch.compile(model, backend="aot_eager", fullgraph=True) if use_compile else model
    generator, outputs = torch.Generator().manual_seed(3), []
    getattr(optimizer, "train", lambda: None)()
    for _ in range(3):
        x = torch.randn(6, 24, generator=generator)
        assert_fresh(model, forward, x=x)
        optimizer.zero_grad()
        forward(x).square().mean().backward()
        optimizer.step()
        for _ in around(model, optimizer):
            with torch.no_grad():
                outputs.append(assert_fresh(model, forward, x=x))
                assert torch.equal(forward(x), outputs[-1])
    assert len({y.sum().item() for y in outputs}) == 3


def test_adapters_have_norms_of_their_own():
    model = adapted("other")
    dorac.cache_norms(model)
    x = torch.randn(6, 24)
    outputs = {}
    for name in ("default", "other", "default", "other"):
        model.set_adapter(name)
        y = assert_fresh(model, x=x)
        assert torch.equal(outputs.setdefault(name, y), y)
        assert computed_norms(lambda: model(x)) == 0
    assert not torch.equal(outputs["default"], outputs["other"])
    model.base_model.set_adapter(["default", "other"])
    assert_fresh(model, x=x)
    assert computed_norms(lambda: model(x)) == 0
    train(model)  # both
    assert_fresh(model, x=x)
    before = [keeper.kept.norm.clone() for keeper in keepers(model)]
    model.set_adapter("other")
    train(model)
    assert_fresh(model, x=x)
    for keeper, norm in zip(keepers(model), before, strict=True):
        assert torch.equal(keeper.kept.norm, norm) == (keeper.adapter == "default")


def test_switching_compiled():
    torch._dynamo.reset()
    model = adapted("other")
    dorac.cache_norms(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(6, 24)
    for name in ("default", "other"):
        model.set_adapter(name)
        assert_fresh(model, compiled, x=x)
    train(model, steps=1)  # the second adapter; the first one keeps its norm
    for name in ("default", "other"):
        model.set_adapter(name)
        assert_fresh(model, compiled, x=x)


def test_a_mixed_model():
    """One call for layers of dorac.nn and of PEFT's."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(24, 24))
    dorac.apply_dora(plain, ["0"], r=3, lora_alpha=6, init_lora_weights=False)
    model = nn.Sequential(plain, adapted())
    expected = train(copy.deepcopy(model))
    cache = dorac.cache_norms(model)
    assert len(cache._layers) == 3
    assert train(model) == expected
    cache.check()


def test_hooked_base_layers():
    """They are called, and the adapter computes over what they gave."""
    model = adapted()
    base = model.base_model.model.up.base_layer
    called = []
    base.register_forward_hook(lambda *_: called.append(1))
    cache = dorac.cache_norms(model)
    x = torch.randn(6, 24)
    with torch.no_grad():
        assert computed_norms(lambda: model(x)) == 0
    cache.check()
    assert called
    with torch.no_grad():
        base.weight.mul_(2)
    assert_fresh(model, x=x)


# --- switched off, copied, refused ------------------------------------------------------------------------------------


def test_disabled_models_keep_nothing():
    model, cache = cached("linear")
    held = keepers(model)  # by somebody: the cache finds it still
    dorac.peft.disable(model)
    assert [keeper.kept for keeper in held] == [None]
    assert not keepers(model)
    assert "keeper" not in vars(target(model).lora_magnitude_vector["default"])
    cache.check()
    cache.refresh()
    with torch.no_grad():
        factor(model).mul_(2)
    assert_fresh(model)
    dorac.peft.enable(model)
    assert_fresh(model)
    with dorac.cache_norms(model) as again:
        again.check()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_keep_nothing(clone):
    model, _ = cached("linear")
    twin = clone(model)
    x = input_of("linear", model)
    assert not keepers(twin)
    assert torch.equal(twin(x), model(x))
    with torch.no_grad():
        factor(twin).mul_(2)
    assert not torch.equal(twin(x), model(x))
    assert computed_norms(lambda: model(x)) == 0
    with dorac.cache_norms(twin) as cache:
        cache.check()


def test_no_model_is_kept_alive():
    model, _ = cached("linear")
    dead = weakref.ref(target(model))
    del model
    gc.collect()
    assert dead() is None


def test_a_model_that_is_dropped_is_freed_at_once():
    """Without the garbage collector: its base weights are on the GPU until then."""
    gc.collect()
    gc.disable()
    try:
        model, cache = cached("linear")
        magnitude = target(model).lora_magnitude_vector["default"]
        dead = weakref.ref(target(model))
        del model
        assert dead() is None
    finally:
        gc.enable()
    cache.check()  # the magnitude is still there, with its norm
    cache.refresh()
    optimizer = torch.optim.SGD(magnitude.parameters(), lr=0.1)
    magnitude.weight.grad = torch.ones_like(magnitude.weight)
    optimizer.step()
    assert magnitude.keeper.norm_inputs() == ()


def test_an_adapter_that_is_added_takes_its_own_norm():
    model, cache = cached("linear")
    writes.another_adapter(model)
    assert_fresh(model)
    expected = train(copy.deepcopy(model), features=10)
    assert train(model, features=10) == expected
    cache.remove()
    with dorac.cache_norms(model):
        assert len([keeper for keeper in keepers(model) if keeper.kept is not None]) == 2


def test_debug_mode():
    model, cache = cached("linear")
    cache.remove()
    dorac.cache_norms(model, debug=True)
    x = input_of("linear", model)
    model(x)
    writes.data_copy(model)
    with pytest.raises(RuntimeError, match=r"cached norm of Linear \(adapter default\) is stale"):
        model(x)


def unfrozen(model):
    target(model).base_layer.weight.requires_grad_(True)


def twice(model):
    dorac.cache_norms(model)


def offloaded(model):
    target(model).base_layer.to("meta")


@pytest.mark.parametrize(
    ("change", "message"),
    [(unfrozen, "its base weight is trained"), (twice, "it is cached already"), (offloaded, "are on the meta device")],
)
def test_refused(change, message):
    _, model = twins("linear")
    change(model)
    with pytest.raises(ValueError, match=rf"base_model.model.target \(adapter default\): .*{message}"):
        dorac.cache_norms(model)


def test_refused_where_dorac_is_not_enabled():
    stock, _ = twins("linear")
    with pytest.raises(ValueError, match=r"PeftModel holds no DoRA layer; .* to dorac.peft.enable"):
        dorac.cache_norms(stock)


def test_a_base_weight_that_is_trained_later():
    model, _ = cached("linear")
    unfrozen(model)
    assert_fresh(model)
    with torch.no_grad():
        target(model).base_layer.weight.mul_(2)
    assert_fresh(model)


def test_functional_call_and_transforms():
    model, _ = cached("linear")
    x = input_of("linear", model)
    other = {name: p.detach() * 1.5 for name, p in model.named_parameters() if p.requires_grad}
    plain = copy.deepcopy(model)

    def run(net, parameters):
        return torch.func.functional_call(net, parameters, (x,))

    assert torch.equal(run(model, other), run(plain, other))
    stacked = {name: torch.stack([p, 1.1 * p]) for name, p in other.items()}
    torch.testing.assert_close(
        torch.func.vmap(lambda p: run(model, p))(stacked), torch.func.vmap(lambda p: run(plain, p))(stacked)
    )


# --- quantised base layers --------------------------------------------------------------------------------------------


def quantised_target(model):
    return model.base_model.model[0]


def written_pieces(model):
    from dorac import packed

    base = quantised_target(model).base_layer
    pieces = packed.stored(base)
    scale = next(piece for piece in pieces if piece.dtype is torch.float32)
    with torch.no_grad():
        scale.mul_(2)


def weight_in_place(model):
    """Which counts in the version of the weight, not in those of its pieces."""
    weight = quantised_target(model).base_layer.weight
    with torch.no_grad():
        if hasattr(weight, "__tensor_flatten__"):
            linear = nn.Linear(*weight.shape[::-1])
            nn.init.normal_(linear.weight)
            weight.copy_(torchao_int8(linear).weight)
        else:
            weight.copy_(weight.flip(0))


def written_factor(model):
    with torch.no_grad():
        quantised_target(model).lora_B["default"].weight.mul_(2)


def rescaled(model):
    quantised_target(model).set_scale("default", 3)


def merged_and_unmerged(model):
    if type(quantised_target(model)).__name__ == "TorchaoLoraLinear":
        pytest.skip("PEFT requantises only what transformers has loaded")
    model.merge_adapter()
    model.unmerge_adapter()


def loaded_state(model):
    state = peft.get_peft_model_state_dict(off_init(copy.deepcopy(model), seed=7))
    peft.set_peft_model_state_dict(model, state)


def evaluated(model):
    """On a CPU with bf16 instructions a 4-bit layer packs its weight anew in its next forward."""
    model.eval()


QUANTISED_WRITES = [
    written_pieces,
    weight_in_place,
    written_factor,
    rescaled,
    merged_and_unmerged,
    loaded_state,
    evaluated,
]
quiet = pytest.mark.filterwarnings("ignore:Merge lora:UserWarning", "ignore:Unmerge lora:UserWarning")
SCHEMES = [s for s in SCHEMES if "hqq" not in s.id]


def pieces_of(model):
    return [type(keeper.kept.at).__name__ for keeper in keepers(model)]


@pytest.mark.parametrize("lora_dropout", [0.0, 0.2])
@pytest.mark.parametrize("use_compile", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_training_over_a_quantised_base(scheme, use_compile, lora_dropout):
    """With dropout PEFT's sequence runs, over the dequantised weight."""
    torch._dynamo.reset()
    if use_compile and lora_dropout and scheme.__name__ == "bnb_8bit":
        pytest.skip("torch does not compile PEFT's dequantisation")
    model = quantised_model(scheme, lora_dropout=lora_dropout)
    twin = quantised_model(scheme, lora_dropout=lora_dropout)
    torch.manual_seed(5)
    expected = train(twin, features=64, steps=2)
    cache = dorac.cache_norms(model)
    assert pieces_of(model) == ["PackedMoment"] * 2
    counter = CompileCounterWithBackend("aot_eager")
    forward = torch.compile(model, backend=counter, fullgraph=True) if use_compile else model
    model(torch.randn(6, 64))  # in which an int8 layer takes over the scales from its parameter
    moments, losses = [keeper.kept.at for keeper in keepers(model)], []
    torch.manual_seed(5)
    assert computed_norms(lambda: losses.extend(train(model, forward, features=64, steps=2))) == 4
    assert losses == expected
    cache.check()
    assert counter.frame_count == int(use_compile)
    assert all(keeper.kept.at is not moment for keeper, moment in zip(keepers(model), moments, strict=True))


@quiet
@pytest.mark.parametrize("write", QUANTISED_WRITES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_write_to_a_quantised_layer_is_followed(scheme, write):
    model = quantised_model(scheme).train()
    cache = dorac.cache_norms(model)
    x = torch.randn(6, 64)
    before = model(x)
    kept = [keeper.kept.at for keeper in keepers(model)]
    assert torch.equal(model(x), before)
    assert [keeper.kept.at for keeper in keepers(model)] == kept  # nothing was taken anew
    torch.manual_seed(0)
    write(model)
    y = model(x)
    cache.check()
    assert computed_norms(lambda: model(x)) == 0
    cache.remove()
    assert torch.equal(model(x), y)
    if write is not evaluated:
        assert not torch.equal(y, before)
