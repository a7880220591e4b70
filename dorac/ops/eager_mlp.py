"""An MLP of adapted layers in eager on a GPU with kernels, ``down(act(gate(x)) * up(x))``: one ``autograd.Function``.

gate and up are as in ``ops/eager_linears.py``: their factors A follow one another, ``h = x A^T`` is one product. What
joins the layers is one kernel in either direction (``kernels/mlp.py``, ``mlp_backward.py``):

- Forward writes ``inner = x W^T + s h lora_B^T`` of gate and up over the products and keeps these two. z, what goes
  into down, is not kept.
- Backward computes gate, up and z of them again, and writes the gradients of both products, the second over that of z.
  In the same pass go the magnitudes' gradients, and up to a rank those of gate's and up's lora_B and down's lora_A. As
  inner is kept, no magnitude is too small for its gradient, and no bias is too large.
- Unless backward is asked to keep the graph, gradients are written over what was kept, and take no memory of their own.
- The gradient of x is accumulated inside the products with the weights.

It takes adapters that are trained whole over frozen weights, all of them, or no training at all, without dropout.
Where a mode over ops is active in training, the same Function goes through the ops, and saves the same tensors. Second
derivatives are those of the layers one by one, computed again. Packed weights are made dense for each product.

Legend: T tokens, I in_features, F features between the layers, O out_features, R rank. A layer's tensors are in the
order of ``ops/eager_linears.py``; the three layers' follow one another, gate's are None where there is none.
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dorac.numerics import LARGEST_SCALING
from dorac.ops import eager, eager_seen, front, linear_leaves, mlp
from dorac.ops.eager_linears_plan import BIAS, LORA_A, LORA_B, MAGNITUDE, NORM, TENSORS, WEIGHT
from dorac.ops.eager_mlp_plan import (
    DOWN,
    GATE,
    UP,
    Plan,
    cast_factors,
    for_products,
    in_order,
    layers_of,
    make_plan,
    of_one,
)
from dorac.ops.packed_product import Held, backward_dense, forward_dense


def dora_mlp(
    x: Tensor,
    gate: tuple | None,
    up: tuple,
    down: tuple,
    activation: str,
    check: Callable[[], object],
    apply: Callable | None = None,
) -> Tensor | None:
    """The MLP, or None if it is not to be computed here.

    Args:
        gate, up, down: the layer's tensors, its scaling and probability of dropout; what follows is not looked at.
        check: raises the error of tensors that cannot work; called once for each combination of metadata.
        apply: of whoever trains the adapters under other names (``eager_parts.py``), in the place of ``MLP.apply``.
    """
    in_ops = not front.unobserved()
    if in_ops and not front.seen_by_modes_alone():
        return None
    tensors, scalings, bits = [], [], 0
    try:
        device = x.device
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        key = ["mlp", activation, torch.is_grad_enabled(), autocast]
        key += type(x), x.shape, x.dtype, device, x.requires_grad
        for projection in (gate, up, down):
            if projection is None:
                key.append(None)
                tensors += _NO_LAYER
                scalings.append(1.0)
                continue
            weight, lora_A, lora_B, magnitude, bias, norm, scaling, dropout_p, *_ = projection
            if type(scaling) not in (float, int) or not abs(scaling) <= LARGEST_SCALING:
                return None
            if type(dropout_p) not in (float, int) or dropout_p != 0:
                return None
            if isinstance(weight, tuple):  # a packed one
                weight = Held(weight)
            for t in (weight, lora_A, lora_B, magnitude, bias, norm):
                tensors.append(t)
                if t is None:
                    key.append(None)
                elif type(t) is Held:
                    key.append(t.key)
                else:
                    key += type(t), t.shape, t.dtype, t.device, t.stride(), t.requires_grad
                    bits |= t.data_ptr()
            scalings.append(float(scaling))
        key = tuple(key)
        plan = eager.plans.get(key, False)
        x.data_ptr()
    except (AttributeError, RuntimeError, TypeError):  # no tensor, or one of no strides, symbolic sizes or no memory
        return None
    if plan is False:
        check()
        with torch._C._DisableTorchDispatch():  # a mode would see it in the first call alone
            plan = eager.keep_plan(key, make_plan(x, tensors, activation))
    if plan is None or (in_ops and not plan.training):
        return None
    if bits & 15:  # plans are for tensors aligned to 16 bytes
        return None
    if x.dtype is not plan.dtype:
        x = x.to(plan.dtype)
    if not plan.training:
        return _without_autocast(plan, x, scalings, tensors)[0]
    if in_ops:
        plan = dataclasses.replace(plan, in_ops=True)
    return (apply or _apply)(x, scalings, plan, *tensors)


_NO_LAYER = (None,) * TENSORS


def _forward(plan, x, scalings, tensors):
    """y; what holds the cast factors; the norms; h of gate and up together, and of down; inner of each in training."""
    gate, up, down = layers = layers_of(tensors)
    cast, factors = cast_factors(plan, in_order(layers))
    a, b_gate, b_up, a_down, b_down = for_products(plan, factors, cast)
    norms = [
        eager.computed_norm(dora, layer[WEIGHT], layer[LORA_A], layer[LORA_B], s)
        if dora is not None and layer[NORM] is None
        else layer[NORM]
        for dora, layer, s in zip(plan.dora, layers, scalings, strict=True)
    ]
    rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    h = None if a is None else torch.mm(rows, a.t())
    inner_gate = None if gate[WEIGHT] is None else torch.mm(rows, forward_dense(gate[WEIGHT], plan.dtype).t())
    inner_up = torch.mm(rows, forward_dense(up[WEIGHT], plan.dtype).t())
    if h is not None and not plan.inside:
        for inner, columns, b, s in zip(
            (inner_gate, inner_up), _split(plan, h), (b_gate, b_up), scalings, strict=False
        ):
            if b is not None:
                inner.addmm_(columns, b.t(), alpha=s)
    z = torch.empty_like(inner_up) if plan.training else inner_up
    plan.join(
        *(inner_up, inner_gate, h, b_gate, b_up),
        *(gate[MAGNITUDE], norms[GATE], gate[BIAS], up[MAGNITUDE], norms[UP], up[BIAS]),
        *(scalings[GATE], scalings[UP], z),
    )
    weight, _, _, magnitude, bias, _ = down
    weight, h_down, inner_down = forward_dense(weight, plan.dtype), None, None
    if plan.dora[DOWN] is None:
        y = F.linear(z, weight, bias)
        if a_down is not None:
            h_down = torch.mm(z, a_down.t())
            y.addmm_(h_down, b_down.t(), alpha=scalings[DOWN])
    else:
        h_down, y = torch.mm(z, a_down.t()), torch.mm(z, weight.t())
        del weight, z
        if plan.training:
            inner_down, y = y, torch.empty_like(y)
        base = y if inner_down is None else inner_down
        plan.dora[DOWN].compose(base, h_down, b_down, magnitude, norms[DOWN], scalings[DOWN], bias, y, inner_down)
    # Nobody has it, so that y is no view, which autograd would not let a consumer write to.
    y = y if x.dim() == 2 else _unsafe_view(y, (*x.shape[:-1], y.shape[1]))
    return y, cast, norms, h, h_down, (inner_gate, inner_up, inner_down)


_without_autocast = eager.without_autocast(_forward)


_unsafe_view = torch.ops.aten._unsafe_view


def _split(plan: Plan, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Of gate and of up; nothing of a layer without factors."""
    return columns.split(plan.ranks[:DOWN], 1)


