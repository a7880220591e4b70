"""Several named adapters of one model (``add_adapter``, ``set_adapter``, ``delete_adapter``, files by name)."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from injected import everything, raised_at_every_line
from test_switching import LAYERS
from torch import nn

import dorac
from dorac.apply import dora_layers

NAMES = ("a", "b", "c")
RANKS = {"a": (2, 3.0), "a2": (2, 3.0), "b": (2, 8.0), "c": (5, 5.0)}  # b has another scaling, c another rank, too


def off_init(model: nn.Module, seed: int) -> None:
    """The active adapter: factors drawn anew, magnitudes up to a fifth off."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in dict.fromkeys(dora_layers(model).values()):
            for name, p in layer.named_parameters(recurse=False):
                if "magnitude" in name:
                    p.mul_(0.8 + 0.4 * torch.rand(p.shape, generator=generator))
                else:
                    p.copy_(0.3 * torch.randn(p.shape, generator=generator))


def files(base: nn.Module, targets: list[str], directory, names=NAMES, **options) -> dict[str, nn.Module]:
    """A model for each adapter, which holds it alone and has saved it."""
    models = {}
    for seed, name in enumerate(names):
        r, lora_alpha = RANKS[name]
        if any(getattr(base.get_submodule(target), "groups", 1) == 2 for target in targets):
            r = 2 * (r // 2)
        models[name] = model = copy.deepcopy(base)
        dorac.apply_dora(model, targets, r=r, lora_alpha=lora_alpha, **options)
        off_init(model, seed)
        dorac.save_adapter(model, directory / name)
    return models


def gathered(base: nn.Module, directory, names=NAMES) -> nn.Module:
    """A model with all of them; the first is active."""
    model = copy.deepcopy(base)
    for name in names:
        dorac.load_adapter(model, directory / name, adapter_name=name)
    assert dorac.adapters(model) == list(names)
    assert dorac.active_adapter(model) == names[0]
    return model


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 12), nn.GELU(), nn.Linear(12, 7, bias=False))


def experts():
    pytest.importorskip("transformers")
    from test_experts_module import arguments, stock

    return stock("mixtral", torch.float32), arguments("mixtral", dtype=torch.float32)


def case(kind: str):
    torch.manual_seed(1)
    if kind == "experts":
        layer, args = experts()
    else:
        make, draw = LAYERS[kind]
        layer, args = make(), (draw(),)
    return nn.ModuleDict({"target": layer}), args


KINDS = [*LAYERS, "experts"]
SAMPLE = ("linear", "embedding", "conv2d", "nf4")
SOME = [kind if kind in SAMPLE else pytest.param(kind, marks=pytest.mark.full) for kind in KINDS]
ORDER = ("b", "c", "a", "b", "a", "c")


