"""PEFT models with the drop-in under ``torch.compile(fullgraph=True)``: no break, no recompile over lengths."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import AotEagerAndRecordGraphs, CompileCounterWithBackend

peft = pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import test_peft_direct as direct  # noqa: E402
from peft_models import KINDS, gradients, off_init, target, twins  # noqa: E402

import dorac.peft  # noqa: E402

LINEAR_AND_EMBEDDING = r".*(_proj|embed_tokens)"
CI_KINDS = ("linear", "embedding", "conv2d")


def tiny_llama(targets, layers=1, **options):
    """A small Llama under stock PEFT, adapters off their init."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        use_cache=False,
    )
    config = (
        transformers.LlamaForCausalLM(config),
        peft.LoraConfig(use_dora=True, r=4, target_modules=targets, **options),
    )
    return off_init(peft.get_peft_model(*config))


class ConvNet(nn.Module):
    """Convolutions of one, two and three dimensions, one of them dilated, one grouped."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(3, 4, 3, padding=1)
        self.two = nn.Conv2d(4, 4, 3, padding=2, dilation=2)
        self.grouped = nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.three = nn.Conv3d(4, 2, 3, padding=1)

    def forward(self, x):
        x = self.one(x)[..., None]
        x = self.grouped(self.two(x).relu())[..., None]
        return self.three(x)


def step(model, inputs, seed=3):
    model.zero_grad()
    torch.manual_seed(seed)
    out = model(**inputs)
    loss = out.loss if hasattr(out, "loss") else out.square().mean()
    loss.backward()
    return loss.detach(), {name: grad.clone() for name, grad in gradients(model).items()}


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.1}], ids=["plain", "dropout"])
@pytest.mark.parametrize(
    "targets", [pytest.param("all-linear", marks=pytest.mark.full), LINEAR_AND_EMBEDDING], ids=["linear", "all"]
)
def test_whole_model(targets, options, backend):
    """Training, one graph and a second for symbolic lengths; without dropout the numbers of eager stock PEFT."""
    stock = tiny_llama(targets, **options)
    ours = copy.deepcopy(stock)
    dorac.peft.enable(ours)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(ours.train(), fullgraph=True, backend=counter)

    def check(length):
        ids = torch.randint(0, 64, (2, length))
        ours.zero_grad()
        loss = compiled(input_ids=ids, labels=ids).loss
        loss.backward()
        assert all(p.grad.isfinite().all() for p in ours.parameters() if p.requires_grad)
        if not options:
            expected_loss, expected = step(stock.train(), {"input_ids": ids, "labels": ids})
            torch.testing.assert_close(loss.detach(), expected_loss)
            torch.testing.assert_close(gradients(ours), expected, rtol=1e-4, atol=1e-6)

    check(16)
    assert counter.frame_count == 1
    check(24)
    assert counter.frame_count == 2
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (32, 9, 57):
            check(length)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.1}], ids=["plain", "dropout"])
def test_convolutions(options):
    torch.manual_seed(0)
    config = peft.LoraConfig(use_dora=True, r=4, target_modules=["one", "two", "three", "grouped"], **options)
    ours = off_init(peft.get_peft_model(ConvNet(), config)).train()
    dorac.peft.enable(ours)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(ours, fullgraph=True, backend=counter)

    def check(length):
        x = torch.randn(2, 3, length)
        ours.zero_grad()
        compiled(x).square().mean().backward()
        if not options:
            actual = {name: grad.clone() for name, grad in gradients(ours).items()}
            _, expected = step(ours, {"x": x})
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)

    for length in (16, 24):
        check(length)
    assert counter.frame_count == 2
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (32, 17):
            check(length)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("active", ["one", ["one", "two"]], ids=["one_call", "base_and_delta"])
@pytest.mark.parametrize("kind", [k if k in CI_KINDS else pytest.param(k, marks=pytest.mark.full) for k in KINDS])
def test_no_graph_breaks(kind, active, training):
    """One adapter, and two in sequence, where PEFT takes base and delta apart: no break either way."""
    _, ours = twins(kind, adapters=("one", "two"), lora_dropout=0.1)
    ours.base_model.set_adapter(active)
    ours.train(training)
    x = KINDS[kind].input(3, torch.float64)
    explained = torch._dynamo.explain(ours)(x)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons
    if not training:
        torch.testing.assert_close(torch.compile(ours, fullgraph=True, backend="eager")(x), ours(x))


def test_the_graph_has_one_node_a_layer():
    """Compiled, a layer is the norm and ``dorac.dora_linear``; the base layer is not run beside it."""
    _, ours = twins("linear")
    recorder = AotEagerAndRecordGraphs()
    torch.compile(ours, fullgraph=True, backend=recorder)(KINDS["linear"].input(3, torch.float64))
    calls = [str(node.target) for node in recorder.graphs[0].graph.nodes if node.op == "call_function"]
    assert calls.count("dorac.dora_linear") == 1
    assert calls.count("dorac.norm_factored") == 1
    assert not any("linear" in call and "dorac" not in call for call in calls)


def test_caching_and_switching_under_compile():
    """PEFT's DoraCaching in a compiled model, which keeps no norm, and ``disable`` on one: the right numbers always."""
    from peft.helpers import DoraCaching

    _, ours = twins("linear")
    ours.eval()
    x = KINDS["linear"].input(3, torch.float64)
    expected = ours(x)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    with DoraCaching():
        for _ in range(3):
            torch.testing.assert_close(compiled(x), expected)
        assert not target(ours).lora_magnitude_vector["default"]._dora_cache  # nothing could tell that it is stale
        torch.testing.assert_close(ours(x), expected)
        assert target(ours).lora_magnitude_vector["default"]._dora_cache
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(ours(x), expected)
    assert not target(ours).lora_magnitude_vector["default"]._dora_cache
    with ours.disable_adapter():
        torch.testing.assert_close(compiled(x), target(ours).base_layer(x))
    torch.testing.assert_close(compiled(x), expected)


