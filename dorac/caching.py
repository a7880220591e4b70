"""``cache_norms``: norms computed once per optimizer step instead of in every forward."""

import weakref
from typing import Self

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from dorac.apply import bare, require_layers
from dorac.nn import DoraLayer, norm_cache


def cache_norms(model: nn.Module, *, debug: bool = False) -> "NormCache":
    """Keeps the norm of every DoRA layer of ``model`` from one optimizer step to the next; forward computes none.

    Results are the same, bit for bit wherever the norm is an op of its own (in eager, and compiled): forward reads what
    it would have computed. Gradient accumulation, activation checkpointing and inference pay for no norm.

    The norms are taken anew after the step of any ``torch.optim`` optimizer that holds parameters of theirs, after
    ``load_state_dict`` of a layer or of what holds it, :func:`dorac.load_adapter`, ``reset_parameters``, unmerging,
    setting a layer's ``scaling``, and moves and casts. After any other write (``p.data.add_``, an update of your own
    under ``no_grad``, an optimizer that steps copies of the parameters) call ``refresh()``.

    Where the parameters are not the layer's own (``torch.func.functional_call``, FSDP), within a step that is given a
    closure, in exported programs, and once a base weight requires a gradient, forward computes the norm as without a
    cache; so do copies and pickles of the model.

    Args:
        model: with DoRA layers, none of them cached already; trained or not, compiled before or afterwards.
        debug: every forward takes the norm and compares, in eager; with ``torch.compile(fullgraph=True)`` it raises.

    Returns:
        The :class:`NormCache`. It may be dropped: the norms stay cached.

    Raises:
        ValueError: no DoRA layer in the model; layers whose norms cannot be cached, by name with the reason (a base
            weight or the norm itself is trained; sharded parameters; cached already). The model is then unchanged.
    """
    return NormCache(require_layers(bare(model)), debug=debug)


class NormCache:
    """The cached norms of a model, made by :func:`cache_norms`. As a context manager it removes itself at the end."""

    def __init__(self, layers: dict[str, DoraLayer], *, debug: bool) -> None:
        refused = {name or type(layer).__name__: norm_cache.uncacheable(layer) for name, layer in layers.items()}
        refused = {name: reason for name, reason in refused.items() if reason}
        if refused:
            listed = "\n  ".join(f"{name}: {reason}" for name, reason in refused.items())
            raise ValueError(f"norms that cannot be cached:\n  {listed}")
        self._layers = weakref.WeakValueDictionary(layers)  # the hooks are global and must not keep the model alive
        self._hooks = []
        try:
            norm_cache.start(layers.values(), debug=debug)
            # They read ids, which does not trace; the graph of a compiled step breaks around the update at any rate.
            before, after = (torch.compiler.disable(hook) for hook in (self._before_step, self._after_step))
            self._hooks.append(register_optimizer_step_pre_hook(before))
            self._hooks.append(register_optimizer_step_post_hook(after))
        except BaseException:
            self.remove()
            raise

    def refresh(self) -> None:
        """Takes all norms anew: after writes to parameters that :func:`cache_norms` does not hear of."""
        norm_cache.refresh(self._layers.values())

    def check(self) -> None:
        """Recomputes every norm and compares. Waits for the device.

        Raises:
            RuntimeError: norms that a forward would use are not the present ones; the layers are named.
        """
        stale = [name or type(layer).__name__ for name, layer in self._layers.items() if norm_cache.is_stale(layer)]
        if stale:
            raise RuntimeError(norm_cache.STALE.format(", ".join(stale)))

    def remove(self) -> None:
        """Lets forward compute the norms again; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        norm_cache.stop(self._layers.values())
        self._layers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _stepped(self, optimizer: Optimizer) -> list[DoraLayer]:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return [layer for layer in self._layers.values() if any(id(t) in held for t in layer.norm_inputs())]

    def _before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is not None:  # it may run the model between two changes of the parameters
            norm_cache.suspend(self._stepped(optimizer))

    def _after_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        norm_cache.refresh(self._stepped(optimizer))
