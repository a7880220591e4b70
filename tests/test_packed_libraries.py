"""Packed weights of the libraries themselves: recognised, and read as the layers multiply with them.

Needs packages that dorac does not: bitsandbytes, torchao; each test skips without its own.
"""

import copy

import pytest
import torch
from packed_weights import factors, truth, worst
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


def test_dense():
    assert packed.of(nn.Linear(4, 6)) is None
