"""``print_trainable_parameters`` and ``parameter_groups``."""

import contextlib
import copy
import io

import pytest
import torch
from processes import WORLD, run
from test_apply import TOKENS, Model
from torch import nn

import dorac
from dorac.nn import DoraLayer

TARGETS = ["embed", "up", "down"]


def adapted(**options):
    model = Model()
    dorac.apply_dora(model, TARGETS, r=2, modules_to_save=["tail.1"], init_lora_weights=False, **options)
    return model


def printed(model, capsys):
    dorac.print_trainable_parameters(model)
    return capsys.readouterr().out


def test_the_sentence(capsys):
    model = nn.Sequential(nn.Linear(1000, 1000))
    dorac.apply_dora(model, ["0"], r=2)
    assert printed(model, capsys) == "trainable params: 5,000 || all params: 1,006,000 || trainable%: 0.4970\n"
    for p in model.parameters():
        p.requires_grad_(False)
    assert printed(model, capsys).startswith("trainable params: 0 || all params: 1,006,000 || trainable%: 0.0000")
    assert printed(nn.Identity(), capsys) == "trainable params: 0 || all params: 0 || trainable%: 0.0000\n"


def test_shared_and_repeated_parameters_count_once(capsys):
    model = Model()
    model.head.weight = model.embed.weight
    dorac.apply_dora(model, ["up"], r=1)
    assert printed(model, capsys).split()[6] == f"{sum(p.numel() for p in set(model.parameters())):,d}"


def test_the_numbers_are_pefts(capsys):
    peft = pytest.importorskip("peft")
    model, stock = Model().float(), Model().float()
    config = peft.LoraConfig(use_dora=True, r=2, target_modules=TARGETS)
    dorac.apply_dora(model, config)
    peft.get_peft_model(stock, config).print_trainable_parameters()
    expected = capsys.readouterr().out
    assert printed(model, capsys) == expected
    # a model of PEFT's is counted by the same rule
    dorac.print_trainable_parameters(stock)
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
def test_4_bit_weights_count_as_in_peft(storage, capsys):
    bnb = pytest.importorskip("bitsandbytes")
    peft = pytest.importorskip("peft")

    def make():
        torch.manual_seed(0)
        return nn.Sequential(bnb.nn.Linear4bit(64, 96, quant_type="nf4", quant_storage=storage)).to("cpu")

    config = peft.LoraConfig(use_dora=True, r=2, target_modules=["0"])
    peft.get_peft_model(make(), config).print_trainable_parameters()
    expected = capsys.readouterr().out
    model = make()
    dorac.apply_dora(model, config)
    assert printed(model, capsys) == expected
    assert f"all params: {64 * 96 + 96 + 96 + 2 * (64 + 96):,d} " in expected


def by_name(groups):
    return {group["name"]: group for group in groups}


def check_partition(model, groups):
    """Every trained parameter is in one group, and no other is in any."""
    held = [p for group in groups for p in group["params"]]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sorted(map(id, held)) == sorted(map(id, trained))


def test_groups():
    model = adapted()
    groups = dorac.parameter_groups(
        model,
        1e-3,
        lora_plus_ratio=16,
        magnitude_lr=5e-4,
        embedding_lr=1e-6,
        weight_decay=0.1,
        magnitude_weight_decay=0.02,
    )
    check_partition(model, groups)
    settings = {name: (group["lr"], group["weight_decay"]) for name, group in by_name(groups).items()}
    assert settings == {
        "lora_A": (1e-3, 0.1),
        "lora_B": (16e-3, 0.1),
        "embedding": (1e-6, 0.1),
        "magnitude": (5e-4, 0.02),
        "other": (1e-3, 0.1),
    }
    names = {id(p): name for name, p in model.named_parameters()}
    held = {group["name"]: [names[id(p)] for p in group["params"]] for group in groups}
    linear = [f"blocks.{i}.{layer}" for i in range(2) for layer in ("up", "down")]
    assert held == {
        "lora_A": [f"{name}.lora_A" for name in linear],
        "lora_B": [f"{name}.lora_B" for name in linear],
        "embedding": ["embed.lora_embedding_A", "embed.lora_embedding_B"],
        "magnitude": [f"{name}.lora_magnitude_vector" for name in ["embed", *linear]],
        "other": ["tail.1.weight", "tail.1.bias"],
    }


def test_defaults_train_as_one_group_does():
    model = adapted()
    twin = copy.deepcopy(model)
    optimizers = (
        torch.optim.AdamW(dorac.parameter_groups(model, 1e-2)),
        torch.optim.AdamW([p for p in twin.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0),
    )
    for net, optimizer in zip((model, twin), optimizers, strict=True):
        for _ in range(3):
            net(TOKENS).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_rates_act_on_their_parameters():
    """With plain gradient descent each step is the rate times the gradient."""
    model = adapted()
    rates = {"lora_plus_ratio": 4, "magnitude_lr": 0.5, "embedding_lr": 0.25}
    optimizer = torch.optim.SGD(dorac.parameter_groups(model, 0.125, **rates))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(TOKENS).square().mean().backward()
    optimizer.step()
    for name, p in model.named_parameters():
        if p.requires_grad:
            rate = 0.125
            if "magnitude" in name:
                rate = 0.5
            elif "embedding" in name:
                rate = 0.25
            elif name.endswith("lora_B"):
                rate = 0.5
            assert p.grad.any(), name
            torch.testing.assert_close(p.detach(), before[name] - rate * p.grad)


def test_what_is_frozen_is_in_no_group():
    model = adapted()
    for name, p in model.named_parameters():
        if "blocks.0" in name or "magnitude" in name:
            p.requires_grad_(False)
    groups = dorac.parameter_groups(model, 1e-3)
    check_partition(model, groups)
    assert "magnitude" not in by_name(groups)
    assert len(by_name(groups)["lora_A"]["params"]) == 2
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="Model has no parameter that is trained"):
        dorac.parameter_groups(model, 1e-3)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda m: torch.compile(m, backend="eager"), copy.deepcopy])
