"""Stand-ins for the layers of bitsandbytes and HQQ, for tests without them: their class names, attributes, life cycle.

As there a parameter is quantised in ``.to(device)``, keeps its statistics beside its codes, and computes its own
product. The numbers are nf4's (blocks of 64, no nested statistics) and int8's of one row; nothing is packed for a CPU.
"""

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dorac import packed

NF4 = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]


@dataclasses.dataclass
class QuantState:
    absmax: Tensor
    code: Tensor
    shape: torch.Size
    dtype: torch.dtype
    blocksize: int = 64
    nested: bool = False

    def to(self, device: torch.device) -> None:
        self.absmax, self.code = self.absmax.to(device), self.code.to(device)


class Params4bit(nn.Parameter):
    def __new__(
        cls,
        data=None,
        requires_grad=False,
        quant_state=None,
        blocksize=64,
        compress_statistics=False,
        quant_type="nf4",
        quant_storage=torch.uint8,
        module=None,
    ):
        self = Tensor._make_subclass(cls, torch.empty(0) if data is None else data, requires_grad)
        self.blocksize, self.compress_statistics, self.quant_type = blocksize, compress_statistics, quant_type
        self.quant_storage, self.quant_state, self.module = quant_storage, quant_state, module
        return self

    def __deepcopy__(self, memo):
        state = None if self.quant_state is None else dataclasses.replace(self.quant_state)
        return type(self)(self.data.clone(), quant_state=state, **self._options())

    def _options(self) -> dict[str, object]:
        return {key: value for key, value in vars(self).items() if key not in ("quant_state", "module")}

    def to(self, *args, **kwargs):
        device, _, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is None:
            return self
        if self.quant_state is None:
            self._quantise()
        if self.data.device == device:
            return self
        self.quant_state.to(device)  # the library's moves its own, too
        return type(self)(self.data.to(device), quant_state=self.quant_state, module=self.module, **self._options())

    def _quantise(self):
        blocks = F.pad(self.data.flatten(), (0, -self.numel() % self.blocksize)).view(-1, self.blocksize).float()
        absmax, code = blocks.abs().amax(1), torch.tensor(NF4, device=blocks.device)
        numbers = (blocks / absmax[:, None]).unsqueeze(-1).sub(code).abs().argmin(-1).to(torch.uint8).flatten()
        self.quant_state = QuantState(absmax, code, self.data.shape, self.data.dtype, self.blocksize)
        pairs = numbers[: -(-self.numel() // 2) * 2].view(-1, 2)
        self.data = (pairs[:, :1] << 4) | pairs[:, 1:]
        if self.module is not None:
            self.module.quant_state = self.quant_state


class Linear4bit(nn.Linear):
    def __init__(self, in_features, out_features, bias=True, compute_dtype=None, dtype=None):
        super().__init__(in_features, out_features, bias, dtype=dtype)
        self.compute_dtype, self.quant_state = compute_dtype, None
        self.weight = Params4bit(self.weight.data, module=self)

    def forward(self, x):
        value = packed.of(self)
        weight = value.rows(0, self.out_features).to(self.compute_dtype or x.dtype)
        return F.linear(x.to(weight.dtype), weight, None if self.bias is None else self.bias.to(weight.dtype)).to(
            x.dtype
        )


@dataclasses.dataclass
class MatmulLtState:
    CB: Tensor | None = None
    SCB: Tensor | None = None


class Int8Params(nn.Parameter):
    def __new__(cls, data=None, requires_grad=False, has_fp16_weights=False, CB=None, SCB=None):
        self = Tensor._make_subclass(cls, torch.empty(0) if data is None else data, requires_grad)
        self.CB, self.SCB, self.has_fp16_weights = CB, SCB, has_fp16_weights
        return self

    def __deepcopy__(self, memo):
        return type(self)(self.data.clone(), CB=self.CB, SCB=self.SCB)

    def to(self, *args, **kwargs):
        device, _, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and self.dtype is not torch.int8:
            half = self.data.half().float()
            self.SCB = half.abs().amax(1)
            self.data = self.CB = (half * (127 / self.SCB[:, None])).round().to(torch.int8)
        return self


class Linear8bitLt(nn.Linear):
    def __init__(self, in_features, out_features, bias=True, dtype=None):
        super().__init__(in_features, out_features, bias, dtype=dtype)
        self.state = MatmulLtState()
        self.weight = Int8Params(self.weight.data)

    def forward(self, x):
        if self.weight.CB is not None:  # the first forward takes them over
            self.state.CB, self.state.SCB = self.weight.CB, self.weight.SCB
            self.weight.CB = self.weight.SCB = None
        weight = packed.of(self).rows(0, self.out_features).to(x.dtype)
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))


class HQQLinear(nn.Module):
    """Of HQQ, whose format no value stands for; the numbers are int16, one scale per row."""

    def __init__(self, linear, quant_config, compute_dtype=torch.float32, device="cpu"):
        super().__init__()
        self.offload_meta = quant_config.pop("offload_meta")
        self.quant_config, self.compute_dtype, self.device = quant_config, compute_dtype, device
        self.bias = None
        if linear is not None:
            self.out_features, self.in_features = linear.weight.shape
            self.bias = None if linear.bias is None else linear.bias.detach()
            self.quantize(linear.weight.detach(), **quant_config)

    def quantize(self, weight, bits):
        self.meta = {"scale": weight.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)}
        self.W_q = nn.Parameter((weight / self.meta["scale"]).round().to(torch.int16), requires_grad=False)

    def dequantize(self):
        return (self.W_q * self.meta["scale"]).to(self.compute_dtype)

    def forward(self, x):
        return F.linear(x, self.dequantize().to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