@pytest.mark.parametrize("kind", SOME)
@pytest.mark.parametrize("cached", [False, True], ids=["", "cached"])
def test_each_is_the_model_that_holds_it_alone(kind, cached, tmp_path):
    """Outputs and gradients bit for bit, in any order; so is the base model."""
    base, args = case(kind)
    alone = files(base, ["target"], tmp_path)
    model = gathered(base, tmp_path)
    if cached:
        dorac.cache_norms(model)
    for name in ORDER:
        dorac.set_adapter(model, name)
        assert dorac.active_adapter(model) == name
        ours, theirs = model["target"], alone[name]["target"]
        assert (ours.r, ours.scaling) == (theirs.r, theirs.scaling)
        assert model.state_dict().keys() == alone[name].state_dict().keys()
        model.zero_grad()
        theirs.zero_grad()
        y, expected = ours(*args), theirs(*args)
        assert torch.equal(y, expected)
        y.square().sum().backward()
        expected.square().sum().backward()
        for (key, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert p.requires_grad == q.requires_grad, key
            assert p.grad is q.grad is None or torch.equal(p.grad, q.grad), key
        with dorac.disabled(model):
            assert torch.equal(ours(*args), base["target"](*args))


def test_norms_are_kept_for_each(tmp_path):
    """A switch back takes no norm; a write to the adapter on the shelf, or to the base, is seen."""
    base = net()
    files(base, ["0", "2"], tmp_path)
    model, x = gathered(base, tmp_path), torch.randn(3, 10)
    cache = dorac.cache_norms(model)
    norms = {}
    for name in NAMES:
        dorac.set_adapter(model, name)
        model(x)
        norms[name] = [(layer.kept.norm, layer.kept.norm._version) for layer in (model[0], model[2])]
    for name in ORDER:
        dorac.set_adapter(model, name)
        cache.check()
        model(x)
        for layer, (norm, version) in zip((model[0], model[2]), norms[name], strict=True):
            assert layer.kept.norm is norm
            assert norm._version == version
    dorac.set_adapter(model, "a")
    held = model[0].lora_B
    dorac.set_adapter(model, "b")
    with torch.no_grad():
        held.mul_(2)
    dorac.set_adapter(model, "a")
    cache.check()
    assert torch.equal(model(x), copy.deepcopy(model)(x))  # a copy takes its own norms
    dorac.set_adapter(model, "b")
    with torch.no_grad():
        model[0].base_layer.weight.mul_(1.5)
    model(x)
    for name in ("a", "c", "b"):
        dorac.set_adapter(model, name)
        cache.check()
    dorac.set_adapter(model, "a")
    held.data.mul_(2)  # leaves no trace, but comes with eval()
    model.eval()
    dorac.set_adapter(model, "b")
    dorac.set_adapter(model, "a")
    cache.check()
    cache.remove()
    dorac.set_adapter(model, "b")
    assert model[0].kept is None


def test_a_write_through_data_while_on_the_shelf(tmp_path):
    base = net()
    files(base, ["0", "2"], tmp_path)
    model = gathered(base, tmp_path)
    cache = dorac.cache_norms(model)
    held = model[0].lora_B
    dorac.set_adapter(model, "b")
    held.data.mul_(2)
    model.eval()
    dorac.set_adapter(model, "a")
    cache.check()


@pytest.mark.parametrize(
    "cached", [pytest.param(False, marks=pytest.mark.full, id=""), pytest.param(True, id="cached")]
)
def test_compiled_code_runs_on(cached, tmp_path):
    """Same rank and scaling: nothing. A second scaling and another rank: once each."""
    base = net()
    names = ("a", "a2", "b", "c")
    alone = files(base, ["0", "2"], tmp_path, names)
    model, x = gathered(base, tmp_path, names), torch.randn(3, 10)
    if cached:
        dorac.cache_norms(model)
    run = torch.compile(model, fullgraph=True, backend="aot_eager")

    def check(name):
        dorac.set_adapter(run, name)
        model.zero_grad()
        y = run(x)
        y.sum().backward()
        expected = alone[name](x)
        torch.testing.assert_close(y, expected)
        (d,) = torch.autograd.grad(expected.sum(), alone[name][0].lora_A)
        torch.testing.assert_close(model[0].lora_A.grad, d)

    check("a")
    with torch.compiler.set_stance("fail_on_recompile"):
        check("a2")
        check("a")
    check("b")
    check("c")
    with torch.compiler.set_stance("fail_on_recompile"):
        for name in ("a", "c", "b", "a2", "c", "a"):
            check(name)


def test_each_is_trained_by_its_own_optimizer(tmp_path):
    """Interleaved steps of two adapters are those of two models, moments included; both optimizers hold on."""
    base = net()
    alone = files(base, ["0", "2"], tmp_path, ("a", "c"))
    model = gathered(base, tmp_path, ("a", "c"))
    dorac.cache_norms(model)
    optimizers = {}
    for name in ("a", "c"):
        dorac.set_adapter(model, name)
        pair = model, alone[name]
        optimizers[name] = [torch.optim.AdamW(dorac.parameter_groups(m, lr=0.01), weight_decay=0.1) for m in pair]
    for step, name in enumerate("acaacca"):
        dorac.set_adapter(model, name)
        x = torch.randn(4, 10, generator=torch.Generator().manual_seed(step))
        for m, optimizer in zip((model, alone[name]), optimizers[name], strict=True):
            optimizer.zero_grad()
            m(x).square().mean().backward()
            optimizer.step()
    for name in ("a", "c"):
        dorac.set_adapter(model, name)
        assert torch.equal(model(x), alone[name](x))
        for p, q in zip(dorac_parameters(model), dorac_parameters(alone[name]), strict=True):
            assert torch.equal(p, q)


def dorac_parameters(model):
    return [p for p in model.parameters() if p.requires_grad]


def test_what_is_not_active_is_nowhere():
    model = net()
    dorac.apply_dora(model, ["0", "2"], r=2)
    before = {key: t.shape for key, t in model.state_dict().items()}, len(list(model.parameters()))
    modules = list(model.modules())
    dorac.add_adapter(model, "b", r=4)
    assert ({key: t.shape for key, t in model.state_dict().items()}, len(list(model.parameters()))) == before
    assert list(model.modules()) == modules
    assert sum(len(group["params"]) for group in dorac.parameter_groups(model, 0.1)) == 6


def test_a_graph_that_is_alive_keeps_its_adapter(tmp_path):
    base = net()
    alone = files(base, ["0", "2"], tmp_path)
    model, x = gathered(base, tmp_path), torch.randn(3, 10)
    dorac.cache_norms(model)
    losses = {}
    for name in ("a", "b"):
        dorac.set_adapter(model, name)
        losses[name] = model(x).square().sum()
    dorac.set_adapter(model, "c")
    for name in ("a", "b"):
        losses[name].backward()
    for name in ("a", "b"):
        dorac.set_adapter(model, name)
        alone[name](x).square().sum().backward()
        assert torch.equal(model[0].lora_B.grad, alone[name][0].lora_B.grad)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
}


