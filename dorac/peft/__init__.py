"""PEFT's DoRA on dorac: ``dorac.peft.enable()`` once, and ``LoraConfig(use_dora=True)`` models run on its functions.

    dorac.peft.enable()                         # what PEFT builds from now on
    dorac.peft.enable(model)                    # or one model that is built already
    with dorac.peft.enable(model): ...          # or for a while

The layer classes carry PEFT's names, signatures and attributes and can be used by themselves. PEFT is imported when one
of them is first asked for, or by :func:`enable`.
"""

from dorac.peft.switch import SUPPORTED, disable, enable, require_peft

_LAYERS = (
    "DoraConv1dLayer",
    "DoraConv2dLayer",
    "DoraConv3dLayer",
    "DoraEmbeddingLayer",
    "DoraLinearLayer",
    "_DoraConvNdLayer",
)
__all__ = ["SUPPORTED", "disable", "enable", *_LAYERS]


def __getattr__(name: str):
    if name not in _LAYERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_peft()
    from dorac.peft import dora

    return getattr(dora, name)
