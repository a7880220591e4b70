"""Language models under stock PEFT and under the drop-in, side by side: training, and the error of every layer."""

import copy
import importlib.util

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft.tuners.lora import LoraLayer  # noqa: E402
from peft_models import loss_differences  # noqa: E402

import dorac.peft  # noqa: E402
from dorac import functional  # noqa: E402
from dorac.demo.data import batches, language_reference, token_blocks  # noqa: E402
from dorac.demo.model import DEFAULT_PACKAGE, load_model, load_tokenizer, locate  # noqa: E402


def tiny_llama(dtype):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config).to(dtype), lambda: iter(lambda: torch.randint(0, 128, (2, 24)), None)


def smollm2(dtype):
    """SmolLM2-135M with its weights, and blocks of Python's language reference."""
    if importlib.util.find_spec(DEFAULT_PACKAGE) is None:
        pytest.skip(f"needs the package {DEFAULT_PACKAGE}")
    source = locate(None)
    blocks, _ = token_blocks(language_reference(), load_tokenizer(source).encode, 48)
    return load_model(source, dtype=dtype, device="cpu"), lambda: batches(blocks, 1, 0)


def adapted(model, r, *, autocast_adapter_dtype=True, **options):
    """Stock PEFT around every linear layer; lora_B off zero, magnitudes a tenth above or below the norm."""
    config = peft.LoraConfig(use_dora=True, target_modules="all-linear", r=r, lora_alpha=2 * r, **options)
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
    with torch.no_grad():
        for layer in dora_layers(model).values():
            lora_A, lora_B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            lora_B.normal_(std=0.02)
            norm = functional.norm_factored(layer.base_layer.weight, lora_A, lora_B, layer.scaling["default"])
            sign = torch.randint_like(norm, 0, 2) * 2 - 1
            layer.lora_magnitude_vector["default"].weight.copy_(norm * (1 + 0.1 * sign))
    return model


def dora_layers(model) -> dict[str, LoraLayer]:
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer) and m.lora_variant}


@pytest.mark.parametrize(
    ("build", "steps", "r", "dropout"),
    [
        (tiny_llama, 10, 8, 0.0),
        (tiny_llama, 10, 64, 0.1),
        pytest.param(smollm2, 30, 8, 0.0, marks=pytest.mark.full),
        pytest.param(smollm2, 30, 64, 0.0, marks=pytest.mark.full),
        pytest.param(smollm2, 30, 8, 0.1, marks=pytest.mark.full),
        pytest.param(smollm2, 30, 64, 0.1, marks=pytest.mark.full),
    ],
)
def test_training_follows_stock_peft(build, steps, r, dropout):
    """float32, AdamW at 1e-3: the first loss within 1e-6 relative, every loss within 1e-4; equal seeds for dropout."""
    model, draw = build(torch.float32)
    stock = adapted(model, r, lora_dropout=dropout).train()
    ours = copy.deepcopy(stock)
    dorac.peft.enable(ours)
    data = draw()
    inputs = [next(data) for _ in range(steps)]
    differences = loss_differences(
        ours, stock, lambda model, step: model(input_ids=inputs[step], labels=inputs[step], use_cache=False).loss, steps
    )
    assert differences[0] <= 1e-6
    assert max(differences) <= 1e-4


def layer_errors(build, autocast_adapter_dtype):
    """For every layer the RMS errors of ours and stock's bf16 output against float64, on the same inputs and bits."""
    model, draw = build(torch.bfloat16)
    stock = adapted(model, 16, autocast_adapter_dtype=autocast_adapter_dtype).eval()
    ours = copy.deepcopy(stock)
    dorac.peft.enable(ours)
    inputs = {}
    for name, layer in dora_layers(stock).items():
        layer.register_forward_pre_hook(lambda module, args, name=name: inputs.update({name: args[0]}))
    errors = {}
    with torch.no_grad():
        data = draw()
        stock(input_ids=torch.cat([next(data) for _ in range(4)]), use_cache=False)
        for (name, mine), theirs in zip(dora_layers(ours).items(), dora_layers(stock).values(), strict=True):
            x = inputs[name]
            theirs._forward_pre_hooks.clear()
            exact = copy.deepcopy(theirs).double()(x.double())
            errors[name] = [(layer(x).double() - exact).square().mean().sqrt().item() for layer in (mine, theirs)]
    return errors


@pytest.mark.parametrize("build", [tiny_llama, pytest.param(smollm2, marks=pytest.mark.full)])
def test_error_of_each_layer_in_bf16(build):
    """Adapters in bf16: below stock PEFT's in every layer."""
    errors = layer_errors(build, autocast_adapter_dtype=False)
    ratios = {name: mine / theirs for name, (mine, theirs) in errors.items()}
    print(f"{len(ratios)} layers, ours / stock between {min(ratios.values()):.3f} and {max(ratios.values()):.3f}")
    assert max(ratios.values()) < 1


@pytest.mark.parametrize("build", [tiny_llama, pytest.param(smollm2, marks=pytest.mark.full)])
def test_error_of_each_layer_in_bf16_with_float32_adapters(build):
    """PEFT's default: both sides then do the same float32 arithmetic on the same bf16 product and round once."""
    errors = layer_errors(build, autocast_adapter_dtype=True)
    ratios = {name: mine / theirs for name, (mine, theirs) in errors.items()}
    print(f"{len(ratios)} layers, ours / stock between {min(ratios.values()):.5f} and {max(ratios.values()):.5f}")
    assert max(ratios.values()) <= 1


def test_gradient_checkpointing():
    """transformers' checkpointing recomputes the blocks: the same gradients."""
    model, draw = tiny_llama(torch.float32)
    ours = adapted(model, 4, lora_dropout=0.1).train()
    dorac.peft.enable(ours)
    ids = next(draw())
    grads = []
    for _ in range(2):
        ours.zero_grad()
        torch.manual_seed(0)
        ours(input_ids=ids, labels=ids).loss.backward()
        grads.append({name: p.grad.clone() for name, p in ours.named_parameters() if p.grad is not None})
        ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.testing.assert_close(grads[1], grads[0])


def test_generation():
    """Greedy decoding with a cache, DoRA's norm cached too."""
    from peft.helpers import DoraCaching

    model, draw = tiny_llama(torch.float32)
    stock = adapted(model, 4).eval()
    ours = copy.deepcopy(stock)
    dorac.peft.enable(ours)
    options = {"input_ids": next(draw()), "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = stock.generate(**options)
    assert torch.equal(ours.generate(**options), expected)
    with DoraCaching():
        assert torch.equal(ours.generate(**options), expected)
    assert isinstance(ours.base_model.model.model.embed_tokens, nn.Embedding)
