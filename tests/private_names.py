"""What dorac reads of torch that is not public, and what to look for where a release has moved it."""

import ast
import importlib
import types
from pathlib import Path

import torch

PACKAGE = Path(__file__).parents[1] / "dorac"
TOOLS = "bench", "testing"  # these only measure and test

PRIVATE = {
    "ops/front.py asks who sees an op. Modes: look in torch/utils/_python_dispatch.py and torch/overrides.py for how "
    "their stacks are counted; transforms: in torch/_functorch/pyfunctorch.py for the current level, in "
    "torch/autograd/forward_ad.py for forward mode's; torch.jit.trace: in torch/jit/_trace.py": (
        "torch._C._TorchDispatchModeKey.FUNCTIONAL",
        "torch._C._dispatch_tls_is_dispatch_key_included",
        "torch._C._functorch.maybe_current_level",
        "torch._C._get_dispatch_mode",
        "torch._C._get_tracing_state",
        "torch._C._len_torch_dispatch_stack",
        "torch._C._len_torch_function_stack",
        "torch._C._parse_dispatch_key",
        "torch.autograd.forward_ad._current_level",
        "torch.overrides._get_current_function_mode_stack",
        "torch.utils._device.DeviceContext",
    ),
    "ops/front.py asks whether torch.export runs: look for what torch.compiler.is_exporting() returns": (
        "torch.compiler._is_exporting_flag",
    ),
    "ops/front.py asks about backward: look in torch/utils/checkpoint.py for how it tells that backward runs, and in "
    "torch/autograd/graph.py for who holds the hooks on saved tensors": (
        "torch._C._autograd._get_current_graph_task_keep_graph",
        "torch._C._autograd._top_saved_tensors_default_hooks",
        "torch._C._current_graph_task_id",
    ),
    "ops/crossing.py gives a leaf its gradient where nobody else wants it: look in torch/autograd/graph.py for how "
    "register_multi_grad_hook asks which nodes will run, and in torch/csrc/autograd/functions/accumulate_grad.h": (
        "torch._C._will_engine_execute_node",
    ),
    "tensors of the tracers, told by their type: look for what FakeTensorMode and functionalization make": (
        "torch._subclasses.fake_tensor.FakeTensor",
        "torch._subclasses.functional_tensor.FunctionalTensor",
    ),
    "what a mode or a subclass is not to see: look in torch/utils/_python_dispatch.py and torch/overrides.py for how "
    "torch itself passes them by": (
        "torch._C.DisableTorchFunction",
        "torch._C.DisableTorchFunctionSubclass",
        "torch._C._DisableTorchDispatch",
        "torch.utils._python_dispatch.TorchDispatchMode",
    ),
    "nn/moments.py and ops/crossing.py read a tensor's place and how often it was written, past what "
    "subclasses say: look for the class that torch.Tensor inherits from": (
        "torch._C.TensorBase._version.__get__",
        "torch._C.TensorBase.data_ptr",
        "torch._C.TensorBase.stride",
    ),
    "kernels/launch.py asks for the device and its stream: look in torch/_inductor for what generated code gives to "
    "its kernels": ("torch._C._cuda_getCurrentRawStream", "torch._C._cuda_getDevice"),
    "ops/inductor.py lowers dorac's ops: look in torch/_inductor/kernel/custom_op.py for how the graph of a function "
    "is inlined, in ir.py for a node that writes to its argument and for what cat makes": (
        "torch._inductor.codegen.common.BackendFeature.FOREACH",
        "torch._inductor.codegen.subgraph.inline_subgraph_to_ir_nodes",
        "torch._inductor.decomposition.select_decomp_table",
        "torch._inductor.ir.ComputedBuffer",
        "torch._inductor.ir.ConcatKernel.create",
        "torch._inductor.ir.ExternKernel.realize_input",
        "torch._inductor.ir.IRNode",
        "torch._inductor.ir.NoneLayout",
        "torch._inductor.ir.Pointwise",
        "torch._inductor.ir.TensorBox",
        "torch._inductor.ir.ir_node_to_tensor",
        "torch._inductor.virtualized.V",
        "torch._library.utils.get_layout_constraint_tag",
        "torch._ops.OpOverload",
    ),
    "ops/gradient_sums.py gives Inductor a rule: look in torch/_inductor/pattern_matcher.py for how one is registered, "
    "in fx_passes/post_grad.py for the first list of them": (
        "torch._inductor.pattern_matcher.CallFunction",
        "torch._inductor.pattern_matcher.Ignored",
        "torch._inductor.pattern_matcher.register_graph_pattern",
    ),
    "ops/crossing.py makes gradients DTensors: look in torch/distributed/tensor/_api.py for what makes a DTensor, "
    "and in torch/utils for how nested arguments are mapped": ("torch.utils._pytree.tree_map_only",),
    "nn/norm_cache.py says that a norm stays where it is: look for how CUDA graphs learn of buffers": (
        "torch._dynamo.mark_static_address",
    ),
    "ops that torch has for itself: look in aten/src/ATen/native/native_functions.yaml, for those of DTensor in "
    "torch/distributed/_functional_collectives.py": (
        "torch._C._nn.unflatten_dense_tensors",
        "torch._foreach_copy_",
        "torch.distributed._functional_collectives.AsyncCollectiveTensor",
        "torch.ops._c10d_functional.all_gather_into_tensor",
        "torch.ops._c10d_functional.all_reduce",
        "torch.ops._c10d_functional.reduce_scatter_tensor",
        "torch.ops._c10d_functional.wait_tensor",
        "torch.ops.aten._sparse_coo_tensor_unsafe",
        "torch.ops.aten._unsafe_view",
    ),
    "modules of torch and the hooks on all of them: look in torch/nn/modules/module.py and conv.py": (
        "torch.nn.Module._load_from_state_dict",
        "torch.nn.modules.conv._ConvTransposeNd",
        "torch.nn.modules.module._global_parameter_registration_hooks",
        "torch.nn.modules.module._has_any_global_hook",
    ),
}


def moved() -> list[str]:
    """A sentence for each name that this torch does not have."""
    return [
        f"torch {torch.__version__} has no {name}; {where}"
        for where, names in PRIVATE.items()
        for name in names
        if not is_there(name, torch) and (torch.backends.cuda.is_built() or "._cuda_" not in name)
    ]


def is_there(name: str, package: types.ModuleType) -> bool:
    """Whether the package has what its attribute or module of this whole name is."""
    parts = name.split(".")
    found = package
    for i, part in enumerate(parts[1:], 2):
        try:
            if not hasattr(found, part):  # a module that nobody has imported yet
                importlib.import_module(".".join(parts[:i]))
            found = getattr(found, part)
        except (AttributeError, ImportError):
            return False
    return True


def read() -> set[str]:
    """The names in dorac's code, each as far as it goes."""
    names = set()
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).parts[0] not in TOOLS:
            names |= _names(ast.parse(path.read_text(encoding="utf-8")))
    return {name for name in names if not any(other.startswith(f"{name}.") for other in names)}


def _names(tree: ast.Module) -> set[str]:
    names, imported = set(), {"torch": "torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "torch":
            full = {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
            imported |= full
            names |= {*full.values()}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            head, _, rest = ast.unparse(node).partition(".")
            if head in imported and all(part.isidentifier() for part in rest.split(".")):
                names.add(f"{imported[head]}.{rest}")
    # What V.graph and V.fake_mode are, is known only while Inductor compiles.
    names = {"torch._inductor.virtualized.V" if ".virtualized.V." in name else name for name in names}
    return {name for name in names if any(p.startswith("_") and not p.endswith("__") for p in name.split("."))}
