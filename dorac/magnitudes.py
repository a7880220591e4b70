"""A trained magnitude is float32, whoever casts the model: an optimizer's steps are below what bfloat16 resolves.

The law, for ``dorac.nn`` and the drop-in:

- casts through modules (``model.half()``, ``.to(torch.bfloat16)``) leave a magnitude as wide as it is;
- one that is in half precision all the same (``param.data = ...``, ``autocast_adapter_dtype=False``, a half-precision
  checkpoint) becomes float32 in place at the next ``train()``, loading, or forward in training, the same Parameter for
  whoever holds it; what the cast has rounded stays rounded;
- DeepSpeed's and FSDP's own (in parts, or views of a flat buffer, over masters of their own) are left to them;
- where ``DistributedDataParallel`` or a live graph holds its gradient accumulator, changing its dtype would lose its
  gradient: a warning says what to do;
- frozen magnitudes, inference, compiled code and transforms change nothing.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dorac import callers
from dorac.ops import front

HALF = (torch.bfloat16, torch.float16)


def never_narrower(fn: Callable[[Tensor], Tensor], *kept: Tensor | None) -> Callable[[Tensor], Tensor]:
    """The ``fn`` of ``nn.Module._apply``, moving as ever, but casting none of ``kept`` below float32."""

    def move(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        keep = moved.dtype.itemsize < 4 and any(tensor is t for t in kept)
        return tensor.to(moved.device) if keep else moved

    return move


def widen(magnitude: Tensor | None) -> None:
    """Makes a trained half-precision magnitude, and its gradient, float32 in place, where that is safe.

    Warns:
        RuntimeWarning: it is not, since DistributedDataParallel or a live graph holds the gradient accumulator.
    """
    if magnitude is None or magnitude.dtype not in HALF or not magnitude.requires_grad or not front.unobserved():
        return
    if type(magnitude) is not nn.Parameter or _is_managed(magnitude) or torch.is_inference_mode_enabled():
        return
    if _is_accumulated(magnitude):
        callers.warn(
            f"a DoRA magnitude is trained in {magnitude.dtype}, which rounds an optimizer's steps away, and cannot be "
            "made float32 here, since DistributedDataParallel or a graph that is still alive holds it. Call "
            "model.train() (trainer.model.train()) between the cast and the wrapping, or cast no magnitude: leave out "
            "parameters with 'lora_magnitude_vector' in their names",
        )
        return
    grad, magnitude.grad = magnitude.grad, None
    magnitude.data = magnitude.data.float()
    if grad is not None:
        magnitude.grad = grad.float()


def _is_managed(magnitude: Tensor) -> bool:
    """Whether it is in parts (DeepSpeed ZeRO-3), or lies in a larger buffer that somebody else writes to."""
    return hasattr(magnitude, "ds_id") or magnitude.untyped_storage().nbytes() != magnitude.nbytes


@torch.enable_grad()
def _is_accumulated(magnitude: Tensor) -> bool:
    """Whether somebody holds the node that accumulates its gradient: a new dtype gives it another one."""

    def node():
        return magnitude.view_as(magnitude).grad_fn.next_functions[0][0]

    node().metadata["dorac"] = None  # gone with the node, unless somebody else keeps that
    return node().metadata.pop("dorac", node) is None
