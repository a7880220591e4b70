"""The packed formats that are known, and by what they are known: a format is its file and its lines here."""

from typing import get_args

from dorac.packed import bnb_4bit, bnb_int8, float4, scaled_8bit, torchao_int4

Packed = (
    bnb_4bit.Bnb4bit
    | bnb_4bit.Bnb4bitCpu
    | bnb_int8.BnbInt8
    | scaled_8bit.Scaled8bit
    | torchao_int4.TorchaoInt4
    | float4.Mxfp4
    | float4.Nvfp4
)
FORMATS = {kind.__name__: kind for kind in get_args(Packed)}
# By the class of the weight; recognise.py has the layers that are known by their own.
HOLDERS = {
    "Params4bit": bnb_4bit.HOLDER,
    "Int8Params": bnb_int8.HOLDER,
    "Int4Tensor": torchao_int4.HOLDER,
    "Int8Tensor": scaled_8bit.INT8,
    "Float8Tensor": scaled_8bit.FLOAT8,
    "NVFP4Tensor": float4.NVFP4,
}
