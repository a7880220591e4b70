"""Nothing of dorac is imported here: ``test_front.py`` says first what a new torch has moved."""

import itertools
import os
import sys
import weakref
import zlib

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernels then run on CPU tensors; read when triton is imported

torch.backends.cudnn.allow_tf32 = False  # float32 convolutions are held to the bounds of float32

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores


def pytest_addoption(parser):
    parser.addoption(
        "--card", help="kernels are launched as for this card, sm_86; as if it had 46 processors, sm_90:46"
    )


@pytest.fixture(autouse=True, scope="session")
def _card(request):
    """With ``--card`` every test runs as on another card, by its kernels' configs."""
    wanted = request.config.getoption("--card")
    if wanted is None:
        yield
        return
    from dorac.kernels.target import CARDS
    from dorac.ops import cards

    name, _, processors = wanted.partition(":")
    card = CARDS[name]
    with cards.launched_for(card._replace(processors=int(processors)) if processors else card):
        yield


@pytest.fixture(autouse=True)
def _compiled_code_knows_the_kept_norms():
    """Whatever a test does to norms that are kept, compiled code is told of it."""
    yield
    norm_cache = sys.modules.get("dorac.nn.norm_cache")
    for layer in norm_cache.keeping() if norm_cache else ():
        if (holder := layer.norm_holder()) is not None:
            told = holder.compiled_norm
            norm_cache.compiled_norm.tell(layer)
            assert holder.compiled_norm is told, f"compiled code was not told of the norm of {layer}"


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """Every test with this fixture has a twin for the GPU under the marker gpu."""
    return request.param


@pytest.fixture(params=["shared", "copied"])
def brought_in(request, monkeypatch):
    """Whether what accelerate brings in lies where it is kept, as on the CPU, or is a copy, as on a GPU."""
    if request.param == "copied":
        hooks = pytest.importorskip("accelerate.hooks")
        stock = hooks.set_module_tensor_to_device

        def copying(*args, value=None, **kwargs):
            return stock(*args, value=None if value is None else value.clone(), **kwargs)

        monkeypatch.setattr(hooks, "set_module_tensor_to_device", copying)


@pytest.fixture
def no_other_caches(monkeypatch):
    """Models that other tests left alive, whose norms are kept, and their hooks are none of this test's."""
    from dorac import caching
    from dorac.nn import norm_cache

    others = norm_cache.kept_layers
    monkeypatch.setattr(norm_cache, "kept_layers", weakref.WeakKeyDictionary())
    caching._HOOKS.leave()
    yield
    norm_cache.kept_layers.clear()
    caching._HOOKS.leave()  # a second pair of hooks would take every norm twice
    if others:
        caching._HOOKS.register()


@pytest.hookimpl(tryfirst=True)  # before pytest leaves out what -m does not ask for
def pytest_collection_modifyitems(items):
    """Of a matrix of three parameters or more, the cases without a new pair of values carry the marker full.

    They are taken in a fixed order that looks random, by which the pairs are spread over all values of the others.
    """
    matrices = {}
    for item in items:
        if hasattr(item, "callspec") and not item.get_closest_marker("full"):
            function, _, _ = item.nodeid.partition("[")
            matrices.setdefault((function, bool(item.get_closest_marker("gpu"))), []).append(item)
    for matrix in matrices.values():
        seen = set()
        for item in sorted(matrix, key=lambda item: zlib.crc32(item.nodeid.encode())):
            values = [(name, id(value)) for name, value in item.callspec.params.items()]
            pairs = {*itertools.combinations(values, 2)}
            if len(values) > 2 and pairs <= seen:
                item.add_marker("full")
            seen |= pairs


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(autouse=True, scope="session")
def _poison():
    """Memory that dorac allocates and does not write is NaN."""
    from dorac.testing.poison import poisoned_memory

    with poisoned_memory():
        yield


@pytest.fixture(autouse=True)
def _fresh_state():
    """Each test starts from one seed, an empty compiler cache, and no plans that know what a test patched."""
    from dorac.ops import eager

    torch.manual_seed(0)
    eager.forget_plans()
    yield
    torch._dynamo.reset()