@pytest.mark.parametrize("way", COPIES)
def test_copies_hold_all(way, tmp_path):
    base = net()
    alone = files(base, ["0", "2"], tmp_path)
    model, x = gathered(base, tmp_path), torch.randn(3, 10)
    dorac.cache_norms(model)
    for name in ("b", "a"):
        dorac.set_adapter(model, name)
        model(x)
    other = COPIES[way](model)
    off_init(model, 9)
    for name in NAMES:
        dorac.set_adapter(other, name)
        assert torch.equal(other(x), alone[name](x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_casts_reach_all(dtype, tmp_path):
    base = net()
    alone = files(base, ["0", "2"], tmp_path)
    model, x = gathered(base, tmp_path), torch.randn(3, 10).to(dtype)
    model.to(dtype)
    for name in ("b", "c", "a"):
        dorac.set_adapter(model, name)
        alone[name].to(dtype)
        assert torch.equal(model(x), alone[name](x))
        for (key, p), q in zip(model.named_parameters(), alone[name].parameters(), strict=True):
            assert p.dtype == q.dtype == (torch.float32 if dtype.itemsize < 4 and "magnitude" in key else dtype)


def test_an_adapter_on_the_shelf_goes_to_meta_and_comes_without_values(tmp_path):
    base = net()
    files(base, ["0", "2"], tmp_path)
    model = gathered(base, tmp_path).to("meta")
    shelved = model[0].adapters["b"]
    assert all(p.is_meta for p in shelved.parameters())
    model.to_empty(device="cpu")
    assert all(p.isnan().all() for p in shelved.parameters())


class Tagger(nn.Module):
    """With modules that are trained whole: one with buffers, and two that share a weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(10, 12)
        self.norm = nn.BatchNorm1d(12)
        self.heads = nn.ModuleList([nn.Linear(12, 5), nn.Linear(12, 5)])
        self.heads[1].weight = self.heads[0].weight

    def forward(self, x):
        h = self.norm(self.body(x))
        return sum(head(h) for head in self.heads)


def test_modules_to_save_are_exchanged_too(tmp_path):
    base, x = Tagger(), torch.randn(4, 10)
    model = copy.deepcopy(base)
    dorac.apply_dora(model, ["body"], r=2, init_lora_weights=False, modules_to_save=["norm", "heads"])
    dorac.add_adapter(model, "b", r=3, init_lora_weights=False)
    outputs = {}
    for step, name in enumerate(("default", "b", "default")):
        dorac.set_adapter(model, name)
        assert model.heads[1].weight is model.heads[0].weight
        optimizer = torch.optim.SGD(dorac_parameters(model), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            model.train()(x + step).square().mean().backward()
            optimizer.step()
        outputs[name] = model.eval()(x)
        assert int(model.norm.num_batches_tracked) == {0: 2, 1: 2, 2: 4}[step]
    assert not torch.allclose(outputs["default"], outputs["b"], atol=1e-3)
    dorac.save_adapter(model, tmp_path / "b", adapter_name="b")
    dorac.save_adapter(model, tmp_path / "default")
    dorac.load_adapter(model, tmp_path / "b", adapter_name="again")
    model.double()
    for name, of in (("again", "b"), ("b", "b"), ("default", "default")):
        dorac.set_adapter(model, name)
        assert {p.dtype for p in model.parameters()} == {torch.float64}
        torch.testing.assert_close(model(x.double()).float(), outputs[of])
    fresh = copy.deepcopy(base).eval()
    dorac.load_adapter(fresh, tmp_path / "b")
    assert torch.equal(fresh(x), outputs["b"])
    dorac.delete_adapter(model, "again")
    dorac.set_adapter(model, "b")
    plain = dorac.base_model(model)
    assert not any("dora" in name for m in plain.modules() for name in vars(m))
    plain = dorac.merge(model, unload=True)
    assert not any("dora" in name for m in plain.modules() for name in vars(m))


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
def test_a_new_adapter_begins_as_the_base(kind):
    """Its magnitude is the norm of the base weight that is there when it is first active, bit for bit."""
    base, args = case(kind)
    model = copy.deepcopy(base)
    dorac.apply_dora(model, ["target"], r=2, init_lora_weights=False)
    dorac.add_adapter(model, "b", r=4, lora_dropout=0.1, use_rslora=True)
    y = model["target"](*args)
    with torch.no_grad():
        model["target"].base_layer.weight.mul_(1.25)
        base["target"].weight.mul_(1.25)
    dorac.set_adapter(model, "b")
    layer = model["target"].eval()
    assert (layer.r, layer.scaling, layer.lora_dropout, layer.use_rslora) == (4, 4.0, 0.1, True)
    assert layer.scaling == 8 / 4**0.5
    torch.testing.assert_close(layer(*args), base["target"](*args))
    assert torch.equal(layer.lora_magnitude_vector.flatten(), layer._norm().flatten())
    with torch.no_grad():
        layer.lora_magnitude_vector.mul_(2)
        base["target"].weight.mul_(0.8)
        layer.base_layer.weight.mul_(0.8)
    dorac.set_adapter(model, "default")
    torch.testing.assert_close(layer(*args), y)
    dorac.set_adapter(model, "b")
    assert not torch.allclose(layer.lora_magnitude_vector.flatten(), layer._norm().flatten(), rtol=0.1)


def test_patterns_of_a_new_adapter():
    model = net()
    dorac.apply_dora(model, ["0", "2"], r=2)
    with pytest.warns(RuntimeWarning, match="match no adapted module: \\['9'\\]"):
        dorac.add_adapter(model, "b", r=4, rank_pattern={"2": 6, "9": 1}, alpha_pattern={"^2": 3})
    dorac.set_adapter(model, "b")
    assert [(layer.r, layer.scaling) for layer in (model[0], model[2])] == [(4, 2.0), (6, 0.5)]


def test_merging_is_of_the_active_one(tmp_path):
    base = net()
    alone = files(base, ["0", "2"], tmp_path)
    model, x = gathered(base, tmp_path), torch.randn(3, 10)
    dorac.cache_norms(model)
    dorac.set_adapter(model, "b")
    dorac.merge(model)
    torch.testing.assert_close(model(x), alone["b"](x))
    for call in (
        lambda: dorac.set_adapter(model, "a"),
        lambda: dorac.add_adapter(model, "d"),
        lambda: dorac.load_adapter(model, tmp_path / "a", adapter_name="d"),
    ):
        with pytest.raises(ValueError, match=r"^0: its adapter is merged: call dorac\.unmerge first"):
            call()
    dorac.set_adapter(model, "b")  # it is
    dorac.save_adapter(model, tmp_path / "saved", adapter_name="c")
    assert (tmp_path / "saved/adapter_model.safetensors").read_bytes() == (
        tmp_path / "c/adapter_model.safetensors"
    ).read_bytes()
    torch.testing.assert_close(model(x), alone["b"](x))
    dorac.delete_adapter(model, "a")
    dorac.unmerge(model)
    dorac.set_adapter(model, "c")
    torch.testing.assert_close(model(x), alone["c"](x))
    plain = dorac.merge(model, unload=True)
    assert type(plain[0]) is nn.Linear
    torch.testing.assert_close(plain(x), alone["c"](x))


def test_strength_is_an_adapters_own(tmp_path):
    base = net()
    alone = files(base, ["0", "2"], tmp_path)
    model, x = gathered(base, tmp_path), torch.randn(3, 10)
    dorac.set_strength(model, 0.5)
    dorac.set_adapter(model, "b")
    assert torch.equal(model(x), alone["b"](x))
    dorac.set_strength(model, 0)
    assert torch.equal(model(x), base(x))
    dorac.set_adapter(model, "a")
    dorac.set_strength(alone["a"], 0.5)
    assert torch.equal(model(x), alone["a"](x))
    dorac.set_adapter(model, "b")
    assert torch.equal(model(x), base(x))


def test_switched_off_is_not_switched(tmp_path):
    base = net()
    files(base, ["0", "2"], tmp_path)
    model, x = gathered(base, tmp_path), torch.randn(3, 10)
    y = model(x)
    with dorac.disabled(model):
        with pytest.raises(ValueError, match=r"^0: its adapter is switched off: leave dorac\.disabled first"):
            dorac.set_adapter(model, "b")
        assert torch.equal(model(x), base(x))
    assert torch.equal(model(x), y)


def test_deleted_is_freed(tmp_path):
    base = net()
    alone = files(base, ["0", "2"], tmp_path)
    model, x = gathered(base, tmp_path), torch.randn(3, 10)
    dorac.cache_norms(model)
    dorac.set_adapter(model, "b")
    tensors = [weakref.ref(t) for t in (model[0].lora_A, model[2].kept.norm)]
    dorac.set_adapter(model, "c")
    dorac.delete_adapter(model, "b")
    gc.collect()
    assert [t() for t in tensors] == [None, None]
    assert dorac.adapters(model) == ["a", "c"]
    assert torch.equal(model(x), alone["c"](x))
    dorac.load_adapter(model, tmp_path / "b", adapter_name="b")
    dorac.set_adapter(model, "b")
    assert torch.equal(model(x), alone["b"](x))


def test_a_layer_in_two_places(tmp_path):
    torch.manual_seed(0)
    layer = nn.Linear(8, 8)
    base, x = nn.Sequential(layer, nn.GELU(), layer), torch.randn(3, 8)
    alone = files(base, ["0", "2"], tmp_path, ("a", "c"))
    model = gathered(base, tmp_path, ("a", "c"))
    for name in "caac":
        dorac.set_adapter(model, name)
        assert torch.equal(model(x), alone[name](x))


def refused(model, call, message, x):
    y, names, state = model(x), dorac.adapters(model), copy.deepcopy(model.state_dict())
    held = {id(p) for p in model.parameters()}
    with pytest.raises((TypeError, ValueError, FileNotFoundError), match=message):
        call()
    assert dorac.adapters(model) == names
    assert {id(p) for p in model.parameters()} == held
    assert all(torch.equal(t, state[key]) for key, t in model.state_dict().items())
    assert torch.equal(model(x), y)


def test_bad_input(tmp_path):
    base = net()
    files(base, ["0", "2"], tmp_path)
    files(base, ["0"], tmp_path / "less", ("a",))
    model, x = gathered(base, tmp_path), torch.randn(3, 10)
    dorac.cache_norms(model)

    def load(directory):
        return lambda: dorac.load_adapter(model, directory, adapter_name="d")

    for call, message in (
        (lambda: dorac.set_adapter(model, "d"), r"^no adapter 'd' is loaded, only 'a' \(active\), 'b', 'c'$"),
        (lambda: dorac.set_adapter(model, ["b"]), r"^adapter_name must be the name of one adapter, got \['b'\]$"),
        (lambda: dorac.delete_adapter(model, "d"), "^no adapter 'd' is loaded"),
        (lambda: dorac.delete_adapter(model, None), "^adapter_name must be the name of one adapter, got None$"),
        (lambda: dorac.save_adapter(model, tmp_path, adapter_name="d"), "^no adapter 'd' is loaded"),
        (
            lambda: dorac.delete_adapter(model, "a"),
            r"^adapter 'a' is active: make another one active first \(dorac\.set_adapter\(model, 'b'\)\)",
        ),
        (lambda: dorac.add_adapter(model, "b"), "^adapter 'b' is loaded already .* choose another name, or call"),
        (lambda: dorac.load_adapter(model, tmp_path / "c", adapter_name="a"), "^adapter 'a' is loaded already"),
        (lambda: dorac.add_adapter(model, ""), "^adapter_name must not be empty"),
        (lambda: dorac.add_adapter(model, 3), "^adapter_name must be a string, got int"),
        (lambda: dorac.add_adapter(model, "d", r=0), "^r must be at least 1, got 0"),
        (lambda: dorac.add_adapter(model, "d", lora_dropout=1.5), "^lora_dropout must be"),
        (lambda: dorac.add_adapter(model, "d", dropout_on="x"), "^dropout_on must be"),
        (lambda: dorac.add_adapter(model, "d", init_lora_weights="pissa"), "^init_lora_weights must be True, False or"),
        (load(tmp_path / "less/a"), r"does not fit the model:\n  missing: base_model\.model\.2\.lora_A\.weight"),
        (load(tmp_path / "none"), "none"),
        (
            lambda: dorac.save_adapter(model, tmp_path / "x", adapter_name="b", state_dict=model.state_dict()),
            "^a state dict holds the active adapter, not 'b': make that one active first",
        ),
        (lambda: dorac.apply_dora(model, ["1"]), "1: GELU is not supported"),
    ):
        refused(model, call, message, x)


def test_an_adapter_of_a_model_that_has_more_layers(tmp_path):
    base = net()
    files(base, ["0", "2"], tmp_path, ("a", "b"))
    part = nn.Sequential(nn.Linear(10, 12), nn.GELU(), nn.Linear(12, 7))
    dorac.apply_dora(part, ["0"], r=2)
    refused(
        part,
        lambda: dorac.load_adapter(part, tmp_path / "b", adapter_name="b"),
        r"unexpected: base_model\.model\.2\.lora_A\.weight",
        torch.randn(3, 10),
    )
    dorac.add_adapter(part, "b")
    refused(
        part,
        lambda: dorac.apply_dora(part, ["2"]),
        "^0 holds the adapters default, b, and layers that are adapted",
        torch.randn(3, 10),
    )
    dorac.delete_adapter(part, "b")
    dorac.apply_dora(part, ["2"])


def test_parts_that_were_adapted_apart():
    parts = [nn.Sequential(nn.Linear(6, 6)) for _ in range(2)]
    for part in parts:
        dorac.apply_dora(part, ["0"], r=2)
    both = nn.Sequential(*parts)
    assert dorac.adapters(both) == ["default"]
    dorac.add_adapter(parts[0], "b")
    with pytest.raises(
        ValueError, match=r"^1\.0 holds the adapters 'default' \(active\), 0\.0 'default' \(active\), 'b': give"
    ):
        dorac.set_adapter(both, "b")
    dorac.set_adapter(parts[0], "b")
    assert dorac.active_adapter(parts[1]) == "default"


def test_no_adapter_and_peft():
    with pytest.raises(ValueError, match="holds no DoRA layer"):
        dorac.set_adapter(nn.Linear(2, 2), "b")
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(net(), peft.LoraConfig(use_dora=True, target_modules=["0"]))
    with pytest.raises(ValueError, match=r"is adapted by PEFT: call .* or set_adapter of the PEFT model"):
        dorac.set_adapter(model, "b")


def test_starts_that_take_a_part_out_of_the_weight():
    pytest.importorskip("peft")
    model = net()
    dorac.apply_dora(model, ["0"], r=2, init_lora_weights="pissa")
    message = "^0: its adapter began as a part of the base weight, which several adapters would share: save it"
    refused(model, lambda: dorac.add_adapter(model, "b"), message, torch.randn(3, 10))


def test_ddp_and_parametrised(tmp_path):
    model = net()
    dorac.apply_dora(model, ["0"], r=2)
    dorac.add_adapter(model, "b")
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = model
    with pytest.raises(ValueError, match=r"^model is in DistributedDataParallel, .* switch the model first"):
        dorac.set_adapter(wrapper, "b")
    torch.nn.utils.parametrizations.weight_norm(model[0], "lora_A")
    with pytest.raises(ValueError, match=r"^0: its adapter is in parts, or computed"):
        dorac.set_adapter(model, "b")


def test_meta():
    with torch.device("meta"):
        model = net()
    dorac.apply_dora(model, ["0", "2"], r=2)
    with pytest.raises(ValueError, match=r"^0: it was made on meta and its adapter has no values yet"):
        dorac.add_adapter(model, "b")


def test_embeddings_that_bring_their_base_weight(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=32
    )
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(config).eval()
    peft = pytest.importorskip("peft")
    for name, moved in (("same", 0.0), ("other", 0.5)):
        model = copy.deepcopy(base)
        with torch.no_grad():
            model.get_input_embeddings().weight.add_(moved)
        model = peft.get_peft_model(
            model, peft.LoraConfig(use_dora=True, r=2, target_modules=["embed_tokens"], init_lora_weights=False)
        )
        model.save_pretrained(tmp_path / name, save_embedding_layers=True)
    model, tokens = copy.deepcopy(base), torch.arange(6)[None]
    dorac.apply_dora(model, ["embed_tokens"], r=4)
    dorac.load_adapter(model, tmp_path / "same", adapter_name="b")
    before = model(tokens).logits
    for options in ({"adapter_name": "c"}, {}):
        dorac.set_adapter(model, "default" if options else "b")
        with pytest.raises(ValueError, match="not those of the model's base weight, which its other adapters rest on"):
            dorac.load_adapter(model, tmp_path / "other", **options)
    dorac.set_adapter(model, "default")
    assert torch.equal(model(tokens).logits, before)
    dorac.set_adapter(model, "b")
    alone = copy.deepcopy(base)
    dorac.load_adapter(alone, tmp_path / "same")
    assert torch.equal(model(tokens).logits, alone(tokens).logits)


def test_files_go_to_peft_and_back(tmp_path):
    """Two adapters of dorac's in one model of PEFT's."""
    peft = pytest.importorskip("peft")
    import dorac.peft

    base = net()
    alone, x = files(base, ["0", "2"], tmp_path, ("a", "c")), torch.randn(3, 10)
    model = gathered(base, tmp_path, ("a", "c"))
    for name in ("a", "c"):
        dorac.save_adapter(model, tmp_path / "again" / name, adapter_name=name)
    with dorac.peft.enable():
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "again/a", adapter_name="a").eval()
        theirs.load_adapter(tmp_path / "again/c", adapter_name="c")
    for name in ("c", "a"):
        theirs.set_adapter(name)
        torch.testing.assert_close(theirs(x), alone[name](x))


FILES = ("dorac/named.py", "dorac/nn/shelf.py", "dorac/nn/norm_cache.py", "dorac/nn/moments.py", "dorac/checkpoint/")


@pytest.mark.parametrize("step", [11, pytest.param(1, marks=pytest.mark.full)])
@pytest.mark.parametrize("call", ["set", "add", "load", "delete", "save"])
def test_raised_at_any_line(call, step, tmp_path):
    """All or nothing, norms included; a saved adapter leaves no trace at all."""
    base = Tagger().eval()
    alone, x = files(base, ["body"], tmp_path, modules_to_save=["norm", "heads"]), torch.randn(3, 10)
    model = gathered(base, tmp_path)
    cache = dorac.cache_norms(model)
    for name in ("b", "a"):
        dorac.set_adapter(model, name)
        model(x)
    calls = {
        "set": lambda: dorac.set_adapter(model, "b"),
        "add": lambda: dorac.add_adapter(model, "d", r=3, rank_pattern={"body": 2}),
        "load": lambda: dorac.load_adapter(model, tmp_path / "c", adapter_name="d"),
        "delete": lambda: dorac.delete_adapter(model, "b"),
        "save": lambda: dorac.save_adapter(model, tmp_path / "saved", adapter_name="b"),
    }
    shelved = {name: copy.deepcopy(model.body.adapters[name].state_dict()) for name in ("b", "c")}
    before = everything(model)
    for n in raised_at_every_line(calls[call], FILES, step=step):
        assert everything(model) == before, n
        cache.check()
        for name, state in shelved.items():
            now = model.body.adapters[name].state_dict()
            assert all(torch.equal(now[key], t) for key, t in state.items())
    if call == "save":
        assert everything(model) == before
    assert torch.equal(model(x), alone["b" if call == "set" else "a"](x))
