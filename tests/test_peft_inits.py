"""PEFT's starts of an adapter (pissa, olora, orthogonal, corda, lora_ga, eva) in ``apply_dora``."""

import copy
import json
import re

import pytest
import torch
from processes import WORLD
from processes import run as run_processes
from test_apply import TOKENS, Model
from torch import nn

import dorac
from dorac.apply import dora_layers
from dorac.nn import residual

peft = pytest.importorskip("peft")

TARGETS = ["up", "down"]
TAKING = ["pissa", "pissa_niter_60", "olora", "corda", "lora_ga"]
KEEPING = ["orthogonal", "eva"]
R, ALPHA = 4, 6


def make(dtype=torch.float32):
    torch.manual_seed(3)
    model = Model()
    with torch.no_grad():
        model.embed.weight[:, :2] *= 20  # data that EVA finds few directions in
    return model.to(dtype)


def config_for(init, **options):
    extra = {
        "corda": {"corda_config": peft.tuners.lora.config.CordaConfig(corda_method="kpm")},
        "lora_ga": {"lora_ga_config": peft.LoraGAConfig()},
        "eva": {"eva_config": peft.EvaConfig(rho=2.0)},
    }.get(init, {})
    settings = {"use_dora": True, "r": R, "lora_alpha": ALPHA, "target_modules": TARGETS, "init_lora_weights": init}
    return peft.LoraConfig(**settings, **extra, **options)


def run(model):
    for i in range(4):
        model(torch.randint(11, (1, 24), generator=torch.Generator().manual_seed(i)))


def prepare(model, config):
    """What PEFT's own functions do before an adapter is made; the arguments of apply_dora beside the config."""
    from peft.tuners.lora import eva, loraga

    init = config.init_lora_weights
    if init == "corda":
        pytest.importorskip("attr")  # which PEFT's module imports and PEFT does not ask for
        from peft.tuners.lora import corda

        corda.preprocess_corda(model, config, run_model=lambda: run(model))
    elif init == "lora_ga":
        loraga.preprocess_loraga(model, config, lambda: model(TOKENS).square().sum().mul(100).backward())
    elif init == "eva":
        # float32 data: EVA's incremental decomposition needs as many rows as components
        data = [torch.randint(11, (8, 3), generator=torch.Generator().manual_seed(i)) for i in range(4)]
        state = eva.get_eva_state_dict(
            model,
            data,
            config,
            forward_fn=lambda m, x: m(x),
            prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=lambda x, *_: (x[0] if isinstance(x, tuple) else x).flatten(0, 1),
            show_progress_bar=False,
        )
        return {"eva_state_dict": state}
    return {}


def begun(init, dtype=torch.float32, **options):
    model, config = make(dtype), config_for(init, **options)
    beside = prepare(model, config)
    dorac.apply_dora(model, config, **beside)
    return model


