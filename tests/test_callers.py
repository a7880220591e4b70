"""Every warning of dorac's points to the line of the user's that led to it, whatever lies in between."""

import ast
import inspect
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import dorac
from dorac import callers

PACKAGE = Path(dorac.__file__).parent


def test_all_warnings_go_one_way():
    """``bench`` and ``files`` silence others' and warn of nothing."""
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".warn", "warn_explicit")):
                found.append((str(path.relative_to(PACKAGE)), ast.unparse(node.func)))
    ways = {way for _, way in found}
    assert ways == {"warnings.warn", "callers.warn"}
    assert [path for path, way in found if way == "warnings.warn"] == ["callers.py"]


def model_of(*, trained=True, **options):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    dorac.apply_dora(model, ["0", "1"], r=2, init_lora_weights=not trained, **options)
    for layer in model[:2]:
        layer.lora_magnitude_vector.data.mul_(1.5)
    return model


def saving(tmp_path):
    model = model_of(trained=False)
    nn.init.normal_(model[0].lora_B)
    yield "have a factor of zeros"
    dorac.save_adapter(model, tmp_path)


def saving_another(tmp_path):
    model = model_of(trained=False)
    dorac.add_adapter(model, "second", r=2)
    dorac.set_adapter(model, "second")
    nn.init.normal_(model[0].lora_B)
    dorac.set_adapter(model, "default")
    yield "have a factor of zeros"
    dorac.save_adapter(model, tmp_path, adapter_name="second")


def wrapping(tmp_path):
    yield "match no adapted module"
    dorac.apply_dora(nn.Sequential(nn.Linear(3, 3)), ["0"], r=2, rank_pattern={"nothing": 3})


def adding(tmp_path):
    model = model_of()
    yield "match no adapted module"
    dorac.add_adapter(model, "second", alpha_pattern={"nothing": 3})


def base_weights(tmp_path):
    """Torch calls the hook that warns."""
    model = model_of()
    state = {key: 2 * t for key, t in model.state_dict().items() if "base_layer" in key}
    yield "another base weight was loaded without a magnitude"
    model.load_state_dict(state, strict=False)


def disabling(tmp_path):
    """contextlib enters what warns."""
    model = model_of(modules_to_save=["2"])
    yield "trained whole"
    with dorac.disabled(model):
        pass


def without_adapters(tmp_path):
    model = model_of(modules_to_save=["2"])
    yield "trained whole"
    dorac.base_model(model)


def accumulated(tmp_path):
    """Torch calls the layer that warns."""
    model = model_of().to(torch.bfloat16)
    magnitude = model[0].lora_magnitude_vector
    magnitude.data = magnitude.data.bfloat16()
    held = magnitude.view_as(magnitude).grad_fn.next_functions[0][0]
    yield "a DoRA magnitude is trained in torch.bfloat16"
    model(torch.randn(2, 3, dtype=torch.bfloat16))
    del held


CASES = [saving, saving_another, wrapping, adding, base_weights, disabling, without_adapters, accumulated]


def lines_after_yield(case):
    lines, first = inspect.getsourcelines(case)
    start = next(number for number, line in enumerate(lines) if line.lstrip().startswith("yield"))
    return range(first + start + 1, first + len(lines))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_line_is_the_users(case, tmp_path):
    steps = case(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        message = next(steps)
        caught.clear()
        assert next(steps, None) is None
    found = [warning for warning in caught if message in str(warning.message)]
    assert found
    for warning in found:
        assert warning.filename == __file__
        assert warning.lineno in lines_after_yield(case)


def test_where_there_is_no_other_code():
    """A thread whose frames are all dorac's and torch's."""
    inside = {"__name__": "torch.inside", "warn": callers.warn}
    exec("def run():\n    warn('nobody')\n", inside)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        thread = threading.Thread(target=inside["run"])
        thread.start()
        thread.join()
    assert [str(warning.message) for warning in caught] == ["nobody"]
