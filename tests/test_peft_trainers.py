"""Trainers cast what is trained to half precision; magnitudes stay float32 (``dorac.magnitudes``), and so they move."""

import copy
import warnings

import peft_models
import pytest
import torch
from peft_models import KINDS, gradients, target

peft = pytest.importorskip("peft")

import dorac.peft  # noqa: E402
from dorac import magnitudes  # noqa: E402

LR = 1e-5  # AdamW's step, which bfloat16 rounds away for elements above 0.003


def model_of(side, kind="linear", dtype=torch.bfloat16, **options):
    """An adapted layer in half precision, float32 its adapter, and its magnitude."""
    if side == "peft":
        _, model = peft_models.twins(kind, dtype=dtype, **options)
        return model, target(model).lora_magnitude_vector["default"].weight
    torch.manual_seed(0)
    model = peft_models.Holder(KINDS[kind].layer()).to(dtype)
    dorac.apply_dora(model, ["target"], r=2, lora_alpha=3, init_lora_weights=False)
    return model, model.target.lora_magnitude_vector


def cast_all(model):
    """What TRL does to a quantised model's adapter (before 1.16 to magnitudes, too), and DeepSpeed's engine."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)


def steps(model, kind="linear", count=3, optimizer=None):
    x = KINDS[kind].input(3, torch.bfloat16)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(parameters, lr=LR, weight_decay=0)
    for _ in range(count):
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()
    return optimizer


def check_moved(magnitude, before, count=3):
    """Every element by about the learning rate in every step of AdamW."""
    assert magnitude.dtype == torch.float32
    moved = (magnitude.detach() - before).abs()
    assert (moved > 0.5 * count * LR).all(), moved
    assert (moved < 1.5 * count * LR).all(), moved


SIDES = ["peft", "nn"]
CASTS = {
    "half": (lambda m: m.half(), True),
    "bfloat16": (lambda m: m.bfloat16(), True),
    "to": (lambda m: m.to(dtype=torch.bfloat16), True),
    "data": (cast_all, False),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("calls_train", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", SIDES)
def test_magnitudes_move(side, kind, calls_train, cast):
    """The optimizer may be there before, as in TRL; casts through modules lose no digit."""
    model, magnitude = model_of(side, kind)
    exact = magnitude.detach().clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LR, weight_decay=0)
    cast, keeps = CASTS[cast]
    cast(model)
    assert (magnitude.dtype == torch.float32) is keeps
    before = exact if keeps else exact.bfloat16().float()
    assert torch.equal(magnitude.float(), before)
    model.to(torch.bfloat16)  # the inputs' dtype
    if calls_train:
        model.train()
        assert magnitude.dtype == torch.float32
    steps(model, kind, optimizer=optimizer)
    check_moved(magnitude, before)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_in_the_models_dtype(kind):
    """``autocast_adapter_dtype=False`` is PEFT's word for it, until the magnitude is trained."""
    with dorac.peft.enable():
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, use_dora=True, target_modules=["target"], **KINDS[kind].options)
        model = peft_models.Holder(KINDS[kind].layer()).bfloat16()
        model = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    dorac.peft.enable(model)
    peft_models.off_init(model)
    magnitude = target(model).lora_magnitude_vector["default"].weight
    before = magnitude.detach().float()
    assert magnitude.dtype == torch.bfloat16
    steps(model, kind)
    check_moved(magnitude, before)


def test_several_active_adapters():
    _, model = peft_models.twins("linear", dtype=torch.bfloat16, adapters=("one", "two"))
    model.base_model.set_adapter(["one", "two"])
    cast_all(model)
    weights = [m.weight for m in target(model).lora_magnitude_vector.values()]
    before = [w.detach().float() for w in weights]
    steps(model)
    for weight, start in zip(weights, before, strict=True):
        check_moved(weight, start)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("case", ["eval", "frozen", "float64"])
