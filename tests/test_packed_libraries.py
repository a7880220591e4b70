"""Packed weights of the libraries themselves: recognised, and read as the layers multiply with them.

Needs packages that dorac does not: bitsandbytes, torchao; each test skips without its own.
"""

import copy

import pytest
import torch
from packed_weights import FORMATS, factors, truth, worst
from torch import nn

from dorac import functional, packed

S = 0.7
SHAPES = [(64, 128), (32, 192), (7, 65), (3, 1)]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check(source, dense):
    """``source``: a module or its weight. ``dense``: the library's own dequantisation."""
    value = packed.of(source)
    value.check()
    assert value.shape == dense.shape
    assert value.dtype is dense.dtype
    rows = dense.shape[0]
    for start, stop in ((0, rows), (rows - 1, rows), (rows // 3, rows // 2 + 1)):
        assert torch.equal(value.rows(start, stop), dense[start:stop])
    lora_A, lora_B = factors(value.shape, 4, torch.bfloat16)
    assert worst(functional.norm_factored(value, lora_A, lora_B, S), truth(dense, lora_A, lora_B, S)) <= 1e-6


class TestBitsandbytes:
    @pytest.fixture(autouse=True)
    def bnb(self):
        self.bnb = pytest.importorskip("bitsandbytes")

    def linear4bit(self, shape, dtype, nested=True, quant_type="nf4", storage=torch.uint8):
        layer = self.bnb.nn.Linear4bit(
            *shape[::-1],
            bias=False,
            compute_dtype=dtype,
            compress_statistics=nested,
            quant_type=quant_type,
            quant_storage=storage,
        )
        layer.weight.data = torch.randn(shape).to(dtype)
        return layer.to("cpu")

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("nested", [False, True])
    @pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
    def test_4bit(self, quant_type, nested, dtype, shape):
        layer = self.linear4bit(shape, dtype, nested, quant_type)
        dense = self.bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        if layer.weight.data.shape[0] == 1:  # which it takes for a transposed weight
            dense = dense.T
        check(layer, dense)
        check(layer.weight, dense)

    def test_other_storage(self):
        layer = self.linear4bit((64, 128), torch.bfloat16, storage=torch.bfloat16)
        assert layer.weight.dtype is torch.bfloat16
        check(layer, self.bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state))

    def test_state_that_only_the_layer_has(self):
        layer = self.linear4bit((64, 128), torch.bfloat16)
        dense = self.bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        layer.weight.quant_state = None
        check(layer, dense)

    @pytest.mark.parametrize("shape", [(64, 128), (32, 192)])
    @pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
    def test_packed_for_the_cpu(self, quant_type, shape):
        layer = self.linear4bit(shape, torch.float32, quant_type=quant_type).eval()
        if not layer.support_avx512bf16_for_cpu:
            pytest.skip("needs a CPU with bf16 instructions")
        before = self.bnb.functional.dequantize_4bit(layer.weight.data, copy.deepcopy(layer.weight.quant_state))
        layer.compute_dtype = torch.bfloat16
        with torch.no_grad():
            columns = layer(torch.eye(shape[1], dtype=torch.bfloat16)).T  # rounded by the product's dtype
        value = packed.of(layer)
        assert type(value) is packed.Bnb4bitCpu
        rows = value.rows(0, shape[0])
        assert torch.equal(rows.to(torch.bfloat16), columns)
        assert ((rows - before).abs() <= 2**-7 * before.abs()).all()
        check(layer, rows)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_int8(self, shape):
        layer = self.bnb.nn.Linear8bitLt(*shape[::-1], bias=False, has_fp16_weights=False)
        layer.weight.data = torch.randn(shape)
        layer = layer.to("cpu")
        dense = self.bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
        check(layer, dense)
        check(layer.weight, dense)
        layer(torch.randn(2, shape[1]))
        assert layer.weight.SCB is None  # the state has it now
        check(layer, dense)

    def test_not_quantised_yet(self):
        layers = self.bnb.nn.Linear4bit(64, 64), self.bnb.nn.Linear8bitLt(64, 64, has_fp16_weights=False)
        for layer in layers:
            with pytest.raises(ValueError, match=f"{type(layer).__name__} .bitsandbytes. is not quantised yet"):
                packed.of(layer)
        assert packed.of(self.bnb.nn.Linear8bitLt(64, 64)) is None  # dense

    @pytest.mark.parametrize("kind", ["4bit", "8bit"])
    def test_recognised_in_a_graph(self, kind):
        if kind == "4bit":
            layer = self.linear4bit((64, 128), torch.bfloat16)
        else:
            layer = self.bnb.nn.Linear8bitLt(128, 64, bias=False, has_fp16_weights=False).to("cpu")
        lora_A, lora_B = factors((64, 128), 4, torch.bfloat16)

        def norm():
            return functional.norm_factored(packed.of(layer), lora_A, lora_B, S)

        assert torch.equal(torch.compile(norm, fullgraph=True, backend="aot_eager")(), norm())


class TestTorchao:
    @pytest.fixture(autouse=True)
    def _torchao(self):
        pytest.importorskip("torchao")

    @pytest.mark.parametrize("shape", [(64, 128), (33, 96)])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("granularity", ["row", "group", "tensor"])
    def test_int8(self, granularity, dtype, shape):
        from torchao.quantization import Int8WeightOnlyConfig, PerRow, PerTensor, quantize_
        from torchao.quantization.granularity import PerGroup

        chosen = {"row": PerRow(), "group": PerGroup(32), "tensor": PerTensor()}[granularity]
        layer = nn.Linear(*shape[::-1], bias=False, dtype=dtype)
        quantize_(layer, Int8WeightOnlyConfig(granularity=chosen))
        rounded = dtype if granularity == "group" else torch.float32  # with groups the layer multiplies what it rounded
        check(layer, layer.weight.dequantize(rounded))

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
    @pytest.mark.parametrize("granularity", ["row", "block", "tensor"])
    def test_float8(self, granularity, dtype):
        from torchao.quantization import PerBlock, PerRow, PerTensor
        from torchao.quantization.quantize_.workflows.float8.float8_tensor import Float8Tensor

        chosen = {"row": PerRow(), "block": PerBlock([128, 128]), "tensor": PerTensor()}[granularity]
        dense = torch.randn(256, 384, dtype=torch.bfloat16)
        weight = Float8Tensor.from_hp(dense, granularity=chosen, float8_dtype=dtype)
        check(weight, weight.dequantize(torch.float32))

    def test_int4(self):
        """Its quantisation needs a GPU package; the pieces are put into its tensor here."""
        from torchao.quantization.quantize_.workflows.int4.int4_tensor import Int4Tensor

        value, dense = FORMATS["torchao_int4"]((64, 128))
        weight = Int4Tensor(value.codes, value.scale, value.zero, [1, value.block], torch.Size(value.shape))
        check(weight, dense)

    @pytest.mark.parametrize("shape", [(256, 384), (130, 96)])
    @pytest.mark.parametrize("swizzled", [False, True])
    @pytest.mark.parametrize("tensor_scale", [None, 0.37])
    def test_nvfp4(self, tensor_scale, swizzled, shape):
        from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

        tensor_scale = None if tensor_scale is None else torch.tensor(tensor_scale)
        dense = torch.randn(shape, dtype=torch.bfloat16)
        weight = NVFP4Tensor.to_nvfp4(dense, per_tensor_scale=tensor_scale, is_swizzled_scales=swizzled)
        check(weight, weight.dequantize())

    def test_recognised_in_a_graph(self):
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        layer = nn.Linear(128, 64, bias=False, dtype=torch.bfloat16)
        quantize_(layer, Int8WeightOnlyConfig())
        lora_A, lora_B = factors((64, 128), 4, torch.bfloat16)

        def norm():
            return functional.norm_factored(packed.of(layer), lora_A, lora_B, S)

        assert torch.equal(torch.compile(norm, fullgraph=True, backend="aot_eager")(), norm())


class TestTransformers:
    def test_mxfp4(self):
        integration = pytest.importorskip("transformers.integrations.mxfp4")
        layer = nn.Module()
        layer.down_proj_blocks = torch.randint(0, 256, (3, 24, 4, 16), dtype=torch.uint8)
        layer.down_proj_scales = torch.randint(100, 140, (3, 24, 4), dtype=torch.uint8)
        dense = integration.convert_moe_packed_tensors(layer.down_proj_blocks, layer.down_proj_scales).mT
        value = packed.of(layer, "down_proj")
        value.check()
        assert torch.equal(value.rows(0, 24), dense)
        assert torch.equal(value.rows(5, 7), dense[:, 5:7])

    @pytest.mark.parametrize("block", [(128, 128), None])
    def test_fp8_linear(self, block):
        integration = pytest.importorskip("transformers.integrations.finegrained_fp8")
        layer = integration.FP8Linear(200, 300, block_size=block)
        layer.weight.data = torch.randn(300, 200).to(layer.weight.dtype)
        layer.weight_scale_inv.data = torch.rand_like(layer.weight_scale_inv) + 0.5
        scale = layer.weight_scale_inv
        if block:
            scale = scale.repeat_interleave(128, 0)[:300].repeat_interleave(128, 1)[:, :200]
        check(layer, layer.weight.detach().float() * scale.detach())


def test_dense():
    assert packed.of(nn.Linear(4, 6)) is None
