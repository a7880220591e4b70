"""Exported programs hold aten ops only once decomposed, and run in processes where dorac is not installed."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_model import adapted, random_smollm2, real_smollm2
from torch import nn
from torch.export import Dim

import dorac
from dorac.ops import front

PAGE = (Path(dorac.__file__).parent / "docs" / "compiling.md").read_text(encoding="utf-8")
BATCH, LENGTH = Dim("batch"), Dim("length")


class Block(nn.Module):
    """An adapted layer and what follows it."""

    def __init__(self, base: nn.Module, **options):
        super().__init__()
        weight = base.weight.dtype
        self.layer = dorac.nn.layer_class(base)(base, r=4, init_lora_weights=False, adapter_dtype=weight, **options)
        nn.init.uniform_(self.layer.lora_magnitude_vector, 0.5, 1.5)

    def forward(self, x):
        return nn.functional.gelu(self.layer(x))


# name: base layer; an input of this batch and length; its dynamic dimensions
KINDS = {
    "linear": (lambda: nn.Linear(24, 32), lambda b, n: torch.randn(b, n, 24), {0: BATCH, 1: LENGTH}),
    "bfloat16": (
        lambda: nn.Linear(24, 32, dtype=torch.bfloat16),
        lambda b, n: torch.randn(b, n, 24, dtype=torch.bfloat16),
        {0: BATCH, 1: LENGTH},
    ),
    "embedding": (lambda: nn.Embedding(40, 24), lambda b, n: torch.randint(0, 40, (b, n)), {0: BATCH, 1: LENGTH}),
    "conv1d": (lambda: nn.Conv1d(8, 12, 3, padding=1), lambda b, n: torch.randn(b, 8, n), {0: BATCH, 2: LENGTH}),
    "conv2d": (lambda: nn.Conv2d(8, 12, 3, padding=1), lambda b, n: torch.randn(b, 8, n, n), {0: BATCH}),
}


def exported(block, x, dynamic, strict=False):
    return torch.export.export(block, (x,), dynamic_shapes=(dynamic,), strict=strict)


def assert_aten(program):
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [t for t in targets if "dorac" in t], targets


@pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])
@pytest.mark.parametrize("kind", KINDS)
def test_decomposes_to_aten(kind, strict):
    base, make_input, dynamic = KINDS[kind]
    block = Block(base()).eval()
    program = exported(block, make_input(2, 7), dynamic, strict).run_decompositions()
    assert_aten(program)
    lengths = (1, 33) if 1 in dynamic or 2 in dynamic else (7,)
    for batch in (1, 5):
        for length in lengths:
            x = make_input(batch, length)
            torch.testing.assert_close(program.module()(x), block(x))


@pytest.mark.parametrize("options", [{"lora_dropout": 0.3}, {"norm_grad": True}], ids=str)
def test_training_mode_decomposes_to_aten(options):
    """Dropout is recorded as it is in training mode, and the norm's gradient needs no op of ours either."""
    block = Block(nn.Linear(24, 32), **options).train()
    program = exported(block, torch.randn(2, 7, 24), {0: BATCH, 1: LENGTH}).run_decompositions()
    assert_aten(program)
    x = torch.randn(3, 5, 24)
    torch.manual_seed(1)
    y = program.module()(x)
    torch.manual_seed(1)
    torch.testing.assert_close(y, block(x))


def test_kernels_stay_out_of_programs(monkeypatch):
    """Where the Triton kernels would run, export still records aten: an opaque op cannot run without Python."""
    monkeypatch.setattr(front, "has_kernels", lambda *tensors: True)
    block = Block(nn.Linear(24, 32)).eval()
    assert_aten(exported(block, torch.randn(2, 7, 24), {0: BATCH, 1: LENGTH}).run_decompositions())


def test_what_cannot_be_exported_says_so():
    class Merging(Block):
        def forward(self, x):
            self.layer.merge()
            return self.layer(x)

    class Unmerging(Block):
        def forward(self, weight):
            layer = self.layer
            norm = dorac.functional.norm_factored(weight, layer.lora_A, layer.lora_B, layer.scaling)
            magnitude = layer.lora_magnitude_vector
            return dorac.functional.unmerge_weight(
                weight, layer.lora_A, layer.lora_B, magnitude, scaling=layer.scaling, weight_norm=norm
            )

    for cls, x, sentence in (
        (Merging, torch.randn(2, 24), r"DoraLinear.merge cannot be exported: .* merge before exporting"),
        (Unmerging, torch.randn(32, 24), r"unmerging cannot be exported: it reads values of g"),
        (Block, torch.randn(2, 23), r"x must be \[\*, in\] with in = 24, got shape \[2, 23\]"),
    ):
        block = cls(nn.Linear(24, 32))
        for strict in (False, True):
            with pytest.raises(Exception, match=sentence):
                torch.export.export(block, (x,), strict=strict)
        assert not block.layer.merged