# Of hooks and of a ``forward`` in the instance's dictionary torch lets compiled code ask once, when it is compiled.
CHANGES = [change for change in [*direct.DIRECT, *direct.AS_PEFT] if change is not direct.own_forward]
CI_CHANGES = [
    direct.other_base,
    direct.other_lora_A,
    direct.other_weight,
    direct.shadowed_weight,
    direct.other_adapter,
    direct.set_scale,
    direct.no_dropout_in_eval,
    direct.dropout_of_another_kind,
    direct.parametrized,
    direct.merged,
]

NO_OTHER_NUMBERS = [
    direct.another_variant,
    direct.frozen,
    direct.base_is_trained,
    direct.one_of_two_elsewhere,
    direct.other_class_of_magnitude,
    direct.parametrized,
    direct.subclass_of_tensor,
]


@pytest.mark.filterwarnings("ignore:Adapter other was active")
@pytest.mark.parametrize(
    "change",
    [c if c in CI_CHANGES else pytest.param(c, marks=pytest.mark.full) for c in CHANGES],
    ids=lambda c: c.__name__,
)
def test_compiled_code_follows(change):
    """What may change between two calls of a layer; the numbers of eager, with one seed for dropout."""
    _, ours = twins("linear", adapters=("default", "other"), lora_dropout=0.4)
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    x = KINDS["linear"].input(3, torch.float64)

    def check():
        outputs = []
        for model in (ours, compiled):
            torch.manual_seed(1)
            with torch.no_grad():
                outputs.append(model(x))
        torch.testing.assert_close(*outputs)
        return outputs[0]

    before = check()
    with change(target(ours), ours):
        changed = check()
    check()
    assert torch.equal(changed, before) == (change in NO_OTHER_NUMBERS)