def test_wrapped_models(wrap):
    model = wrap(adapted())
    groups = dorac.parameter_groups(model, 1e-3, lora_plus_ratio=2)
    check_partition(model, groups)
    assert {name: len(group["params"]) for name, group in by_name(groups).items()} == {
        "lora_A": 4,
        "lora_B": 4,
        "embedding": 2,
        "magnitude": 5,
        "other": 2,
    }


@pytest.mark.parametrize("dropin", [False, True])
@pytest.mark.parametrize("use_dora", [False, True])
def test_models_of_pefts(dropin, use_dora):
    peft = pytest.importorskip("peft")
    import dorac.peft

    config = {"use_dora": use_dora, "r": 2, "target_modules": TARGETS}
    model = peft.get_peft_model(Model().float(), peft.LoraConfig(**config, modules_to_save=["tail.1"]))
    model.add_adapter("second", peft.LoraConfig(**config))
    model.base_model.set_adapter(["default", "second"])
    if dropin:
        dorac.peft.enable(model)
    groups = dorac.parameter_groups(model, 1e-3)
    check_partition(model, groups)
    sizes = {name: len(group["params"]) for name, group in by_name(groups).items()}
    assert sizes.pop("other") == 2  # the trained copy of tail.1
    magnitudes = {"magnitude": 10} if use_dora else {}
    assert sizes == {"lora_A": 8, "lora_B": 8, "embedding": 4} | magnitudes


def test_a_rate_that_is_a_tensor_is_each_groups_own():
    """A scheduler writes to it in place."""
    lr = torch.tensor(1e-2)
    model = adapted()
    groups = dorac.parameter_groups(model, lr, lora_plus_ratio=4)
    optimizer = torch.optim.AdamW(groups, lr=lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    optimizer.step()
    scheduler.step()
    rates = {group["name"]: group["lr"].item() for group in optimizer.param_groups}
    assert rates == pytest.approx(dict.fromkeys(rates, 5e-3) | {"lora_B": 2e-2})
    assert lr.item() == pytest.approx(1e-2)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -1.0}, ValueError, "lr must be finite and not negative, got -1.0"),
        ({"lr": "fast"}, TypeError, "lr must be a number, got 'fast'"),
        ({"lora_plus_ratio": 0}, ValueError, "lora_plus_ratio must be finite and positive, got 0"),
        ({"lora_plus_ratio": float("nan")}, ValueError, "lora_plus_ratio must be finite and positive"),
        ({"magnitude_lr": True}, TypeError, "magnitude_lr must be a number, got True"),
        ({"weight_decay": float("inf")}, ValueError, "weight_decay must be finite and not negative"),
        ({"magnitude_weight_decay": -0.1}, ValueError, "magnitude_weight_decay must be finite and not negative"),
    ],
)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        dorac.parameter_groups(adapted(), **{"lr": 1e-3, **options})


def experts_model():
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    return transformers.MixtralForCausalLM(config)


def test_experts():
    model = experts_model()
    dorac.apply_dora(model, ["experts", "q_proj"], r=2)
    groups = dorac.parameter_groups(model, 1e-3)
    check_partition(model, groups)
    assert {name: len(group["params"]) for name, group in by_name(groups).items()} == {
        "lora_A": 3,
        "lora_B": 3,
        "magnitude": 3,
    }


def said(model):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        dorac.print_trainable_parameters(model)
    return out.getvalue()


def sharded_models(folder):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD,))
    for wrap in (
        nn.parallel.DistributedDataParallel,
        lambda m: fully_shard(m.float(), mesh=mesh),
    ):
        torch.manual_seed(0)
        model = adapted()
        sentence = said(model)
        model = wrap(model)
        assert said(model) == sentence
        groups = dorac.parameter_groups(model, 0.125, lora_plus_ratio=4, magnitude_lr=0.5)
        check_partition(model, groups)
        layers = [m for m in model.modules() if isinstance(m, DoraLayer)]
        assert len(by_name(groups)["magnitude"]["params"]) == len(layers) == 5
        optimizer = torch.optim.SGD(groups)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        model(TOKENS).square().mean().backward()
        optimizer.step()
        rates = {"lora_B": 0.5, "magnitude": 0.5}
        for group in groups:
            for p in group["params"]:
                name = next(name for name, other in model.named_parameters() if other is p)
                torch.testing.assert_close(p.detach(), before[name] - rates.get(group["name"], 0.125) * p.grad)


def test_sharded_models(tmp_path):
    """DDP and FSDP2: the same sentence on each rank, and each parameter with its rate."""
    run(sharded_models, tmp_path, "cpu", str(tmp_path))


def test_what_a_notebook_shows():
    groups = dorac.parameter_groups(adapted(), 1e-3, lora_plus_ratio=16, weight_decay=0.1)
    assert repr(groups).splitlines()[:2] == [
        "lora_A: 96 parameters in 4 tensors, lr 0.001, weight_decay 0.1",
        "lora_B: 96 parameters in 4 tensors, lr 0.016, weight_decay 0.1",
    ]
    assert len(repr(groups).splitlines()) == len(groups) == 5