def test_recipe(tmp_path, device, monkeypatch):
    """The page's: both files run without dorac, at other sizes than traced with; a damaged package torch refuses."""
    base, make_input, _ = KINDS["linear"]
    block = Block(base()).to(device).eval()
    names = {"torch": torch, "model": block, "x": make_input(2, 7).to(device)}
    monkeypatch.chdir(tmp_path)
    exec(re.search(r"^## Export$.*?```python\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE).group(1), names)
    save_expected(block, tmp_path, make_input(1, 1).to(device), make_input(3, 33).to(device))
    run_without_dorac(tmp_path, "f = torch.export.load('model.pt2').module()")
    try:
        run_without_dorac(tmp_path, "f = torch._inductor.aoti_load_package('compiled.pt2')")
    except AssertionError:
        if a_plain_package_crashes(tmp_path, device):
            pytest.skip("a package of nn.Linear alone ends the process here, too")
        raise

    content = (tmp_path / "compiled.pt2").read_bytes()
    damaged = {"empty": b"", "text": b"not a package" * 100, "half": content[: len(content) // 2]}
    for name, data in damaged.items():
        (tmp_path / f"{name}.pt2").write_bytes(data)
    run_fresh(  # in a process of its own: a crash would end it with a signal
        "import torch\n"
        f"for name in {[*damaged, 'model', 'missing']!r}:\n"  # model.pt2 is a program, not a package
        "    try:\n"
        "        torch._inductor.aoti_load_package(f'{name}.pt2')\n"
        "    except RuntimeError as error:\n"
        "        print(error)\n"
        "    else:\n"
        "        raise AssertionError(name)\n"
    )


class DecoderBlock(nn.Module):
    """The first decoder layer of a Llama model and its rotary embedding: hidden states to hidden states."""

    def __init__(self, model):
        super().__init__()
        self.layer, self.rotary = model.model.layers[0], model.model.rotary_emb

    def forward(self, hidden):
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        return self.layer(hidden, position_embeddings=self.rotary(hidden, positions))


def hidden_states(batch, length, size, device="cpu"):
    return torch.randn(batch, length, size, device=device)


def test_decoder_block_decomposes_to_aten():
    block = DecoderBlock(adapted(random_smollm2(2))).eval()
    program = exported(block, hidden_states(2, 7, 576), {0: BATCH, 1: LENGTH}).run_decompositions()
    assert_aten(program)
    hidden = hidden_states(3, 20, 576)
    torch.testing.assert_close(program.module()(hidden), block(hidden))


@pytest.mark.full
def test_smollm2_block_in_two_processes(tmp_path, device):
    """All seven linear layers of the block adapted, packaged here and run in another process, to 1e-5."""
    block = DecoderBlock(adapted(real_smollm2())).to(device).eval()
    program = exported(block, hidden_states(2, 7, 576, device), {0: BATCH, 1: LENGTH})
    path = package(program, tmp_path / "block.pt2")
    save_expected(block, tmp_path, *(hidden_states(*s, 576, device) for s in ((1, 1), (2, 64), (3, 33))))
    run_without_dorac(tmp_path, f"f = torch._inductor.aoti_load_package({path!r})")


@pytest.mark.parametrize("merged", [False, True])
def test_onnx(tmp_path, merged):
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    base, make_input, dynamic = KINDS["linear"]
    block = Block(base()).eval()
    x = make_input(3, 5)
    expected = block(x)
    if merged:
        dorac.merge(block)
    torch.onnx.export(
        block, (make_input(2, 7),), tmp_path / "block.onnx", dynamo=True, dynamic_shapes=(dynamic,), verbose=False
    )
    session = reference.ReferenceEvaluator(str(tmp_path / "block.onnx"))
    (y,) = session.run(None, {session.input_names[0]: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y), expected)


def package(program, path):
    return torch._inductor.aoti_compile_and_package(program, package_path=str(path))


@torch.no_grad()
def save_expected(block, folder, *inputs):
    torch.save([(x, block(x)) for x in inputs], folder / "expected.pt")


def run_without_dorac(folder, load):
    """Runs the function ``f`` that ``load`` makes in a process where dorac cannot be imported: equal to 1e-5."""
    run_fresh(
        "import sys; sys.modules['dorac'] = None\n"
        "import torch\n"
        f"{load}\n"
        f"for x, expected in torch.load({str(folder / 'expected.pt')!r}):\n"
        "    atol = 1e-5 * expected.abs().max().item()\n"
        "    torch.testing.assert_close(f(x), expected, rtol=0, atol=atol)\n"
    )


def a_plain_package_crashes(folder, device):
    """Whether one without dorac ends by a signal where it is loaded, as with torch 2.11 on one of our machines."""
    path = folder / "plain.pt2"
    with torch.no_grad():
        package(torch.export.export(nn.Linear(4, 4).to(device), (torch.ones(2, 4, device=device),)), path)
    return fresh(f"import torch; torch._inductor.aoti_load_package({str(path)!r})").returncode < 0


def run_fresh(code):
    result = fresh(code)
    assert result.returncode == 0, result.stderr


def fresh(code):
    command = [sys.executable, "-X", "faulthandler", "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False)