def _forward_in_ops(plan, x, scalings, tensors):
    """:func:`_forward` in what modes see."""
    layers = layers_of(tensors)
    with front.autocast_off(x):
        gate, up, down = ((forward_dense(layer[WEIGHT], plan.dtype), *layer[1:]) for layer in layers)
        cast, factors = cast_factors(plan, in_order(layers))
        a, b_gate, b_up, a_down, b_down = for_products(plan, factors, cast)
        a_of = (None, None) if a is None else a.split(plan.ranks[:DOWN])
        rows = x.reshape(-1, x.shape[-1])
        _, n_gate, h_gate, inner_gate = mlp.layer_forward(rows, gate, a_of[GATE], b_gate, scalings[GATE])
        _, n_up, h_up, inner_up = mlp.layer_forward(rows, up, a_of[UP], b_up, scalings[UP])
        hs = [t for t in (h_gate, h_up) if t is not None]
        h = torch.cat(hs, 1) if hs else None
        gated = None if inner_gate is None else mlp.scaled(inner_gate, gate[MAGNITUDE], n_gate, gate[BIAS])
        z = mlp.joined(plan.activation, gated, mlp.scaled(inner_up, up[MAGNITUDE], n_up, up[BIAS])).to(plan.dtype)
        y, n_down, h_down, inner_down = mlp.layer_forward(z, down, a_down, b_down, scalings[DOWN])
        y = _unsafe_view(y, (*x.shape[:-1], y.shape[1]))
    inner_down = None if plan.dora[DOWN] is None else inner_down
    return y, cast, [n_gate, n_up, n_down], h, h_down, (inner_gate, inner_up, inner_down)


class MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scalings, plan, *tensors):
        forward = _forward_in_ops if plan.in_ops else _without_autocast
        y, cast, norms, h, h_down, inners = forward(plan, x, scalings, tensors)
        layers = layers_of(tensors)
        trained = [t for layer in layers for t in layer[LORA_A : MAGNITUDE + 1] if t is not None]
        ctx.trained = None
        if all(t.is_leaf for t in trained):  # the graph holds them in any case
            ctx.trained, ctx.versions = trained, [t._version for t in trained]
            trained = ()
        weights = [layer[WEIGHT] for layer in layers]
        ctx.held = [weight if type(weight) is Held else None for weight in weights]  # not saved
        weights = [None if type(weight) is Held else weight for weight in weights]
        frozen = *weights, *(layer[BIAS] for layer in layers)
        ctx.save_for_backward(x, cast, h, h_down, *inners, *norms, *frozen, *trained)
        ctx.set_materialize_grads(False)
        ctx.scalings, ctx.plan = scalings, plan
        ctx.overwrites, ctx.overwritten = not plan.in_ops and front.saves_for_itself(), False
        return y

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        if front.autocast_dtype(dy) is not None:  # backward inside autocast: products stay in the layers' dtype
            with front.autocast_off(dy):
                return MLP.backward(ctx, dy)
        in_ops = not front.unobserved()
        if torch.is_grad_enabled() or type(dy) is not Tensor or (in_ops and not front.seen_by_modes_alone()):
            return _gradients_again(ctx, dy)
        return _gradients(ctx, dy, in_ops)


# ``MLP.apply`` without its questions; see ops/eager.py.
_apply = super(torch.autograd.Function, MLP).apply


def _saved(ctx) -> tuple:
    """x; what holds the cast factors; h; inner; and the layers' tensors, norms and what holds packed weights there."""
    plan, (x, cast, h, h_down, *kept) = ctx.plan, ctx.saved_tensors
    if ctx.overwritten:  # by a backward pass that raised before its end
        raise RuntimeError("backward through an MLP of DoRA layers a second time: what it had saved is overwritten")
    inners, norms, frozen, saved = kept[:3], kept[3:6], kept[6:12], kept[12:]
    rest = iter(saved or eager_seen.unchanged(ctx))
    layers = []
    for i, norm in enumerate(norms):
        a, b = (next(rest), next(rest)) if plan.ranks[i] else (None, None)
        magnitude = None if plan.dora[i] is None else next(rest)
        layers.append((ctx.held[i] or frozen[i], a, b, magnitude, frozen[3 + i], norm))
    return x, cast, (h, h_down), inners, layers


