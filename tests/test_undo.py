"""``dorac.undo.Undo``: the log of writes that takes them back."""

import contextlib
from collections import OrderedDict

import pytest
import torch
from torch import nn

from dorac.undo import Undo


class Cancelled(BaseException):
    """What no ``except Exception`` catches."""


@contextlib.contextmanager
def cancelled():
    """A block with a log, at whose end something is raised."""
    with contextlib.suppress(Cancelled), Undo() as log:
        yield log
        raise Cancelled


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "channels_last", "empty", "0-d"])
def test_elements_are_restored_in_place(layout, device):
    tensor = {
        "contiguous": lambda: torch.randn(3, 4, device=device),
        "transposed": lambda: torch.randn(4, 3, device=device).t(),
        "strided": lambda: torch.randn(6, 4, device=device)[::2],
        "channels_last": lambda: torch.randn(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last),
        "empty": lambda: torch.randn(0, 4, device=device),
        "0-d": lambda: torch.randn((), device=device),
    }[layout]()
    before, pointer = tensor.clone(), tensor.data_ptr()
    with cancelled() as log:
        log.keep(tensor, None)
        tensor.fill_(7)
    assert torch.equal(tensor, before)
    assert tensor.data_ptr() == pointer


def block(log, error):
    with log:
        raise error


@pytest.mark.parametrize("error", [ValueError, MemoryError, KeyboardInterrupt, Cancelled])
def test_what_is_raised_goes_on(error):
    with pytest.raises(error):
        block(Undo(), error)


def test_what_is_finished_stays():
    weight, layer = torch.zeros(3), nn.Linear(2, 2)
    with Undo() as log:
        log.keep(weight)
        log.keep_requires_grad(layer.parameters())
        log.keep_module(layer)
        weight.fill_(1)
        layer.requires_grad_(False)
        layer.mark = 1
    assert weight.eq(1).all()
    assert layer.mark == 1
    assert not any(p.requires_grad for p in layer.parameters())


def test_a_parameter_in_a_graph_and_nan_are_restored():
    weight = nn.Parameter(torch.tensor([float("nan"), -0.0, 1.0]))
    bits = weight.detach().view(torch.int32).clone()
    with cancelled() as log:
        log.keep(weight)
        with torch.no_grad():
            weight.zero_()
    assert torch.equal(weight.detach().view(torch.int32), bits)
    assert weight.requires_grad
    assert weight.is_leaf


def test_modules_are_restored_with_all_that_they_hold():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    handle = model.register_forward_hook(lambda *_: None)
    before = {key: v.copy() if isinstance(v, (dict, OrderedDict, set)) else v for key, v in vars(model).items()}
    own = {key: vars(model)[key] for key in before}
    with cancelled() as log:
        log.keep_module(model)
        handle.remove()
        model.register_forward_pre_hook(lambda *_: None)
        model.register_buffer("norm", torch.ones(1), persistent=False)
        model.register_parameter("scale", nn.Parameter(torch.ones(1)))
        model[0] = nn.Linear(2, 2)
        del model[1]
        model.name = "changed"
        model.training = False
    assert list(vars(model)) == list(before)
    assert all(vars(model)[key] is value for key, value in own.items())
    assert all(vars(model)[key] == value for key, value in before.items())
    handle.remove()  # the dictionary that it knows is the model's still
    assert not model._forward_hooks


def test_later_writes_are_taken_back_first():
    weight = torch.zeros(3)
    with cancelled() as log:
        for value in (1, 2):
            log.keep(weight)
            weight.fill_(value)
    assert not weight.any()


def test_a_second_interruption_does_not_stop_the_rollback():
    weights = [torch.zeros(3) for _ in range(4)]
    interruptions = iter([None, KeyboardInterrupt, None, KeyboardInterrupt, KeyboardInterrupt])

    def interrupted() -> None:
        if error := next(interruptions, None):
            raise error

    with cancelled() as log:
        for weight in weights:
            log.keep(weight)
            log._steps.append(interrupted)
            weight.fill_(1)
    assert not any(weight.any() for weight in weights)


def test_a_rollback_in_inference_mode_and_of_a_whole_block():
    weight = torch.zeros(3)
    with torch.inference_mode(), Undo() as log:
        log.keep(weight)
        weight.fill_(1)
        log.roll_back()
        assert not weight.any()
        weight.fill_(2)  # after it the log is empty
    assert weight.eq(2).all()


@pytest.mark.gpu
def test_copies_leave_half_of_the_free_memory(monkeypatch):
    weights = [torch.randn(256, device="cuda") for _ in range(3)]
    before = [weight.clone() for weight in weights]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2 * 2 * weights[0].nbytes, 0))
    devices = []
    with cancelled() as log:
        for weight in weights:
            log.keep(weight)
            devices.append(log._steps[-1].args[0].device.type)
            weight.zero_()
    assert devices == ["cuda", "cuda", "cpu"]
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))


def test_a_step_that_fails_keeps_no_other_from_being_taken_back():
    layer = nn.Linear(2, 2)
    before = layer.weight.detach().clone()

    def fail():
        with Undo() as log:
            log.keep(layer.weight)
            log.add(lambda: 1 / 0)
            with torch.no_grad():
                layer.weight.zero_()
            raise Cancelled

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(layer.weight, before)


def test_tensors_that_nobody_can_write_are_no_hindrance():
    with torch.inference_mode():
        layer = nn.Linear(2, 2)
    with cancelled() as log:
        log.keep(layer.weight)
        log.keep_requires_grad(layer.parameters())
        with torch.inference_mode():
            layer.requires_grad_(False)
    assert all(p.requires_grad for p in layer.parameters())


def test_an_interruption_of_a_roll_back_that_nothing_made_necessary():
    """All is restored first."""
    layer, log, interrupt = nn.Linear(2, 2), Undo(), [KeyboardInterrupt]
    before = layer.weight.detach().clone()

    def interrupted():
        if interrupt:
            raise interrupt.pop()

    log.keep(layer.weight)
    log.add(interrupted)
    with torch.no_grad():
        layer.weight.zero_()
    with pytest.raises(KeyboardInterrupt):
        log.roll_back()
    assert torch.equal(layer.weight, before)
