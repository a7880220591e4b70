"""``DoraLayer``: what every adapted layer has: a frozen base layer, two factors, a magnitude, merge and unmerge."""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dorac import checks, functional, magnitudes, offload
from dorac.nn import merging, norm_cache, starts
from dorac.nn.compiled_norm import CompiledNorm
from dorac.nn.hyperparameters import DEFAULT_ALPHA, DEFAULT_R, check_hyperparameters, scaling_factor, settled
from dorac.nn.initialised import Initialised
from dorac.nn.keeper import KeptNorm
from dorac.nn.reads_base import ReadsBase
from dorac.nn.shelf import Shelved
from dorac.nn.stated import Stated, after_load
from dorac.nn.switched import Switched
from dorac.ops.norm import DEFAULT_BUDGET
from dorac.undo import Undo

if TYPE_CHECKING:
    from dorac.nn.tensor_parallel import Lasting, Shards


def parameter(module: nn.Module, name: str) -> Tensor | None:
    """``getattr(module, name)``, which takes ten times as long for a parameter."""
    own = module._parameters
    return own[name] if name in own else getattr(module, name)  # parametrised, or FSDP's


class DoraLayer(Switched, Initialised, ReadsBase, Stated):
    """A frozen base layer with its adapter. A subclass names its parameters, sees its weight as a matrix and runs.

    The factors and the magnitude are trained; the magnitude is float32 (float64 for a float64 layer) and stays so under
    ``.to(torch.bfloat16)``; what casts it otherwise is undone before it trains (:mod:`dorac.magnitudes`).

    State-dict keys are ``base_layer.*`` and those of ``PEFT_KEYS``. They do not tell whether
    the adapter is merged: save the state of an unmerged layer, or unload it. A layer can hold several adapters, one of
    them active, whose tensors its parameters are: see :func:`dorac.add_adapter`.

    Args:
        base_layer: the layer to adapt; kept, not copied.
        r: rank, at least 1.
        lora_alpha: the scaling is ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora``.
        lora_dropout: probability in [0, 1) with which elements of x are zeroed in training mode, for the adapter alone.
        dropout_on: what that is, "adapter" as in PEFT or "low_rank" at LoRA's price: see
            :func:`dorac.functional.dora_linear`. PEFT's config has no word for it: no adapter file says it.
        use_rslora: rank-stabilised scaling (arXiv 2312.03732).
        init_lora_weights: True: as PEFT; "gaussian": the factor that is not zero is normal; False: neither factor is
            zero, so that the adapter does something from the start.
        adapter_dtype: of the factors; None takes float32 for a half-precision or quantised layer, as PEFT, and the
            layer's dtype otherwise.
        norm_grad: whether gradient flows through the norm, see :func:`dorac.functional.norm_factored`.
        layout: what ``adapter_shapes`` of the subclass takes.

    Raises:
        TypeError: a layer that cannot be wrapped, with the reason; an adapter dtype that is not float16, bfloat16,
            float32 or float64; a ``norm_grad`` that is not a bool.
        ValueError: a rank below 1, a scaling that is not finite, a dropout outside [0, 1), another ``dropout_on``.

    Source: arXiv 2402.09353, section 4.1; the norm is a constant in backprop (section 4.3).
    """

    # The adapter's parameters (lora_A, lora_B, the magnitude, in this order) and the endings of PEFT's keys for them.
    PEFT_KEYS: ClassVar[dict[str, str]]
    # Of the adapter that is active; another rank is another adapter.
    r = settled("r", "add one of another rank with dorac.add_adapter, or wrap the base layer anew")
    lora_alpha = settled("lora_alpha", "set layer.scaling")
    use_rslora = settled("use_rslora", "set layer.scaling")
    # Bytes for the norm's buffers, the same wherever it is taken, so that g = 1 exactly at init.
    norm_budget: ClassVar[int] = DEFAULT_BUDGET
    # What merging has taken out of the base layer, where it is not written in place: see DoraQuantLinear.
    replaced_base: nn.Module | None = None

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        """Whether modules like this one are what the class adapts; :meth:`unwrappable` may still refuse this one."""
        raise NotImplementedError

    @classmethod
    def unwrappable(cls, module: nn.Module) -> str | None:
        """Why this class cannot wrap ``module``, or None if it can."""
        raise NotImplementedError

    @classmethod
    def unfit_rank(cls, base_layer: nn.Module, r: int) -> str | None:
        """Why an adapter around ``base_layer`` cannot have the rank ``r``, or None if it can."""
        return None

    @classmethod
    def layout_of(cls, base_layer: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, object]:
        """The options of :meth:`adapter_shapes` that tensors of an adapter, by the names of its parameters, ask for."""
        return {}

    @classmethod
    def adapter_shapes(cls, base_layer: nn.Module, r: int) -> dict[str, torch.Size]:
        """The shapes that the adapter's parameters would have around ``base_layer``, in the order of ``PEFT_KEYS``."""
        raise NotImplementedError

    @classmethod
    def takes_option(cls, name: str) -> bool:
        """Whether :meth:`adapter_shapes` takes an option of this name."""
        return name in inspect.signature(cls.adapter_shapes).parameters

    def __init__(
        self,
        base_layer: nn.Module,
        r: int = DEFAULT_R,
        lora_alpha: float = DEFAULT_ALPHA,
        *,
        lora_dropout: float = 0.0,
        dropout_on: str = "adapter",
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        adapter_dtype: torch.dtype | None = None,
        norm_grad: bool = False,
        **layout,
    ) -> None:
        super().__init__()
        if reason := self.unwrappable(base_layer):
            raise TypeError(f"base_layer cannot be wrapped: {reason}")
        r, lora_alpha, lora_dropout = check_hyperparameters(
            r, lora_alpha, lora_dropout, init_lora_weights, adapter_dtype, use_rslora
        )
        checks.check_dropout_on(dropout_on)
        checks.check_norm_grad(norm_grad)
        if reason := self.unfit_rank(base_layer, r):
            raise ValueError(reason)
        if unknown := [name for name in layout if not self.takes_option(name)]:
            raise TypeError(f"{type(self).__name__}() got an unexpected keyword argument {min(unknown)!r}")
        shapes = self.adapter_shapes(base_layer, r, **layout)
        self._adopt(base_layer)
        self._r, self._lora_alpha, self._use_rslora = r, lora_alpha, use_rslora
        self.lora_dropout = float(lora_dropout)
        self.dropout_on = dropout_on
        self.init_lora_weights = init_lora_weights
        self.norm_grad = norm_grad
        self._scaling = scaling_factor(r, lora_alpha, use_rslora)
        self.adapter_name = "default"  # of the adapter whose tensors are the layer's parameters
        self.adapters: dict[str, Shelved | None] = {self.adapter_name: None}  # see shelf.py
        self.switch(disabled=False)

        with offload.onloaded(base_layer):
            self._make_adapter(shapes, adapter_dtype)
        base_layer.requires_grad_(False)
        self._is_built = True

    def _make_adapter(self, shapes: Mapping[str, torch.Size], adapter_dtype: torch.dtype | None) -> None:
        """The adapter's parameters, with values and where the base weight is, and what is kept beside them."""
        weight, weight_dtype = self.weight, self._weight_dtype()
        if adapter_dtype is None:
            adapter_dtype = torch.promote_types(weight_dtype, torch.float32)
        wide = torch.promote_types(torch.promote_types(weight_dtype, adapter_dtype), torch.float32)
        for name, shape in shapes.items():
            dtype = wide if name.endswith("lora_magnitude_vector") else adapter_dtype
            with torch.inference_mode(False):  # what is made in inference mode could never be trained
                setattr(self, name, nn.Parameter(torch.empty(shape, dtype=dtype, device=weight.device)))
        # The norm before the merge while the base weight holds the merged one: what unmerging needs. Neither norm is a
        # buffer: AveragedModel pairs the buffers of a model and of its copy, which is not merged when the model is.
        self.merged_norm: Tensor | None = None
        self.kept: KeptNorm | None = None
        self.compiled_norm: CompiledNorm | None = None
        self.shards: Shards | None = None  # how dorac.parallel has spread it
        self.lasting: Lasting | None = None  # see tensor_parallel.py
        # See starts.py: the hook of an adapter without values, whether its magnitude was loaded, whether to_empty() has
        # left it empty (and sharded), and what load_state_dict brings while it runs.
        self.waiting: RemovableHandle | None = None
        self.magnitude_loaded = False
        self.emptied = self.emptied_sharded = False
        self.loading = starts.Loading()
        self.register_load_state_dict_post_hook(after_load)
        self.reset_parameters()
        if weight.is_meta:
            starts.wait(self)

    def _adopt(self, base_layer: nn.Module) -> None:
        """Takes the layer in, with what forward needs to know of it."""
        self.base_layer = base_layer

    def _matrix(self) -> Tensor:
        """The base weight as the ``[out, in]`` matrix that the norm is taken of: a view where there is one."""
        return self.base_layer.weight

    def _weight_dtype(self) -> torch.dtype:
        """What the dtypes of the adapter follow."""
        return self.weight.dtype

    def parts(self) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
        """What is merged, each with a norm of its own: its matrix, the factors and the magnitude of that."""
        return {"weight": (self._matrix(), *self._factors(), self._magnitude())}

    def write_part(self, name: str, matrix: Tensor) -> None:
        """Sets the base weight of a part from such a matrix."""
        self._matrix().copy_(matrix)

    def keep_base(self, log: Undo) -> None:
        """Tells the log of what merging and unmerging write of the base layer."""
        log.keep(*self.base_weights())

    def joined_norms(self, norms: list[Tensor]) -> Tensor:
        """The norms of the parts as one tensor, which :meth:`parted_norms` takes apart."""
        return norms[0]

    def parted_norms(self, norm: Tensor) -> list[Tensor]:
        return [norm]

    def _factors(self) -> tuple[Tensor, Tensor]:
        """The factors of the matrix, ``lora_A [r, in]`` and ``lora_B [out, r]``."""
        return self.lora_A, self.lora_B

    def _own_parameters(self) -> list[Tensor]:
        """The adapter's parameters, in the order of ``PEFT_KEYS``."""
        own = self._parameters
        return [own[name] if name in own else getattr(self, name) for name in self.PEFT_KEYS]  # as parameter()

    def base_weights(self) -> list[nn.Parameter]:
        """The parameters of the base layer that merging changes."""
        return [parameter(self._modules["base_layer"], "weight")]

    def named_base_weights(self) -> dict[str, nn.Parameter]:
        """Those of :meth:`base_weights` that are parameters of the base layer now, by their names in it."""
        names = {id(parameter): name for name, parameter in self.base_layer.named_parameters()}
        return {names[id(weight)]: weight for weight in self.base_weights() if id(weight) in names}

    def _magnitudes(self) -> list[nn.Parameter]:
        return [self.lora_magnitude_vector]

    def _magnitude_names(self) -> list[str]:
        return [name for name in self.PEFT_KEYS if name.endswith("lora_magnitude_vector")]

    def _widen_magnitudes(self) -> None:
        """Undoes casts below float32: see :mod:`dorac.magnitudes`."""
        for magnitude in self._magnitudes():
            magnitudes.widen(magnitude)

    def _magnitude(self) -> Tensor:
        """The magnitude of the matrix, ``[out]``."""
        return self.lora_magnitude_vector.flatten()

    def _norm(self) -> Tensor:
        """The norm that the magnitude is divided by, as many elements as it has."""
        operands = self.norm_operands()
        return functional.norm_factored(*operands, self.scaling, norm_grad=self.norm_grad, budget=self.norm_budget)

    def norm_operands(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """The matrix and the factors of the norm, or None where it is not that of one matrix."""
        return self._matrix(), *self._factors()

    def norm_inputs(self) -> tuple[Tensor, ...]:
        """The parameters that the norm depends on."""
        factors = self._own_parameters()
        del factors[2::3]  # magnitudes
        return *self.base_weights(), *factors

    def norm_holder(self) -> Self:
        return self

    def packed_base(self) -> nn.Module | None:
        """The base layer if its weight is packed, for :mod:`dorac.nn.norm_cache`."""
        return None

    def _known_norm(self) -> Tensor | None:
        """The cached norm, or None where forward has to take its own: see :mod:`dorac.nn.norm_cache`."""
        return norm_cache.known_norm(self)

    @property
    def scaling(self) -> float | Tensor:
        """s, a number or a 0-d tensor. Setting it refreshes a cached norm; a merged layer, to be unmerged, keeps it."""
        return self._scaling

    @scaling.setter
    def scaling(self, value: float | Tensor) -> None:
        if self.merged:
            raise ValueError("the adapter is merged; unmerge it before setting its scaling")
        value = checks.check_scaling(value)
        with Undo() as log:
            self.keep_norm(log)
            self._scaling = value
            norm_cache.refresh([self])

    @property
    def weight(self) -> nn.Parameter:
        """The base layer's weight, for code that asks a layer for its dtype or device."""
        return self.base_layer.weight

    @property
    def cannot_cache(self) -> str | None:
        """See keeper.Keeper."""
        return offload.UNKEPT if offload.is_on_disk(self.base_layer) or offload.is_on_disk(self) else None

    @property
    def merged(self) -> bool:
        """Whether the base weight holds ``g * (W + s * lora_B @ lora_A)``."""
        return self.merged_norm is not None

    def cannot_merge(self) -> str | None:
        """Why the adapted weight has no place in the base layer, or None if it has."""
        if offload.is_on_disk(self.base_layer):
            return offload.ON_DISK
        own = {id(parameter) for parameter in self.base_layer.parameters()}
        if all(id(weight) in own for weight in self.base_weights()):
            return None
        return "the base layer's weight is computed since it was wrapped (parametrised or pruned): remove that first"

    def merge(self) -> None:
        """Writes the adapted weight into the base layer; a second call does nothing.

        Raises:
            ValueError: :meth:`cannot_merge`; the merged weight would not be finite in its dtype. Then, and whatever
                else is raised, the layer is what it was.
        """
        if not self.merged:
            starts.settle(self)
            norms = merging.decide_merge(self)
            with Undo() as log:
                merging.write_merged(self, norms, log)

    def unmerge(self) -> None:
        """Takes the adapter out of the base weight again, to ``2 eps * max(|V|, |W|)``; nothing if it is not merged.

        Raises:
            ValueError: rows whose g is zero cannot be restored. Then, and whatever else is raised, the layer is what it
                was.
        """
        if self.merged:
            merging.decide_unmerge(self)
            with Undo() as log:
                merging.write_unmerged(self, log)

    def keep_norm(self, log: Undo) -> None:
        """Tells the log of all that refreshing a cached norm changes, and of the layer's attributes."""
        log.keep_module(self)
        log.keep(norm_cache.kept_norm(self))

    def _apply(self, fn, recurse=True):
        """Moves and casts as any module, but never casts the magnitude (or the norm before a merge) below float32.

        A cached norm is taken anew, of the parameters as they are then.
        """
        values = starts.before_move(self)
        shelved = [adapter for adapter in self.adapters.values() if adapter is not None]
        own = [*self._magnitudes(), *(adapter._parameters[m] for adapter in shelved for m in self._magnitude_names())]
        move = magnitudes.never_narrower(fn, self.merged_norm, *(t for m in own for t in (m, m.grad)))

        norm_cache.suspend([self])  # until all is moved: an exception in between leaves no norm of other tensors
        self.lasting = None  # torch refuses to swap DTensors that a graph has for leaves
        super()._apply(move, recurse)
        for adapter in shelved:
            adapter.move(move)
        starts.after_move(self, values)
        if self.merged_norm is not None:
            self.merged_norm = move(self.merged_norm)
        self._keep_parts()
        norm_cache.refresh([self])
        return self

    def train(self, mode: bool = True) -> Self:
        """As any module; what is written to parameters around such a change (averages of them) leaves no trace."""
        starts.settle(self)
        if mode != self.training:
            norm_cache.doubt([self])
        if mode:
            self._widen_magnitudes()
        return super().train(mode)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name in ("scaling", "strength"):  # torch's assignment of a parameter passes by the property
            raise TypeError(f"{name} must be a number or a 0-d float tensor, got an nn.Parameter: give a tensor of it")
        super().register_parameter(name, param)

    def _keep_parts(self) -> None:
        """See :class:`dorac.nn.tensor_parallel.Lasting`."""
        if self.shards is not None:
            from dorac.nn.tensor_parallel import keep_parts  # which imports torch.distributed

            keep_parts(self)

    def extra_repr(self) -> str:
        dropout = f"lora_dropout={self.lora_dropout:g}"
        if self.dropout_on != "adapter":
            dropout += f", dropout_on={self.dropout_on}"
        strength = "" if self._strength is None else f", strength={self.strength:g}"
        which = f"{self.adapter_name} of {', '.join(self.adapters)}" if len(self.adapters) > 1 else None
        adapters = f", adapter={which}" if which else ""
        return f"r={self.r}, scaling={self.scaling:g}{strength}, {dropout}, merged={self.merged}{adapters}"