def trained(model):
    """Off the start: every adapter's parameters are changed."""
    with torch.no_grad():
        for layer in dora_layers(model).values():
            for name in layer.PEFT_KEYS:
                p = getattr(layer, name)
                p.add_(0.1 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("init", TAKING + KEEPING)
def test_begins_as_the_frozen_model(init):
    frozen, model = make(), begun(init)
    torch.testing.assert_close(model(TOKENS), frozen(TOKENS))
    layers = dora_layers(model)
    assert layers
    for name, layer in layers.items():
        original, now = frozen.get_submodule(name).weight, layer.base_layer.weight
        changed = not torch.equal(now, original)
        assert changed == (init in TAKING) == residual.has_residual(layer)
        assert layer.lora_A.any()
        if changed:
            product = layer.scaling * layer.lora_B @ layer.lora_A
            assert product.norm() > 1e-3 * original.norm()  # a part of the weight, not of its rounding
            torch.testing.assert_close(now + product, original)
            assert not layer.initial_lora_A.requires_grad
        assert not hasattr(layer.base_layer, "eigens")
        assert not hasattr(layer.base_layer, "_peft_loraga_grad")
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("init", TAKING)
def test_factors_are_those_of_pefts_own_model(init, monkeypatch):
    def seeded(*args, svd_lowrank=torch.svd_lowrank, **options):  # else with other draws before it
        torch.manual_seed(7)
        return svd_lowrank(*args, **options)

    monkeypatch.setattr("torch.svd_lowrank", seeded)
    monkeypatch.setattr("peft.tuners.lora.layer.svd_lowrank", seeded)
    stock, config = make(), config_for(init)
    prepare(stock, config)
    stock = peft.get_peft_model(stock, config)
    for name, layer in dora_layers(begun(init)).items():
        theirs = stock.get_submodule(f"base_model.model.{name}")
        torch.testing.assert_close(layer.lora_A, theirs.lora_A["default"].weight)
        torch.testing.assert_close(layer.lora_B, theirs.lora_B["default"].weight)
        torch.testing.assert_close(layer.base_layer.weight, theirs.base_layer.weight)
        torch.testing.assert_close(layer.lora_magnitude_vector, theirs.lora_magnitude_vector["default"].weight)


def test_orthogonal():
    for layer in dora_layers(begun("orthogonal")).values():
        assert layer.lora_A.any(dim=1).all()
        assert layer.lora_B.any(dim=0).all()
        torch.testing.assert_close(layer.lora_B @ layer.lora_A, torch.zeros_like(layer.base_layer.weight))


def test_eva_gives_ranks_and_takes_layers_away(tmp_path):
    model, config = make(), config_for("eva")
    state = prepare(model, config)["eva_state_dict"]
    full = dict(state)
    ranks = {name: w.shape[0] for name, w in state.items()}
    assert len(set(ranks.values())) > 1  # redistributed
    names = dorac.apply_dora(model, config, eva_state_dict=state)
    assert names == [name for name, _ in model.named_modules() if ranks.get(name)]
    for name, layer in dora_layers(model).items():
        assert layer.r == ranks[name]
        assert layer.scaling == pytest.approx(ALPHA / R)  # adjust_scaling_factors
        assert torch.equal(layer.lora_A, state[name].float())
        assert not layer.lora_B.any()
    state["blocks.0.up"] = state["blocks.0.up"][:0]
    del state["blocks.1.down"]
    again = make()
    prefixed = {f"base_model.model.{name}": w for name, w in state.items()}  # as of a PeftModel
    config.eva_config.adjust_scaling_factors = False
    with pytest.warns(RuntimeWarning, match=r"nothing for blocks.1.down: these layers start as") as caught:
        names = dorac.apply_dora(again, config, eva_state_dict=prefixed)
    assert caught[0].filename == __file__
    assert "blocks.0.up" not in names
    assert type(again.blocks[0].up) is nn.Linear
    layer = again.blocks[1].down
    assert (layer.r, layer.scaling) == (R, ALPHA / R)
    for name in set(names) - {"blocks.1.down"}:
        assert again.get_submodule(name).scaling == pytest.approx(ALPHA / ranks[name])

    trained(again)
    dorac.save_adapter(again, tmp_path)
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(loaded(TOKENS), again.eval()(TOKENS))
    with pytest.raises(ValueError, match="gives every module the rank 0"):
        dorac.apply_dora(make(), config, eva_state_dict={name: w[:0] for name, w in full.items()})


@pytest.mark.parametrize("init", TAKING)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_saved_as_an_adapter_of_the_original_weight(init, use_rslora, tmp_path):
    model = trained(begun(init, use_rslora=use_rslora))
    expected = model.eval()(TOKENS)
    dorac.save_adapter(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["r"] == 2 * R
    assert written["init_lora_weights"] is True
    # by dorac, by PEFT, over the original weights
    plain = make()
    dorac.load_adapter(plain, tmp_path)
    torch.testing.assert_close(plain.eval()(TOKENS), expected)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(make(), tmp_path)(TOKENS), expected)
    assert not torch.allclose(expected, make()(TOKENS))


@pytest.mark.parametrize("init", TAKING)
def test_loaded_into_a_model_that_began_so(init, tmp_path):
    """Of the same start bit for bit; of another one, its base weight becomes the residual of the file's."""
    model = trained(begun(init))
    expected = model.eval()(TOKENS)
    dorac.save_adapter(model, tmp_path)
    same = copy.deepcopy(model)
    with torch.no_grad():
        for layer in dora_layers(same).values():
            for name in layer.PEFT_KEYS:
                getattr(layer, name).zero_()
    dorac.load_adapter(same, tmp_path)
    state = model.state_dict()
    assert all(torch.equal(t, state[key]) for key, t in same.state_dict().items())
    other = begun("pissa" if init != "pissa" else "olora")
    dorac.load_adapter(other, tmp_path)
    torch.testing.assert_close(other.eval()(TOKENS), expected)
    for key, t in other.state_dict().items():
        torch.testing.assert_close(t, state[key])
    again = tmp_path / "again"
    dorac.save_adapter(other, again)
    assert (again / "adapter_model.safetensors").read_bytes() == (tmp_path / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("init", ["pissa", "olora", "orthogonal"])
def test_switched_off(init):
    """What was taken out of the base weight is part of the base model; no strength is related to the residual."""
    model, ids = trained(begun(init)).eval(), TOKENS
    before = {key: t.clone() for key, t in model.state_dict().items()}
    y = model(ids)
    with dorac.disabled(model):
        off = model(ids)
    torch.testing.assert_close(off, make().eval()(ids))
    assert not torch.allclose(off, y, atol=1e-3)
    assert torch.equal(model(ids), y)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    if init == "orthogonal":
        torch.testing.assert_close(dorac.base_model(model)(ids), off)
        dorac.set_strength(model, 0)
        torch.testing.assert_close(model(ids), off)
        return
    with pytest.raises(ValueError, match="began as a part of its base weight, which is not there"):
        dorac.base_model(model)
    with pytest.raises(ValueError, match="began as a part of its base weight, which a strength is not related to"):
        dorac.set_strength(model, 0.5)
    dorac.set_strength(model, 1)
    assert torch.equal(model(ids), y)


def test_a_refused_load_leaves_the_residual(tmp_path):
    model = trained(begun("pissa"))
    dorac.save_adapter(trained(begun("olora")), tmp_path)
    from safetensors.torch import load_file, save_file

    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    key = "base_model.model.blocks.1.down.lora_magnitude_vector"
    tensors[key] = tensors[key].double() * 1e300  # finite, but not in the model's dtype
    save_file(tensors, path)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(ValueError, match="not all are finite in"):
        dorac.load_adapter(model, tmp_path)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


def test_an_adapter_of_the_layers_rank_does_not_fit(tmp_path):
    """It is none over the residual."""
    plain = make()
    dorac.apply_dora(plain, TARGETS, R, ALPHA, init_lora_weights=False)
    dorac.save_adapter(plain, tmp_path)
    with pytest.raises(ValueError, match=r"shape of .*up.lora_A.weight: the model has \[8, 8\], the file \[4, 8\]"):
        dorac.load_adapter(begun("pissa"), tmp_path)


def test_state_dicts_are_whole(tmp_path):
    model = trained(begun("pissa"))
    twin = begun("olora")
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(TOKENS), model(TOKENS))
    dorac.save_adapter(twin, tmp_path)
    plain = make()
    dorac.load_adapter(plain, tmp_path)
    torch.testing.assert_close(plain(TOKENS), model(TOKENS))
    drawn = make()
    dorac.apply_dora(drawn, TARGETS, R, ALPHA)
    with pytest.raises(RuntimeError, match="initial_lora_A"):
        drawn.load_state_dict(model.state_dict())


def test_a_base_weight_without_its_residual_is_refused():
    model = trained(begun("pissa"))
    before = {key: t.clone() for key, t in model.state_dict().items()}
    whole = {key: t for key, t in before.items() if "lora_" not in key}
    for module, state, name in (
        (model, whole, "blocks.0.up"),
        (nn.Sequential(model), {f"0.{key}": t for key, t in whole.items()}, "0.blocks.0.up"),
        (model.blocks[0].up, {"base_layer.weight": torch.ones(16, 8)}, "DoraLinear"),
    ):
        with pytest.raises(ValueError, match=f"^{name} began as a part of its base weight, which the state dict holds"):
            module.load_state_dict(state, strict=False)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    model.load_state_dict({"head.weight": before["head.weight"] * 2}, strict=False)  # what is not of these layers


def test_what_is_trained_is_over_the_residual_it_began_with(tmp_path):
    """As a trainer's checkpoint has it; another draw of the start takes out another part."""
    model = trained(begun("pissa_niter_1"))
    dorac.save_adapter(model, tmp_path)
    state = {key: t for key, t in model.state_dict().items() if "lora_" in key}
    same = copy.deepcopy(model)
    with torch.no_grad():
        same.blocks[0].up.lora_A.zero_()
    same.load_state_dict(state, strict=False)
    assert torch.equal(same(TOKENS), model(TOKENS))

    torch.manual_seed(99)
    other = make()
    torch.manual_seed(98)
    dorac.apply_dora(other, config_for("pissa_niter_1"))
    before = {key: t.clone() for key, t in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"^blocks.0.up began as another part of its base weight than the state dict"):
        other.load_state_dict(state, strict=False)
    assert all(torch.equal(t, before[key]) for key, t in other.state_dict().items())
    dorac.load_adapter(other, tmp_path)
    other.load_state_dict(state, strict=False)
    torch.testing.assert_close(other(TOKENS), model(TOKENS))


def test_merge_unmerge_and_copies():
    model = trained(begun("olora"))
    expected, residuals = model(TOKENS), [m.base_layer.weight.clone() for m in dora_layers(model).values()]
    copied = copy.deepcopy(model)
    dorac.merge(model)
    torch.testing.assert_close(model(TOKENS), expected)
    dorac.unmerge(model)
    for layer, weight in zip(dora_layers(model).values(), residuals, strict=True):
        torch.testing.assert_close(layer.base_layer.weight, weight)
    torch.testing.assert_close(model(TOKENS), expected)
    plain = dorac.merge(copied, unload=True)
    assert not dora_layers(plain)
    torch.testing.assert_close(plain(TOKENS), expected)


def test_training_and_counts(capsys):
    model = begun("pissa")
    dorac.print_trainable_parameters(model)
    said = capsys.readouterr().out
    stock = peft.get_peft_model(make(), config_for("pissa"))
    stock.print_trainable_parameters()
    assert said == capsys.readouterr().out
    kept = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD(dorac.parameter_groups(model, 0.1))
    model(TOKENS).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(model.get_parameter(n), t) for n, t in kept.items())
    with pytest.raises(ValueError, match="the adapter began as a part of its base weight"):
        model.blocks[0].up.reset_parameters()


