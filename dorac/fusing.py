"""``fuse`` and ``unfuse``: the attention and MLP blocks of a model computed as blocks, not layer by layer."""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from torch import nn

from dorac.hooks import unhooked
from dorac.nn import DoraLinear, blocks, linear4bit, shared
from dorac.undo import Undo
from dorac.wrapped import bare


@dataclasses.dataclass(frozen=True, repr=False)
class Fusion:
    """What :func:`fuse` did: printed, one line for every kind of block, and one for every reason.

    Attributes:
        fused: from the names of the modules that compute their layers together to what they are.
        left: from the names of the modules with adapted linear layers that go on as they were to the reason.
    """

    fused: Mapping[str, str]
    left: Mapping[str, str]

    def __repr__(self) -> str:
        return "\n".join([*_lines("fused", self.fused), *_lines("left", self.left)])


def _lines(title: str, names: Mapping[str, str]) -> Iterator[str]:
    if not names:
        yield f"{title}: nothing"
    grouped: dict[str, list[str]] = {}
    for name, what in names.items():
        grouped.setdefault(what, []).append(name or "the model itself")
    for what, found in grouped.items():
        others = f" and {len(found) - 1} more" if len(found) > 1 else ""
        yield f"{title}: {found[0]}{others}: {what}"


def fuse(model: nn.Module) -> Fusion:
    """Computes the adapted layers of attention and MLP blocks together: less memory and less time in eager training.

    An MLP, ``down(act(gate(x)) * up(x))`` or ``down(act(up(x)))``, becomes one
    :func:`dorac.functional.dora_mlp`. Of an attention q, k and v become one :func:`dorac.functional.dora_linears`, or
    those of them that are adapted; its forward stays, and the first projection that it calls computes them all. Blocks
    are told by what they compute, not by their class: an MLP by a run of its forward with stand-ins for its children,
    an attention by the names of its projections (q_proj, k_proj, v_proj; q, k, v; query, key, value) and in each call
    by whether they get the very same x. So all families of transformers are covered that are written like this, and
    whatever computes something else in between is not.

    Parameters, names and state dicts stay as they are, and so do saving, merging and switching. The values are those of
    the layers to a rounding; only dropout differs, whose mask is one for all projections of one x. :func:`unfuse` takes
    it back. Deep copies and pickles of a fused model are fused.

    Under FSDP2 the blocks of a unit are computed as without it. So are blocks that :mod:`dorac.parallel` has spread (q,
    k, v, gate and up by their outputs, down by its inputs), on each rank's parts, with one sum of a block's gradients;
    with dropout active these call their layers.

    A block runs its layers one by one, with the right answer, wherever they cannot be computed together at the time of
    a call: a layer is merged, switched off, hooked, offloaded or sharded otherwise, has several active adapters or
    ``norm_grad``, dropout of the block's own is active between an MLP's layers, q, k and v get other inputs, or
    ``torch.inference_mode`` hides whether an attention's input was written to. Compiled code runs the layers one by
    one, too, in the same graph as without: there the compiler fuses what lies between them.

    Of quantised layers bitsandbytes' ``Linear4bit`` (nf4, fp4) are fused, which multiply by their dense weight, and in
    calls where that is all that they do: their ``compute_dtype`` is the dtype that the weight had and, under autocast,
    autocast's; x has it, too, or is float32 under autocast, as ``prepare_model_for_kbit_training`` of PEFT's makes it
    (the result is then float32 as the layers', rounded to that dtype); on a GPU without gradients, more than 128
    tokens; on a CPU, where the library packs weights anew in eval mode, x has a gradient. All other quantised layers go
    on as they were.

    Args:
        model: with layers of ``dorac.nn``, or of PEFT's under :func:`dorac.peft.enable`. A second call looks again,
            after layers were added or hooks taken off.

    Returns:
        What was fused, and what was left and why: modules with hooks on their layers, a patched forward or another
        class of adapted layers, and those that are no such block. Print it.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: no adapted linear layer in it. The model is then unchanged.
    """
    model = bare(model)
    holders = {name: module for name, module in model.named_modules() if any(map(_is_adapted, module.children()))}
    holders = {name: module for name, module in holders.items() if not _is_adapted(module)}
    if not holders:
        raise ValueError(
            f"{type(model).__name__} holds no module with adapted linear layers; wrap it with dorac.apply_dora first, "
            "or give a model of PEFT's to dorac.peft.enable"
        )
    fused, left = {}, {}
    with Undo() as log:
        for name, module in holders.items():
            found = _look(module)
            if isinstance(found, str):
                left[name] = found
                blocks.restore([module], log)
            else:
                fused[name] = found.what
                found.write(module, log=log)
    return Fusion(fused, left)


def unfuse(model: nn.Module) -> None:
    """Lets the modules of ``model`` call their layers one by one again, as before :func:`fuse`; else does nothing.

    Raises:
        TypeError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}")
    with Undo() as log:
        blocks.restore([*model.modules()], log)


def _is_adapted(module: nn.Module) -> bool:
    """Whether it is an adapted linear layer, of any class."""
    if type(module) in shared.classes or isinstance(module, DoraLinear):
        return True
    variants = sys.modules.get("dorac.peft.variants")  # whoever enabled the drop-in has imported it
    if variants is None or not hasattr(module, "lora_variant"):
        return False
    return any(isinstance(variant, variants.DoraLinearVariant) for variant in module.lora_variant.values())


def _kind(layer: nn.Module) -> str:
    """Its class, and that of the quantised layer below it."""
    kind, base = type(layer).__name__, _base(layer)
    return kind if base is layer or type(base) is nn.Linear else f"{kind} over {type(base).__name__}"


def _base(layer: nn.Module) -> nn.Module:
    return layer._modules.get("base_layer", layer)


@dataclasses.dataclass(frozen=True)
class _Found:
    what: str
    write: Callable[..., None]  # of the module, and a log


def _look(module: nn.Module) -> _Found | str:
    """What block a module is, or why its layers have to be called by themselves."""
    if "forward" in vars(module):
        return "it has a forward of its own (patched, or put there by accelerate's hooks)"
    roles = blocks.mlp(module)
    if not isinstance(roles, str) and roles.is_joined and linear4bit.is_stock(_base(module._modules[roles.up])):
        return f"{roles.up} is quantised, and gate and up are parts of it"
    if not isinstance(roles, str):
        called = *roles.linears, *([] if roles.act is None else [roles.act]), *roles.between
        found = _Found(str(roles), partial(blocks.fuse_mlp, roles=roles))
    else:
        others = (name for name, m in module.named_children() if _is_adapted(m) and not shared.is_fusable(m))
        if (name := next(others, None)) is not None:
            return f"{name} is a {_kind(module._modules[name])}, which computes its product itself"
        block = blocks.projections_of_one(module)
        if isinstance(block, str):
            is_like_mlp = block == blocks.NOT_KNOWN and sum(map(blocks.is_linear, module.children())) > 1
            return roles if is_like_mlp else block
        called = block[0]
        found = _Found(f"{', '.join(called)} of one input", partial(blocks.fuse_attention, block=block))
    for name in called:
        if getattr(module._modules[name], "waiting", None) is not None:  # by a hook of its own
            return f"{name} has no values yet: load them, and call fuse again"
        if not unhooked(module._modules[name]):
            return f"{name} has hooks or a patched forward, which have to run"
    return found
