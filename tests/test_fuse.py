"""``fuse`` and ``unfuse`` on hand-written blocks: when layers are computed together, when each for itself; copies."""

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dorac
from dorac import functional
from dorac.nn import shared

T, HIDDEN, INNER = 5, 16, 24


class Attention(nn.Module):
    """``between`` runs after q: it may write to its input, switch gradients off or raise."""

    def __init__(self):
        super().__init__()
        self.q_proj = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.k_proj = nn.Linear(HIDDEN, 8)
        self.v_proj = nn.Linear(HIDDEN, 8)
        self.o_proj = nn.Linear(8, HIDDEN)

    def forward(self, hidden_states, key_value_states=None, between=None):
        other = hidden_states if key_value_states is None else key_value_states
        q = self.q_proj(hidden_states)
        if between is not None:
            between(hidden_states)
        k, v = self.k_proj(other), self.v_proj(other)
        return hidden_states + self.o_proj((q[..., :8] @ k.mT).softmax(-1) @ v)


class GatedMLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, INNER)
        self.up_proj = nn.Linear(HIDDEN, INNER, bias=False)
        self.down_proj = nn.Linear(INNER, HIDDEN)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Clamped(GatedMLP):
    """The same children, and another function."""

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=0.1) * self.up_proj(x))


class WrittenTo(GatedMLP):
    def forward(self, x):
        gate = self.gate_proj(x)
        gate[..., 0] = 0
        return self.down_proj(self.act_fn(gate) * self.up_proj(x))


class Halved(GatedMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).mul_(0.5) * self.up_proj(x))


class Widened(GatedMLP):
    def forward(self, x):
        return self.down_proj((self.act_fn(self.gate_proj(x).float()) * self.up_proj(x).float()).to(x.dtype))


class Noisy(GatedMLP):
    """Another function in training."""

    def forward(self, x):
        gate = self.act_fn(self.gate_proj(x))
        return self.down_proj((gate + 1 if self.training else gate) * self.up_proj(x))


class Twice(GatedMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.gate_proj(x)) + self.up_proj(x)[..., :HIDDEN]


class Hooked(GatedMLP):
    def forward(self, x):
        gate = self.gate_proj(x)
        if gate.requires_grad:
            gate.register_hook(lambda gradient: 2 * gradient)
        return self.down_proj(self.act_fn(gate) * self.up_proj(x))


class HalfClamped(GatedMLP):
    """Another function of one dtype, as models clamp float16."""

    def forward(self, x):
        gate = self.act_fn(self.gate_proj(x))
        return self.down_proj((gate.clamp(max=0.1) if gate.dtype is torch.float16 else gate) * self.up_proj(x))


class OfLongInputs(GatedMLP):
    def forward(self, x):
        gate = self.act_fn(self.gate_proj(x))
        return self.down_proj((gate if x.shape[-2] < 1000 else 2 * gate) * self.up_proj(x))


class OfRows(GatedMLP):
    def forward(self, x):
        gate = self.act_fn(self.gate_proj(x))
        return self.down_proj((2 * gate if x.dim() == 2 else gate) * self.up_proj(x))


class WithoutGradients(GatedMLP):
    def forward(self, x):
        gate = self.act_fn(self.gate_proj(x))
        return self.down_proj((gate if torch.is_grad_enabled() else 2 * gate) * self.up_proj(x))