def test_left_as_it_is(side, case):
    model, magnitude = model_of(side, dtype=torch.float64 if case == "float64" else torch.bfloat16)
    if case != "float64":
        cast_all(model)
    magnitude.requires_grad_(case != "frozen")
    model.train(case != "eval")
    dtype = magnitude.dtype
    assert dtype == (torch.float64 if case == "float64" else torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(KINDS["linear"].input(3, model.target.weight.dtype if side == "nn" else target(model).weight.dtype))
    assert magnitude.dtype == dtype


@pytest.mark.parametrize("side", SIDES)
def test_gradients_and_resuming(side):
    """A gradient follows; what is loaded, optimizer's state included, is not rounded to the dtype of a cast."""
    model, magnitude = model_of(side)
    cast_all(model)
    optimizer = steps(model)
    state, moments = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    grad = magnitude.grad.clone()
    model.bfloat16()
    assert torch.equal(magnitude.grad, grad)

    again, resumed = model_of(side)
    cast_all(again)
    resumed_optimizer = torch.optim.AdamW([p for p in again.parameters() if p.requires_grad], lr=LR, weight_decay=0)
    again.load_state_dict(state)
    resumed_optimizer.load_state_dict(moments)
    assert torch.equal(resumed, magnitude)
    for net, its in ((model, optimizer), (again, resumed_optimizer)):
        steps(net, optimizer=its)
    assert torch.equal(resumed, magnitude)


@pytest.mark.parametrize("side", SIDES)
def test_a_flat_buffer_is_its_owners(side):
    """DeepSpeed's parameters are views of a buffer that its float32 masters are copied to."""
    model, magnitude = model_of(side)
    flat = torch.cat([magnitude.detach().flatten(), magnitude.detach().flatten()]).bfloat16()
    magnitude.data = flat[: magnitude.numel()].view(magnitude.shape)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.train()(KINDS["linear"].input(3, torch.bfloat16))
    assert (magnitude.dtype, magnitude.data_ptr()) == (torch.bfloat16, flat.data_ptr())


@pytest.mark.parametrize("side", SIDES)
def test_compiled(side):
    """One graph over a half magnitude, which stays what it is while it is traced."""
    model, magnitude = model_of(side)
    cast_all(model)
    x = KINDS["linear"].input(3, torch.bfloat16)
    with torch._dynamo.config.patch(error_on_recompile=False):
        y = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    assert magnitude.dtype == torch.bfloat16
    torch.testing.assert_close(y, copy.deepcopy(model).eval()(x))


@pytest.mark.parametrize("side", SIDES)
def test_what_somebody_accumulates_is_named(side):
    """As ``DistributedDataParallel`` does: float32 gradients would go past its hooks, and be each process's own."""
    model, magnitude = model_of(side)
    cast_all(model)
    node = magnitude.view_as(magnitude).grad_fn.next_functions[0][0]
    with pytest.warns(RuntimeWarning, match="a DoRA magnitude is trained in torch.bfloat16.*model.train()") as caught:
        model.train()
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(RuntimeWarning, match="a DoRA magnitude is trained in torch.bfloat16"):
        model(KINDS["linear"].input(3, torch.bfloat16))
    assert magnitude.dtype == torch.bfloat16
    del node
    model.train()
    assert magnitude.dtype == torch.float32
    magnitudes.widen(magnitude)
    assert gradients(model) == {}


@pytest.mark.parametrize("casts_magnitudes", [False, True], ids=["as_it_is", "before_1.16"])
def test_trl_over_nf4(casts_magnitudes, tmp_path):
    """SFTTrainer on the CPU, with checkpointing: magnitudes move, and the saved adapter gives the same logits.

    Before 1.16 TRL cast magnitudes, too. A magnitude in bfloat16 does not move at all.
    """
    for name in ("trl", "bitsandbytes", "datasets"):
        pytest.importorskip(name)
    import datasets
    import tiny_trainers
    import trl
    from transformers import BitsAndBytesConfig

    base = tiny_trainers.save_base(tmp_path / "base", torch.bfloat16, hidden_size=64, intermediate_size=128)

    def load():
        return tiny_trainers.load(
            base,
            dtype=torch.bfloat16,
            device_map="cpu",
            quantization_config=BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            ),
        )

    options = {"use_cpu": True, "bf16": True, "report_to": [], "save_strategy": "no", "logging_strategy": "no"}
    with dorac.peft.enable():
        trainer = trl.SFTTrainer(
            model=load(),
            args=trl.SFTConfig(
                output_dir=str(tmp_path / "run"),
                max_steps=5,
                learning_rate=1e-4,
                lr_scheduler_type="constant",
                gradient_checkpointing=True,
                disable_tqdm=True,
                **options,
            ),
            train_dataset=datasets.Dataset.from_dict({"text": ["a row has one length"] * 40}),
            peft_config=peft.LoraConfig(r=4, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        model = trainer.model
        if casts_magnitudes:
            cast_all(model)
        weights = {name: p for name, p in model.named_parameters() if "lora_magnitude_vector" in name}
        before = {name: p.detach().float().clone() for name, p in weights.items()}
        trainer.train()
        trainer.save_model(str(tmp_path / "adapter"))
        again = peft.PeftModel.from_pretrained(load(), str(tmp_path / "adapter")).eval()
        assert len(weights) == 14
        for name, weight in weights.items():
            assert weight.dtype == torch.float32
            assert (weight.detach() - before[name]).abs().max() > 1e-4, name
        ids = torch.tensor([[2, 3, 4, 5, 6]])
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # as the Trainer's model runs
            expected = model.eval()(ids).logits.float()
            assert torch.equal(again(ids).logits.float(), expected)
            with again.disable_adapter():
                assert (again(ids).logits.float() - expected).abs().max() > 0.01
