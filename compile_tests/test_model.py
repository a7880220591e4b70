"""A whole model of SmolLM2's architecture, wrapped: one graph, no break, no recompile over lengths."""

import importlib.util

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import dorac
from dorac.demo.model import DEFAULT_PACKAGE, load_model, locate

SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def random_smollm2(layers: int) -> torch.nn.Module:
    """SmolLM2-135M's shape with random weights and a small vocabulary."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=1024,
        tie_word_embeddings=True,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def real_smollm2() -> torch.nn.Module:
    """The model that the demo fine-tunes."""
    if importlib.util.find_spec(DEFAULT_PACKAGE) is None:  # its own imports need more than the demo does
        pytest.skip(f"needs the package {DEFAULT_PACKAGE}")
    return load_model(locate(None), dtype=torch.float32, device="cpu")


def adapted(model: torch.nn.Module, embedding: bool = False) -> torch.nn.Module:
    """Every linear kind, and the token embedding if asked for, with one rank and four scalings, off the zero init."""
    layers = model.config.num_hidden_layers
    names = dorac.apply_dora(
        model,
        [*SEVEN, "embed_tokens"] if embedding else "all-linear",
        r=4,
        lora_alpha=8,
        init_lora_weights=False,
        alpha_pattern={"q_proj": 2, "down_proj": 5, r"layers\.1\..*": 3},
    )
    assert {name.rpartition(".")[2] for name in names} == SEVEN | ({"embed_tokens"} if embedding else set())
    assert len(names) == 7 * layers + embedding
    assert len({layer.scaling for layer in model.modules() if isinstance(layer, dorac.nn.DoraLayer)}) == 4
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, dorac.nn.DoraLayer):
                lora_A, lora_B = layer._factors()
                lora_B.mul_(0.1)  # drawn as large as the weights, it would drown what the model has learnt
                if isinstance(layer, dorac.nn.DoraEmbedding):
                    lora_A.mul_(0.01)
                layer.lora_magnitude_vector.copy_(
                    dorac.functional.init_magnitude(layer._matrix(), lora_A, lora_B, layer.scaling)
                )
                layer.lora_magnitude_vector.mul_(torch.rand_like(layer.lora_magnitude_vector) * 0.2 + 0.9)
    return model


@pytest.mark.parametrize("embedding", [pytest.param(False, marks=pytest.mark.full), True])
@pytest.mark.parametrize("build", [lambda: random_smollm2(2), pytest.param(real_smollm2, marks=pytest.mark.full)])
def test_fullgraph_over_lengths(build, embedding):
    model = adapted(build(), embedding)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)

    def step(length):
        ids = torch.randint(0, 1024, (2, length))
        model.zero_grad()
        loss = compiled(input_ids=ids, labels=ids).loss
        loss.backward()
        grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        model.zero_grad()
        eager = model(input_ids=ids, labels=ids).loss
        eager.backward()
        torch.testing.assert_close(loss, eager)
        torch.testing.assert_close(grads, [p.grad for p in model.parameters() if p.requires_grad], rtol=1e-4, atol=1e-5)

    step(64)
    assert counter.frame_count == 1
    step(96)
    assert counter.frame_count == 2
    with torch.compiler.set_stance("fail_on_recompile"):
        step(128)
        step(33)


def test_no_graph_breaks():
    explained = torch._dynamo.explain(adapted(random_smollm2(2)))(input_ids=torch.randint(0, 1024, (2, 16)))
    assert explained.graph_count == 1
    assert explained.graph_break_count == 0