def test_half_precision_weights_and_factors():
    """The rounded factors are what is taken out: the start is off by the weight's rounding alone."""
    for adapter_dtype in (torch.float32, torch.bfloat16):
        model = make(torch.bfloat16)
        dorac.apply_dora(model, TARGETS, R, ALPHA, init_lora_weights="pissa", adapter_dtype=adapter_dtype)
        for name, layer in dora_layers(model).items():
            original = make(torch.bfloat16).get_submodule(name).weight.float()
            start = layer.base_layer.weight.float() + layer.scaling * layer.lora_B.float() @ layer.lora_A.float()
            bound = 2**-8 * layer.base_layer.weight.float().abs() + 1e-6
            assert ((start - original).abs() <= bound).all()


def test_conv1d():
    """GPT-2's, which stores its weight transposed."""
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32, "n_positions": 8}
    for init in ("pissa", "olora", "orthogonal"):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
        ids = torch.arange(6).reshape(2, 3)
        expected = model(ids).logits
        names = dorac.apply_dora(model, ["c_attn", "c_proj"], r=2, init_lora_weights=init)
        assert len(names) == 3
        torch.testing.assert_close(model(ids).logits, expected)


@pytest.mark.parametrize("init", ["orthogonal", "eva"])
def test_quantised_weights(init):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    model = nn.Sequential(bnb.nn.Linear4bit(64, 96, quant_type="nf4", compute_dtype=torch.float32)).to("cpu")
    x = torch.randn(3, 64)
    expected = model(x)
    state = {"0": torch.linalg.qr(torch.randn(64, 4)).Q.T} if init == "eva" else None
    dorac.apply_dora(model, ["0"], r=4, init_lora_weights=init, eva_state_dict=state)
    assert model[0].lora_A.any()
    torch.testing.assert_close(model(x), expected)


