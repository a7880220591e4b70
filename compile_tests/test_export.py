"""Exported programs hold aten ops only once decomposed, and run where dorac is not installed."""

import subprocess
import sys

import pytest
import torch

import dorac


class Block(torch.nn.Module):
    def __init__(self, dtype):
        super().__init__()
        base = torch.nn.Linear(24, 32, dtype=dtype)
        self.layer = dorac.nn.DoraLinear(base, r=4, init_lora_weights=False, adapter_dtype=dtype)
        torch.nn.init.uniform_(self.layer.lora_magnitude_vector, 0.5, 1.5)

    def forward(self, x):
        return torch.nn.functional.gelu(self.layer(x))


def exported(block, dtype, strict=False):
    x = torch.randn(6, 24, dtype=dtype)
    return torch.export.export(block, (x,), dynamic_shapes=({0: torch.export.Dim("tokens")},), strict=strict)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decomposes_to_aten(strict, dtype):
    block = Block(dtype).eval()
    program = exported(block, dtype, strict).run_decompositions()
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not [t for t in targets if "dorac" in t], targets
    for tokens in (1, 2, 33):
        x = torch.randn(tokens, 24, dtype=dtype)
        torch.testing.assert_close(program.module()(x), block(x))


def test_saved_program_runs_without_dorac(tmp_path):
    block = Block(torch.float32).eval()
    torch.export.save(exported(block, torch.float32).run_decompositions(), tmp_path / "block.pt2")
    x = torch.randn(5, 24)
    torch.save((x, block(x).detach()), tmp_path / "expected.pt")
    run_without_dorac(tmp_path, f"f = torch.export.load({str(tmp_path / 'block.pt2')!r}).module()")


@pytest.mark.full
def test_aoti_package_runs_without_dorac(tmp_path):
    block = Block(torch.float32).eval()
    path = torch._inductor.aoti_compile_and_package(
        exported(block, torch.float32), package_path=str(tmp_path / "block.pt2")
    )
    x = torch.randn(5, 24)
    torch.save((x, block(x).detach()), tmp_path / "expected.pt")
    run_without_dorac(tmp_path, f"f = torch._inductor.aoti_load_package({path!r})")


def run_without_dorac(folder, load):
    code = (
        "import sys; sys.modules['dorac'] = None\n"
        "import torch\n"
        f"{load}\n"
        f"x, expected = torch.load({str(folder / 'expected.pt')!r})\n"
        "torch.testing.assert_close(f(x), expected)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
