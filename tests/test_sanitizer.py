"""Every kernel under NVIDIA's compute-sanitizer: no access out of bounds, no race in shared memory."""

import os
import shutil
import subprocess
import sys

import pytest

# Off the tiles' edges, one program and several, each path that a kernel has; no allocator between tensors and checker.
SCRIPT = """
import dataclasses, itertools, torch
from dorac.functional import Projection, dora_mlp
from dorac.kernels import configs, segments
from dorac.kernels.backward import compose_backward
from dorac.kernels.compose import compose
from dorac.kernels.lora_b import lora_b_backward
from dorac.kernels.norm import row_norm, row_norms
from dorac.kernels.mixed import mixed
from dorac.kernels.stack_norm import stack_norm
from dorac.testing import expert_inputs, linear_inputs

s = torch.full((), 0.7, device="cuda")
for dtype, factor_dtype in itertools.product((torch.bfloat16, torch.float32), (torch.bfloat16, torch.float32)):
    for shape in ((33, 65, 127, 7), (130, 264, 136, 72), (3, 130, 70, 300), (3, 20, 24, 600)):
        if torch.float32 in (dtype, factor_dtype) and shape[3] > 100:
            continue
        inputs = linear_inputs(shape, dtype=dtype, factor_dtype=factor_dtype, device="cuda")
        factors = inputs.lora_A, inputs.lora_B
        norm = row_norm(inputs.weight, *factors, s)
        row_norm(inputs.weight.T.contiguous().T, *factors, s)
        row_norms([tuple(t.clone() for t in (inputs.weight, *factors)) for _ in range(3)], [0.7, 1.0, 2.0])
        row_norm(*(torch.stack([t, t]) for t in (inputs.weight, *factors)), s)
        if factor_dtype.itemsize < dtype.itemsize:
            continue
        base, h = inputs.x @ inputs.weight.T, inputs.x.to(factor_dtype) @ inputs.lora_A.T
        for delta in (False, True):
            bias = None if delta else inputs.bias
            _, inner = compose(base, h, inputs.lora_B, inputs.magnitude, norm, s, bias, delta=delta, want_inner=True)
            compose(base, h @ inputs.lora_B.T, None, inputs.magnitude, norm, s, bias, delta=delta, want_inner=True)
        compose_backward(base, inner, inputs.magnitude, norm)
        if dtype is factor_dtype is torch.bfloat16 and shape[3] <= 16:
            walk = configs.TileConfig(16, 128, 16, 4, 2, rows=48)
            compose(base, h, inputs.lora_B, inputs.magnitude, norm, s, bias, want_inner=True, config=walk)
        if dtype is factor_dtype is torch.bfloat16 and shape[3] <= 384:
            lora_b_backward(base, inner, inputs.magnitude, norm, h, s, h_is_scaled=False)
            of_y = inputs.x, inputs.weight, inputs.lora_B
            inputs.magnitude[0] = 0
            lora_b_backward(base, inner, inputs.magnitude, norm, h, s, h_is_scaled=False, of_y=of_y)
chosen = configs.mlp_config
configs.mlp_config = lambda *sizes: dataclasses.replace(chosen(*sizes), rows=48, stages=2)
for (tokens, features, inputs, rank), activation in itertools.product(
    ((33, 65, 127, 7), (70, 264, 136, 72)), ("silu", "gelu", "gelu_tanh", "relu")
):
    shapes = (features, inputs), (features, inputs), (inputs, features)
    layers = [linear_inputs((tokens, *shape, rank), dtype=torch.bfloat16, device="cuda").leaves() for shape in shapes]
    layers = [Projection(i.weight.detach(), *i.tensors()[2:], scaling=0.7) for i in layers]
    x = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    for gate in (layers[0], None):
        dora_mlp(x, gate, *layers[1:], activation=activation).sum().backward()
for (batch, tokens), (out, inner, rank), dtype in itertools.product(
    ((3, 1), (37, 1), (300, 1), (3, 120)), ((65, 127, 7), (264, 136, 72)), (torch.bfloat16, torch.float32)
):
    x, weight, lora_A, lora_B, bias = (
        torch.randn(s, device="cuda", dtype=dtype)
        for s in ((batch * tokens, inner), (out, inner), (5, rank, inner), (5, out, rank), (out,))
    )
    m, n = torch.rand(2, 5, out, device="cuda") + 0.5
    index, ranks = torch.arange(batch, device="cuda") % 6 - 1, torch.tensor([1, rank, 3, rank, 2], device="cuda")
    for want_inner in (False, True):
        base = x @ weight.T
        mixed(base, x, lora_A, lora_B, m, n, torch.ones(5, device="cuda"), bias, index, ranks, want_inner=want_inner)
    stack_norm(weight, lora_A[:, :20], lora_B[:, :, :20], torch.ones(5, device="cuda"))
pairs = (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float32, torch.float32)
for (dtype, factor_dtype), (rows, features, inputs, rank), each in itertools.product(
    pairs, ((70, 65, 127, 7), (300, 264, 136, 72), (9, 40, 24, 200)), (False, True)
):
    layer = expert_inputs(3, (rows // 3, features, inputs, rank), dtype=dtype, factor_dtype=factor_dtype, device="cuda")
    _, weight, lora_A, lora_B, magnitude, bias = layer.tensors()
    norm, order = row_norm(weight, lora_A, lora_B, s), torch.randperm(rows, device="cuda")
    offsets = torch.tensor([rows // 2, rows // 2, rows - 3], device="cuda")
    base, x = (torch.randn(rows, n, device="cuda").to(dtype) for n in (features, inputs))
    scaling = torch.rand(3, device="cuda") if each else s
    for by in (None, order):
        h = segments.segment_product(x, lora_A, offsets, by)
        segments.segment_product(base, lora_B.mT, offsets, by, magnitude=magnitude, weight_norm=norm, scaling=scaling)
        given = h, lora_B, magnitude, norm, scaling, bias, offsets, by
        _, inner = segments.segment_compose(base, *given, delta=each, want_inner=True)
        segments.segment_backward(base, inner, magnitude, norm, h, scaling, offsets, by, bias_dtype=dtype)
        small = configs.SegmentConfig(16, 32, 32, 4, 2, 16)
        segments.segment_backward(base, inner, magnitude, norm, h, scaling, offsets, by, config=small)
        segments.segment_backward(x, None, None, None, h, 1.0, offsets, by, d_lora_B=torch.empty_like(lora_A).mT)
    segments.zero_tail(inner, offsets)
    if dtype is torch.bfloat16 and features % 2 == 0:
        layer, small = (magnitude, norm), configs.GateBackwardConfig(16, 16, 32, 4, 2, 16)
        for gate in ("silu", False, None, 1.0, 0.0), ("silu", True, 7.0, 1.702, 1.0):
            z = segments.segment_gate(base, h, lora_B, *layer, scaling, bias, offsets, gate, want_inner=each)
            given = base, *layer, bias, h, scaling, offsets, lora_B, gate
            segments.segment_gate_backward(z, *given)
            segments.segment_gate_backward(z, *given, bias_dtype=dtype, config=small)
torch.cuda.synchronize()
print("done")
"""


@pytest.mark.gpu
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_clean(tool):
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer, which comes with the CUDA toolkit")
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", SCRIPT]
    result = subprocess.run(
        command, env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "done" in result.stdout
    assert "0 errors" in result.stdout or "0 hazards" in result.stdout, result.stdout