def test_quantised_weights_are_not_taken_apart():
    bnb = pytest.importorskip("bitsandbytes")
    model = nn.Sequential(bnb.nn.Linear4bit(64, 96, quant_type="nf4")).to("cpu")
    with pytest.raises(ValueError, match="0: Linear4bit is quantised, and would be quantised anew"):
        dorac.apply_dora(model, ["0"], r=4, init_lora_weights="olora")


def unchanged(model, like):
    assert not dora_layers(model)
    assert all(torch.equal(t, like.state_dict()[key]) for key, t in model.state_dict().items())
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in like.parameters()]


REFUSED = {
    "mica": ({"init_lora_weights": "mica"}, "init_lora_weights='mica' is not supported: PEFT has no DoRA with it"),
    "loftq": ({"init_lora_weights": "loftq", "original_weights": {}}, "blocks.0.up: Linear is not quantised: quantise"),
    "weights": ({"original_weights": {}}, "original_weights is for init_lora_weights='loftq', got True"),
    "unknown": ({"init_lora_weights": "pisa"}, "must be True, False, 'gaussian', 'loftq' or, where PEFT .* got 'pisa'"),
    "iterations": ({"init_lora_weights": "pissa_niter_x"}, "or 'lora_ga', got 'pissa_niter_x'"),
    "embedding": ({"init_lora_weights": "pissa", "target_modules": ["embed", "up"]}, "embed: Embedding is no linear"),
    "odd rank": ({"init_lora_weights": "orthogonal", "r": 3}, "blocks.0.up: Orthogonal initialization requires"),
    "rank": ({"init_lora_weights": "pissa", "r": 9}, r"blocks.0.up: lora_A of this start has the shape \[8, 8\]"),
    "scaling": ({"init_lora_weights": "pissa", "lora_alpha": -1}, "blocks.0.up: lora_A of this start is not finite"),
    "corda": ({"init_lora_weights": "corda"}, "blocks.0.up: it was not prepared: call peft's preprocess_corda"),
    "lora_ga": ({"init_lora_weights": "lora_ga"}, "'lora_ga' needs a LoraConfig with lora_ga_config"),
    "eva state": ({"eva_state_dict": {}}, "eva_state_dict is for init_lora_weights='eva', got True"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
    options, message = REFUSED[case]
    model = make()
    with pytest.raises(ValueError, match=message):
        dorac.apply_dora(model, **{"target_modules": TARGETS, "r": 2, **options})
    unchanged(model, make())


def test_more_that_is_refused():
    model = make()
    with pytest.raises(TypeError, match=r"'eva' needs eva_state_dict, what peft.get_eva_state_dict"):
        dorac.apply_dora(model, TARGETS, init_lora_weights="eva")
    with pytest.raises(ValueError, match=r"blocks.0.up: lora_A of this start has the shape \[2, 3\]"):
        dorac.apply_dora(model, TARGETS, init_lora_weights="eva", eva_state_dict={"blocks.0.up": torch.ones(2, 3)})
    with pytest.raises(ValueError, match=r"blocks.0.up: it was not prepared: call peft's preprocess_loraga"):
        dorac.apply_dora(model, config_for("lora_ga"))
    unchanged(model, make())
    with pytest.raises(TypeError, match=r"blocks.0.up: Please initialize PiSSA under float32"):
        dorac.apply_dora(make(torch.float64), TARGETS, init_lora_weights="pissa")
    with pytest.raises(ValueError, match=r"blocks.0.up: its weight is on meta: load the weights first"):
        dorac.apply_dora(make().to("meta"), TARGETS, init_lora_weights="pissa")


def test_a_failure_in_the_middle_changes_nothing():
    """The second layer cannot start so: the first has its weight and PEFT's data back."""
    config = config_for("corda")
    model, like = make(), make()
    prepare(model, config)
    prepare(like, config)
    eigens = model.blocks[1].down.eigens
    eigens.S_WC[0] = torch.nan
    with pytest.raises(ValueError, match=r"blocks.1.down: Invalid value found in matrix S"):
        dorac.apply_dora(model, config)
    unchanged(model, like)
    for name in ("blocks.0.up", "blocks.0.down"):
        assert torch.equal(model.get_submodule(name).eigens.S_WC, like.get_submodule(name).eigens.S_WC)


def test_tied_weights_are_refused():
    model = make()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    like = copy.deepcopy(model)
    message = re.escape(
        "blocks.0.up.base_layer.weight is tied to blocks.1.up.base_layer.weight: init_lora_weights='pissa'"
    )
    with pytest.raises(ValueError, match=message):
        dorac.apply_dora(model, ["up"], r=2, init_lora_weights="pissa")
    unchanged(model, like)


def test_one_module_in_two_places_starts_once():
    model = make()
    model.blocks[1] = model.blocks[0]
    expected = model(TOKENS)
    dorac.apply_dora(model, TARGETS, r=2, init_lora_weights="pissa")
    torch.testing.assert_close(model(TOKENS), expected)


def test_without_peft(monkeypatch):
    from importlib.metadata import PackageNotFoundError

    def missing(name):
        raise PackageNotFoundError

    monkeypatch.setattr("importlib.metadata.version", missing)
    model = make()
    with pytest.raises(ImportError, match="needs PEFT"):
        dorac.apply_dora(model, TARGETS, init_lora_weights="pissa")
    unchanged(model, make())


def test_compiles_and_caches_norms():
    model = trained(begun("pissa"))
    expected = model(TOKENS)
    dorac.cache_norms(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(TOKENS), expected)


def gathered_by_a_trainer(model, folder, expected):
    """One rank saves what all have gathered; of what is trained alone it lacks what the adapter began as."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if torch.distributed.get_rank() == 0:
        dorac.save_adapter(model, f"{folder}/gathered", state_dict=state)
        with open(f"{folder}/gathered/adapter_model.safetensors", "rb") as file:
            assert file.read() == expected
        alone = {key: t for key, t in state.items() if "initial" not in key}
        with pytest.raises(
            ValueError, match=r"does not hold blocks.0.up.initial_lora_A whole: gather it from the whole"
        ):
            dorac.save_adapter(model, f"{folder}/alone", state_dict=alone)
    torch.distributed.barrier()


def sharded(folder):
    """Under FSDP2 and tensor parallelism the same file is written, and taken back."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh
    from torch.distributed.tensor.parallel import parallelize_module

    from dorac.parallel import ColwiseParallel, RowwiseParallel

    mesh = init_device_mesh("cpu", (WORLD,))
    plan = {
        f"blocks.{i}.{name}": style
        for i in (0, 1)
        for name, style in (("up", ColwiseParallel), ("down", RowwiseParallel))
    }
    torch.manual_seed(0)
    single = trained(begun("pissa"))
    expected = single(TOKENS)
    files = {}
    for kind in ("single", "fsdp", "tp"):
        model = copy.deepcopy(single)
        if kind == "fsdp":
            fully_shard(model, mesh=mesh)
        elif kind == "tp":
            parallelize_module(model, mesh, {name: style() for name, style in plan.items()})
        torch.testing.assert_close(model(TOKENS), expected)
        dorac.save_adapter(model, f"{folder}/{kind}")
        torch.distributed.barrier()
        with open(f"{folder}/{kind}/adapter_model.safetensors", "rb") as file:
            files[kind] = file.read()
        assert files[kind] == files["single"], kind
        if kind == "fsdp":
            gathered_by_a_trainer(model, folder, files["single"])
        if torch.distributed.get_rank() == 0 and kind == "single":
            dorac.save_adapter(trained(begun("olora")), f"{folder}/other")
        torch.distributed.barrier()
        dorac.load_adapter(model, f"{folder}/other")  # another start: the base weight changes
        other = make()
        dorac.load_adapter(other, f"{folder}/other")
        torch.testing.assert_close(model(TOKENS), other(TOKENS))

    from test_unconverted import saved_by_peft

    if torch.distributed.get_rank() == 0:
        saved_by_peft("pissa", f"{folder}/unconverted")
    torch.distributed.barrier()
    model = make()
    dorac.apply_dora(model, TARGETS, R, ALPHA)
    fully_shard(model, mesh=mesh)
    with pytest.raises(ValueError, match=r"blocks.0.up: its weight is sharded: do this before the model is sharded"):
        dorac.load_adapter(model, f"{folder}/unconverted")


@pytest.mark.full
def test_sharded(tmp_path):
    run_processes(sharded, tmp_path, "cpu", str(tmp_path))