def _for_kernel(tensor: Tensor | None) -> Tensor | None:
    """What a hook on saved tensors gave back, where it is not as it was."""
    if tensor is None or (tensor.is_contiguous() and not tensor.data_ptr() % 16):
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _gradients(ctx, dy: Tensor, in_ops: bool) -> tuple[Tensor | None, ...]:
    plan, scalings = ctx.plan, ctx.scalings
    x, cast, (h, h_down), inners, layers = _saved(ctx)
    factors = of_one(cast, in_order(layers))
    a, b_gate, b_up, a_down, b_down = for_products(plan, factors, cast)
    gate, up, down = layers
    rows, dy = (t if t.dim() == 2 else t.reshape(-1, t.shape[-1]) for t in (x, dy))
    grads: list[list[Tensor | None]] = [[None] * TENSORS for _ in layers]
    needs_x, needs_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[3 + BIAS :: TENSORS]
    if needs_bias[DOWN]:
        grads[DOWN][BIAS] = dy.sum(0, dtype=torch.float32).to(down[BIAS].dtype)

    overwrites = not in_ops and ctx.overwrites and not front.keeps_graph()
    ctx.overwritten = overwrites
    tensors = dy, h_down, inners[DOWN], b_down
    d_base, d_h_down = _through_down(plan, down, *tensors, scalings[DOWN], grads[DOWN], in_ops, overwrites)
    if d_h_down is None:
        dz = torch.mm(d_base, backward_dense(down[WEIGHT], plan.dtype))
    else:
        dz = _added(torch.mm(d_h_down, a_down), d_base, backward_dense(down[WEIGHT], plan.dtype), in_ops)
    del d_base
    arguments = plan, layers, dz, inners, h, d_h_down, scalings, needs_bias, grads
    if in_ops:
        d_gate, d_up, z = _join_in_ops(*arguments)
    else:
        d_gate, d_up, z = _join_backward(*arguments, overwrites)
    del dz, inners, arguments
    if z is not None:
        grads[DOWN][LORA_A] = eager.wide_mm(d_h_down.t(), z, down[LORA_A].dtype)
    del z

    d_h, dx = None if h is None else h.new_empty(h.shape), None
    for i, (d_base, b) in enumerate(((d_gate, b_gate), (d_up, b_up))):
        if b is None:
            continue
        if grads[i][LORA_B] is None:
            grads[i][LORA_B] = eager.wide_mm(d_base.t(), _split(plan, h)[i], layers[i][LORA_B].dtype).mul_(scalings[i])
        unread = eager.scalar(d_base.dtype, d_base.device)
        torch.addmm(unread, d_base, b, beta=0, alpha=scalings[i], out=_split(plan, d_h)[i])
    if d_h is not None:
        factors = [layer[LORA_A] for layer in (gate, up) if layer[LORA_A] is not None]
        wide = max((t.dtype for t in factors), key=lambda dtype: dtype.itemsize)
        d_a = eager.wide_mm(d_h.t(), rows, wide)
        for i, part in enumerate(d_a.split(plan.ranks[:DOWN])):
            if plan.ranks[i]:
                grads[i][LORA_A] = part.to(layers[i][LORA_A].dtype)
    if needs_x:
        for d_base, matrix in ((d_h, a), (d_gate, gate[WEIGHT]), (d_up, up[WEIGHT])):
            if d_base is not None:
                matrix = backward_dense(matrix, plan.dtype)
                dx = torch.mm(d_base, matrix) if dx is None else _added(dx, d_base, matrix, in_ops)
        dx = dx.view(x.shape)
    return dx, None, None, *(grad for of_layer in grads for grad in of_layer)


def _added(onto: Tensor, left: Tensor, right: Tensor, in_ops: bool) -> Tensor:
    """``onto + left @ right``, where it lies; counters of operations do not know that."""
    return torch.addmm(onto, left, right) if in_ops else onto.addmm_(left, right)