class OutsideAutocast(GatedMLP):
    def forward(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().forward(x)


class Kept(GatedMLP):
    """Keeps what it computes in between, as probes of activations read it."""

    def forward(self, x):
        self.gate = self.act_fn(self.gate_proj(x))
        return self.down_proj(self.gate * self.up_proj(x))


class Listed(GatedMLP):
    def __init__(self):
        super().__init__()
        self.gates = []

    def forward(self, x):
        self.gates.append(self.act_fn(self.gate_proj(x)))
        return self.down_proj(self.gates[-1] * self.up_proj(x))


class Scaled(GatedMLP):
    """The plain MLP until somebody sets the factor."""

    factor = None

    def forward(self, x):
        gate = self.act_fn(self.gate_proj(x))
        return self.down_proj((gate if self.factor is None else self.factor * gate) * self.up_proj(x))


class ClippedFarOut(nn.Module):
    """As transformers' gelu_10."""

    def forward(self, x):
        return F.silu(x).clamp(max=10)


class Noted(nn.SiLU):
    def forward(self, x):
        self.seen = x
        return super().forward(x)


class OfFunctions(nn.Module):
    """As torchtitan and Meta write it."""

    def __init__(self):
        super().__init__()
        self.w1, self.w2 = nn.Linear(HIDDEN, INNER, bias=False), nn.Linear(INNER, HIDDEN, bias=False)
        self.w3 = nn.Linear(HIDDEN, INNER, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class OfTanhGelu(OfFunctions):
    def forward(self, x):
        return self.w2(self.w3(x) * F.gelu(self.w1(x), approximate="tanh"))


class Joined(nn.Module):
    """Gate and up in one layer, as in Phi-3."""

    def __init__(self):
        super().__init__()
        self.both, self.down, self.act = nn.Linear(HIDDEN, 2 * INNER), nn.Linear(INNER, HIDDEN), nn.ReLU()

    def forward(self, x):
        gate, up = self.both(x).chunk(2, dim=-1)
        return self.down(up * self.act(gate))


class JoinedGateLast(Joined):
    def forward(self, x):
        up, gate = self.both(x).chunk(2, dim=-1)
        return self.down(self.act(gate) * up)


class JoinedTwice(Joined):
    def forward(self, x):
        gate, _ = self.both(x).chunk(2, dim=-1)
        return self.down(self.act(gate) * gate)


class DroppedMLP(nn.Module):
    def __init__(self, p=0.5):
        super().__init__()
        self.wi, self.wo = nn.Linear(HIDDEN, INNER), nn.Linear(INNER, HIDDEN)
        self.act, self.inside, self.behind = nn.ReLU(), nn.Dropout(p), nn.Dropout(p)

    def forward(self, x):
        return self.behind(self.wo(self.inside(self.act(self.wi(x)))))


class Model(nn.Module):
    def __init__(self, mlp=GatedMLP):
        super().__init__()
        self.attention, self.mlp = Attention(), mlp()

    def forward(self, x, **how):
        return self.mlp(self.attention(x, **how))


def off_init(model):
    """Magnitudes off the norm."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, dorac.nn.DoraLinear):
                layer.lora_magnitude_vector.mul_(1 + 0.1 * torch.randn_like(layer.lora_magnitude_vector))


def adapted(mlp=GatedMLP, targets="all-linear", **options):
    torch.manual_seed(0)
    model = Model(mlp).double()
    dorac.apply_dora(model, targets, 4, 8, init_lora_weights=False, **options)
    off_init(model)
    return model


def draw(seed=1):
    return torch.randn(2, T, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def calls(monkeypatch):
    """How many projections each call of the two functions had: 0 for an MLP."""
    noted = []

    def note(function, size):
        def noting(x, *args, **kwargs):
            noted.append(size(*args))
            return function(x, *args, **kwargs)

        return noting

    monkeypatch.setattr(functional, "dora_linears", note(functional.dora_linears, lambda projections: len(projections)))
    monkeypatch.setattr(functional, "dora_mlp", note(functional.dora_mlp, lambda *projections: 0))
    return noted


def results(model, x, **how):
    """The output and all gradients."""
    leaf = x.clone().requires_grad_()
    y = model(leaf, **how)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y.sin().sum(), [leaf, *trained])]


def assert_same(actual, expected):
    """To roundings of float64: the sums are those of the layers, in another order where there is one."""
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        if not e.numel():
            continue
        torch.testing.assert_close(a, e, rtol=0, atol=2**-44 * max(1.0, e.abs().max().item()))


def test_both_blocks_and_back(calls):
    model = adapted()
    expected, keys = results(model, draw()), list(model.state_dict())
    classes = [type(m) for m in model.modules()]
    report = dorac.fuse(model)
    assert list(report.fused) == ["attention", "mlp"]
    assert repr(report) == (
        "fused: attention: q_proj, k_proj, v_proj of one input\n"
        "fused: mlp: an MLP of gate_proj, up_proj, down_proj with silu\n"
        "left: nothing"
    )
    assert isinstance(model.mlp, GatedMLP)
    assert type(model.mlp).__name__ == "GatedMLP"
    assert_same(results(model, draw()), expected)
    assert calls == [3, 0]
    assert list(model.state_dict()) == keys
    assert dorac.fuse(model) == report  # a second time
    dorac.unfuse(model)
    assert [type(m) for m in model.modules()] == classes
    assert not any("dorac_block" in vars(m) for m in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(results(model, draw()), expected, strict=True))
    assert calls == [3, 0]


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj", "v_proj"], [2]),
        (["q_proj", "down_proj"], [0]),
        (["k_proj", "v_proj", "o_proj", "gate_proj"], [2, 0]),
    ],
)
def test_layers_without_an_adapter(calls, targets, expected):
    model = adapted(targets=targets)
    before = results(model, draw())
    dorac.fuse(model)
    assert_same(results(model, draw()), before)
    assert calls == expected


def test_ranks_dtypes_and_starts_of_their_own(calls):
    model = adapted(rank_pattern={"k_proj": 1, "up_proj": 7}, alpha_pattern={"v_proj": -3.0})
    dorac.set_strength(model.attention.q_proj, 0.5)
    model.attention.v_proj.scaling = torch.tensor(0.25, dtype=torch.float64)
    model.mlp.up_proj.lora_A.requires_grad_(False)
    before = results(model, draw())
    dorac.fuse(model)
    dorac.cache_norms(model)
    for _ in range(2):
        assert_same(results(model, draw()), before)
    assert calls == [3, 0, 3, 0]


@pytest.mark.parametrize("shape", [(HIDDEN,), (1, HIDDEN), (0, HIDDEN), (2, 3, 4, HIDDEN)])
def test_shapes(calls, shape):
    model = adapted().mlp
    x = torch.randn(shape, dtype=torch.float64)
    before = results(model, x)
    dorac.fuse(model)
    assert_same(results(model, x), before)
    assert calls == [0]


def merge(model):
    dorac.merge(model)


def switch_one_off(model):
    model.attention.k_proj.switch(disabled=True)
    model.mlp.up_proj.strength = 0


def hook_late(model):
    for layer in (model.attention.k_proj, model.mlp.act_fn):
        layer.register_forward_hook(lambda module, args, y: 2 * y)


def patch_late(model):
    for layer in (model.attention.v_proj, model.mlp.gate_proj):
        layer.forward = lambda x, forward=layer.forward: 3 * forward(x)


def other_class(model):
    class Doubled(dorac.nn.DoraLinear):
        def forward(self, x):
            return 2 * super().forward(x)

    model.attention.q_proj.__class__ = model.attention.v_proj.__class__ = Doubled
    model.mlp.down_proj.__class__ = Doubled


def other_activation(model):
    model.mlp.act_fn = nn.Tanh()
    model.attention.q_proj, model.attention.k_proj = nn.Identity(), model.attention.v_proj


def tracked_norms(model):
    for layer in (model.attention.q_proj, model.mlp.down_proj):
        layer.norm_grad = True


@pytest.mark.parametrize(
    "change", [merge, switch_one_off, hook_late, patch_late, other_class, other_activation, tracked_norms]
)
def test_what_changes_after_fusing_is_computed_layer_by_layer(calls, change):
    plain, model = adapted(), adapted()
    dorac.fuse(model)
    for one in (plain, model):
        change(one)
    expected, actual = (one(draw()) for one in (plain, model))
    assert torch.equal(actual, expected)
    assert not [size for size in calls if size in (0, 3)]


def test_an_activation_that_becomes_another(calls):
    """By an attribute; one with children may become another unseen, and is left."""
    model = adapted()
    model.mlp.act_fn = nn.GELU()
    exact = model(draw())
    dorac.fuse(model)
    model.mlp.act_fn.approximate = "tanh"
    expected = results(adapted_with(model.mlp.act_fn), draw())
    assert_same(results(model, draw()), expected)
    assert not torch.equal(expected[0], exact)
    assert calls == [3]
    model.mlp.act_fn.approximate = "none"
    torch.testing.assert_close(model(draw()), exact)
    assert calls == [3, 3, 0]
    model = adapted_with(nn.Sequential(nn.GELU()))
    assert "its activation, Sequential, is none of silu" in dorac.fuse(model).left["mlp"]


def adapted_with(act):
    model = adapted()
    model.mlp.act_fn = act
    return model


def test_adapters_off_and_on_again(calls):
    model = adapted()
    with dorac.disabled(model):
        base = model(draw())
    dorac.fuse(model)
    with dorac.disabled(model):
        assert torch.equal(model(draw()), base)
    assert not calls
    model(draw())
    assert calls == [3, 0]
    assert dorac.find_idle(model, draw()) == {}


def test_hooks_and_patches_are_left_with_the_reason():
    model = adapted()
    model.attention.k_proj.register_forward_pre_hook(lambda module, args: None)
    model.attention.o_proj.register_forward_hook(lambda module, args, y: None)  # called by itself at any rate
    patched = "it has a forward of its own (patched, or put there by accelerate's hooks)"
    left = {"attention": "k_proj has hooks or a patched forward, which have to run", "mlp": patched}
    model.mlp.forward = model.mlp.forward  # as accelerate's hooks leave it
    assert dorac.fuse(model) == dorac.Fusion({}, left)
    model.mlp.forward = lambda x: x
    assert dorac.fuse(model) == dorac.Fusion({}, left)
    assert torch.equal(model.mlp(draw()), draw())


def test_hooks_on_the_block_and_the_other_layers_run(calls):
    model, seen = adapted(), []
    for module in (model.attention, model.attention.o_proj, model.mlp):
        module.register_forward_hook(lambda module, args, y: seen.append(type(module).__name__))
        module.register_full_backward_hook(lambda module, *grads: seen.append("back"))
    assert len(dorac.fuse(model).fused) == 2
    results(model, draw())
    assert seen == ["DoraLinear", "Attention", "GatedMLP", "back", "back", "back"]
    assert calls == [3, 0]


@pytest.mark.parametrize(
    "mlp",
    [
        *(Clamped, WrittenTo, Halved, Widened, Noisy, Twice, Hooked, JoinedTwice),
        *(HalfClamped, OfLongInputs, OfRows, WithoutGradients, OutsideAutocast, Kept, Listed),
    ],
    ids=lambda mlp: mlp.__name__,
)
def test_another_function_of_the_same_layers_is_left(calls, mlp):
    model = adapted(mlp)
    report = dorac.fuse(model)
    assert report.left == {"mlp": "its forward is neither down(act(gate(x)) * up(x)) nor down(act(up(x)))"}
    assert_same(results(model, draw()), results(adapted(mlp), draw()))
    assert calls == [3]


def test_under_another_default_device(calls):
    model = adapted()
    with torch.device("meta"):
        assert "mlp" in dorac.fuse(model).fused


def test_without_values_yet(calls):
    with torch.device("meta"):
        model = Model(GatedMLP).double()
    dorac.apply_dora(model, "all-linear", 4, 8)
    assert dorac.fuse(model).left == {
        "attention": "q_proj has no values yet: load them, and call fuse again",
        "mlp": "gate_proj has no values yet: load them, and call fuse again",
    }
    model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        if "base_layer" in name:
            nn.init.normal_(parameter)
    model.train()
    assert len(dorac.fuse(model).fused) == 2


def test_a_copy_first_called_under_a_transform(calls):
    model = adapted()
    dorac.fuse(model)
    copied = copy.deepcopy(model)
    x = torch.stack([draw(), draw(2)])
    torch.testing.assert_close(torch.func.vmap(copied)(x), torch.stack([model(part) for part in x]))
    calls.clear()
    copied(draw())
    assert calls == [3, 0]


def test_what_a_forward_keeps_is_kept_as_without(calls):
    kept, listed = adapted(Kept), adapted(Listed)
    for model in (kept, listed):
        dorac.fuse(model)
    assert not hasattr(kept.mlp, "gate")
    assert listed.mlp.gates == []  # nothing of the looking
    y = kept(draw())
    assert torch.equal(kept.mlp.down_proj(kept.mlp.gate * kept.mlp.up_proj(kept.attention(draw()))), y)
    assert torch.equal(listed(draw()), y)
    assert torch.equal(listed.mlp.gates[0], kept.mlp.gate)


def test_an_attribute_that_is_set_later_is_read(calls):
    model, plain = adapted(Scaled), adapted(Scaled)
    assert "mlp" in dorac.fuse(model).fused
    for factor, expected in ((None, [3, 0]), (3.0, [3]), (None, [3, 0])):
        model.mlp.factor = plain.mlp.factor = factor
        calls.clear()
        assert torch.allclose(model(draw()), plain(draw()), rtol=1e-12, atol=0)
        assert calls == expected


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize(
    ("mlp", "what"),
    [
        (OfFunctions, "w1, w3, w2 with silu"),
        (OfTanhGelu, "w1, w3, w2 with gelu_tanh"),
        (Joined, "both, down with relu"),
        (JoinedGateLast, "both, down with relu"),
    ],
)
def test_other_ways_to_write_an_mlp(calls, mlp, what, cached):
    model = adapted(mlp)
    expected = results(model, draw())
    if cached:
        dorac.cache_norms(model)
    assert dorac.fuse(model).fused["mlp"] == f"an MLP of {what}"
    assert_same(results(model, draw()), expected)
    assert calls == [3, 0]


def test_what_a_class_and_its_activation_become(calls, monkeypatch):
    model = adapted()
    model.mlp.act_fn = nn.Tanh()
    assert "Tanh, is none of silu" in dorac.fuse(model).left["mlp"]
    for act in (nn.Sequential(nn.SiLU(), nn.Dropout(0.5)), Noted(), ClippedFarOut()):
        model = adapted().eval()
        model.mlp.act_fn = act
        assert "is none of silu" in dorac.fuse(model).left["mlp"]
        assert not hasattr(act, "seen")  # nothing of the looking
    model = adapted()
    dorac.fuse(model)
    loaded = pickle.dumps(model)
    monkeypatch.setattr(GatedMLP, "forward", Clamped.forward)  # as kernel libraries patch classes
    expected = adapted(Clamped)(draw())
    for one in (model, copy.deepcopy(model), pickle.loads(loaded)):
        calls.clear()
        assert torch.equal(one(draw()), expected)
        assert calls == [3]


@pytest.mark.parametrize("training", [True, False])
def test_dropout_of_the_block_itself(calls, training):
    model = adapted(DroppedMLP).mlp.train(training)
    torch.manual_seed(3)
    expected = model(draw())
    assert not dorac.fuse(model).left
    torch.manual_seed(3)
    assert torch.equal(model(draw()), expected)
    assert calls == ([] if training else [0])
    model.inside.p = 0.0
    torch.manual_seed(3)
    dropped = model(draw())
    assert calls == ([0] if training else [0, 0])
    assert (dropped == 0).any() == training


@pytest.mark.parametrize("dropout_on", ["adapter", "low_rank"])
def test_dropout_of_the_adapters_has_one_mask(dropout_on):
    model = adapted(lora_dropout=0.5, dropout_on=dropout_on)
    attention, x = model.attention, draw()
    expected_eval = model.eval()(x)
    dorac.fuse(model)
    assert_same([model(x)], [expected_eval])
    model.train()
    layers = [attention.q_proj, attention.k_proj, attention.v_proj]
    torch.manual_seed(5)
    expected = functional.dora_linears(x, [layer.projection(x)[0] for layer in layers], dropout_on=dropout_on)
    torch.manual_seed(5)
    with shared.together(layers):
        actual = [layer(x) for layer in layers]
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert not torch.equal(actual[0], layers[0].eval()(x))
    attention.k_proj.dropout_on = "low_rank" if dropout_on == "adapter" else "adapter"
    model.train()(x)  # each for itself


def test_another_input_in_between(calls):
    model, x, other = adapted(), draw(), draw(2)
    dorac.fuse(model)
    plain = adapted()

    def write(hidden_states):
        hidden_states.mul_(2)

    with torch.no_grad():
        assert torch.equal(model.attention(x.clone(), between=write), plain.attention(x.clone(), between=write))
    assert calls == [3, 2]  # k and v of what was written
    calls.clear()
    assert_same(
        results(model.attention, x, key_value_states=other), results(plain.attention, x, key_value_states=other)
    )
    assert calls == [2]
    assert torch.equal(model.attention(x, other), plain.attention(x, other))
    assert torch.equal(model.attention(hidden_states=x, key_value_states=None), plain.attention(x))
    assert calls == [2, 2, 3]


def test_another_mode_in_between(calls):
    model, x = adapted(), draw().requires_grad_()
    dorac.fuse(model)
    noted = []

    def switch(hidden_states):
        torch.set_grad_enabled(False)

    def note(module, args, y):
        noted.append(y.requires_grad)

    model.attention.register_forward_hook(note)
    try:
        y = model.attention(x, between=switch)
    finally:
        torch.set_grad_enabled(True)
    assert calls == [3, 2]  # k and v once more, without gradients
    assert noted == [False]
    assert torch.equal(y, adapted().attention(x))


def test_inference_mode(calls):
    model = adapted()
    expected = model(draw()).detach()
    dorac.fuse(model)
    with torch.inference_mode():
        assert_same([model(draw())], [expected])
    assert calls == [0]  # a write to an attention's input would not be seen


def test_one_projection_alone_and_what_an_exception_leaves(calls):
    model, x = adapted(), draw()
    dorac.fuse(model)
    expected = adapted().attention.q_proj(x)
    assert torch.equal(model.attention.q_proj(x), expected)
    assert not calls

    def fail(hidden_states):
        raise KeyError("in between")

    kept = []

    def keep(x, projections, **how):
        ys = real(x, projections, **how)
        kept.extend(map(weakref.ref, ys))
        return ys

    real, functional.dora_linears = functional.dora_linears, keep
    try:
        with pytest.raises(KeyError):
            model.attention(x, between=fail)
    finally:
        functional.dora_linears = real
    gc.collect()
    assert len(kept) == 3
    assert not any(ref() is not None for ref in kept)
    assert torch.equal(model.attention.k_proj(x), adapted().attention.k_proj(x))
    assert calls == [3]


def test_threads():
    model = adapted()
    inputs = [draw(seed) for seed in range(4)]
    with torch.no_grad():
        expected = [model(x) for x in inputs]
        dorac.fuse(model)
    wrong, barrier = [], threading.Barrier(4)

    def run(i):
        barrier.wait()
        with torch.no_grad():
            for _ in range(20):
                if not torch.allclose(model(inputs[i]), expected[i], rtol=0, atol=1e-12):
                    wrong.append(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(calls, reentrant):
    model, x = adapted(), draw()
    expected = results(model, x)
    dorac.fuse(model)

    def checkpointed(x):
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)

    trained = [p for p in model.parameters() if p.requires_grad]
    leaf = x.clone().requires_grad_()
    y = checkpointed(leaf)
    y.sin().sum().backward()
    assert_same([y, leaf.grad, *(p.grad for p in trained)], expected)
    assert calls == [3, 0, 3, 0]


def test_copies(calls):
    model = adapted()
    dorac.fuse(model)
    expected = model(draw())
    replica = model.mlp._replicate_for_data_parallel()  # what nn.DataParallel makes
    replica._modules = {name: copy.deepcopy(child) for name, child in model.mlp._modules.items()}
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        calls.clear()
        assert torch.equal(one(draw()), expected)
        assert calls == [3, 0]
    with torch.no_grad():
        for child in replica._modules.values():
            for p in child.parameters():
                p.zero_()
    assert not replica(draw()).any()  # its own layers, not the model's
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.mlp.down_proj.base_layer.bias.add_(1)
    assert torch.equal(model(draw()), expected)
    dorac.unfuse(copied)
    assert type(copied.mlp) is GatedMLP
    assert type(model.mlp) is not GatedMLP
    base = dorac.base_model(model)
    assert type(base.mlp) is GatedMLP
    plain = dorac.merge(model, unload=True)
    assert [type(plain.attention), type(plain.mlp)] == [Attention, GatedMLP]


def test_functional_call_and_transforms(calls):
    model, x = adapted(), draw()
    dorac.fuse(model)
    plain = adapted()
    values = {name: p.detach() * 1.25 for name, p in plain.named_parameters()}

    def loss(module):
        return lambda values, x: torch.func.functional_call(module, values, (x,)).sin().sum()

    with torch.no_grad():
        got, want = (torch.func.functional_call(m, values, (x,)) for m in (model, plain))
    assert torch.equal(got, want)
    for transform in (torch.func.grad, lambda f: torch.vmap(torch.func.grad(f), (None, 0))):
        actual, expected = (transform(loss(m))(values, x) for m in (model, plain))
        assert_same(actual.values(), expected.values())


def test_compiled_as_without(calls):
    graphs = []

    def noting(graph, inputs):
        graphs.append([(node.op, str(node.target)) for node in graph.graph.nodes])
        return graph.forward

    for fused in (False, True):
        torch._dynamo.reset()
        model = adapted()
        if fused:
            dorac.fuse(model)
        y = torch.compile(model, backend=noting, fullgraph=True)(draw())
        assert_same([y], [adapted()(draw())])
    without, fused = graphs
    assert [op for op, _ in without] == [op for op, _ in fused]
    assert [t for op, t in without if op != "placeholder"] == [t for op, t in fused if op != "placeholder"]
    assert not calls


def test_offloaded_layers_are_called(calls):
    accelerate = pytest.importorskip("accelerate")
    model, x = adapted().eval(), draw()
    with torch.no_grad():
        expected = model(x)
        dorac.fuse(model)
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        assert torch.equal(model(x), expected)
        assert not calls
    assert "accelerate's hooks" in dorac.fuse(adapted_and_offloaded(accelerate)).left["mlp"]


def adapted_and_offloaded(accelerate):
    model = adapted().eval()
    accelerate.hooks.add_hook_to_module(model.mlp, accelerate.hooks.ModelHook())
    return model


def test_bad_input():
    with pytest.raises(TypeError, match="model must be a module, got int"):
        dorac.fuse(3)
    with pytest.raises(TypeError, match="model must be a module, got str"):
        dorac.unfuse("model")
    with pytest.raises(ValueError, match="Model holds no module with adapted linear layers"):
        dorac.fuse(Model())
    model = adapted(targets=["o_proj"])
    assert dorac.fuse(model).left == {"attention": "less than two of q_proj, k_proj, v_proj are adapted"}
    dorac.unfuse(model)
    fused = adapted()
    dorac.fuse(fused)
    for x in (torch.randn(2, 3, dtype=torch.float64), draw().float()):
        with pytest.raises((TypeError, ValueError), match=r"x must be|x has|dtype"):
            fused(x)
        assert torch.equal(fused(draw()), adapted()(draw()))