def _through_down(plan, down, dy, h, inner, b, scaling, grads, in_ops, overwrites):
    """The gradients of the product ``z W^T`` and of h; those of lora_B and magnitude into ``grads``."""
    _, _, lora_B, magnitude, _, norm = down
    if b is None:
        return dy, None
    unread = eager.scalar(dy.dtype, dy.device)
    if magnitude is None:
        d_base = dy
        grads[LORA_B] = eager.wide_mm(dy.t(), h, lora_B.dtype).mul_(scaling)
    elif in_ops:
        s = torch.full((), scaling, dtype=torch.float32, device=dy.device)
        d_base, grads[MAGNITUDE], d_b = linear_leaves.lora_b_backward(dy, inner, magnitude, norm, h, s, False, False)
        grads[LORA_B] = d_b.to(lora_B.dtype)
    else:
        if dy.data_ptr() % 16:
            dy = dy.clone(memory_format=torch.contiguous_format)
        launches = plan.dora[DOWN].backward(dy.stride(), ())
        tensors = _for_kernel(inner), magnitude, norm, _for_kernel(h), scaling, (None, None, None), lora_B
        d_base, grads[MAGNITUDE], grads[LORA_B] = eager.scaled_gradients(launches, dy, *tensors, overwrites=overwrites)
    return d_base, torch.addmm(unread, d_base, b, beta=0, alpha=scaling)


def _join_backward(plan, layers, dz, inners, h, d_h_down, scalings, needs_bias, grads, overwrites):
    """The gradients of gate's and up's products, and z where down's lora_A has no gradient here."""
    gate, up, down = layers
    inner_gate, inner_up, h = (_for_kernel(t) for t in (*inners[:DOWN], h))
    along, wants_z = plan.along, plan.ranks[DOWN] > 0 and not plan.along[DOWN]
    d_gate = inner_gate if overwrites or inner_gate is None else torch.empty_like(dz)
    d_up, z = (inner_up if overwrites else torch.empty_like(dz), dz) if wants_z else (dz, None)
    parts = dz.new_empty(plan.parts, dtype=torch.float32)
    plan.part(
        *(dz, inner_up, inner_gate),
        *(gate[MAGNITUDE], gate[NORM], gate[BIAS], up[MAGNITUDE], up[NORM], up[BIAS]),
        *(h, d_h_down if along[DOWN] else None, d_gate, d_up, z, parts),
    )
    for i, layer in enumerate((gate, up)):
        for there, which in ((layer[MAGNITUDE] is not None, MAGNITUDE), (needs_bias[i], BIAS), (along[i], LORA_B)):
            if there:
                grads[i][which] = layer[which].new_empty(layer[which].shape)
    if along[DOWN]:
        grads[DOWN][LORA_A] = down[LORA_A].new_empty(down[LORA_A].shape)
    plan.add(
        *(parts, gate[NORM], up[NORM], scalings[GATE], scalings[UP]),
        *(grads[i][which] for which in (MAGNITUDE, BIAS, LORA_B) for i in (GATE, UP)),
        grads[DOWN][LORA_A],
    )
    return d_gate, d_up, z


def _join_in_ops(plan, layers, dz, inners, h, d_h_down, scalings, needs_bias, grads):
    """:func:`_join_backward` in aten."""
    z, of = mlp.join_backward(plan.activation, layers[:DOWN], inners[:DOWN], dz, needs_bias[:DOWN])
    for i, (_, d_m, d_bias) in enumerate(of):
        grads[i][MAGNITUDE], grads[i][BIAS] = d_m, d_bias
    return of[GATE][0], of[UP][0], None if d_h_down is None else z


def _gradients_again(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    """Of the layers one by one, connected to all that they are made of: these can be differentiated again."""
    plan, again = ctx.plan, torch.is_grad_enabled()
    x, _, _, _, layers = _saved(ctx)
    layers = [(backward_dense(weight, plan.dtype), *others) for weight, *others in layers]
    with torch.enable_grad():
        gated = None if layers[GATE][WEIGHT] is None else mlp.layer(plan.dtype, x, layers[GATE], ctx.scalings[GATE])
        z = mlp.joined(plan.activation, gated, mlp.layer(plan.dtype, x, layers[UP], ctx.scalings[UP]))
        y = mlp.layer(plan.dtype, z, layers[DOWN], ctx.scalings[DOWN])
    flat = [x, None, None, *(t for layer in layers for t in layer)]
    chosen = [i for i, needed in enumerate(ctx.needs_input_grad) if needed]
    grads = dict(zip(chosen, torch.autograd.grad(y, [flat[i] for i in chosen], dy, create_graph=again), strict=True))
    return tuple(grads.get(i) for i in range(len(flat)))
