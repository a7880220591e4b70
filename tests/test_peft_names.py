"""What of PEFT is not public is where dorac reads it, and a name that has moved is told with where to look."""

import pytest

pytest.importorskip("peft")

import peft_names
from peft.tuners.lora.model import LoraModel


def test_all_that_is_read_is_listed_and_there():
    assert {name for names in peft_names.PRIVATE.values() for name in names} == peft_names.read()
    assert peft_names.moved() == []


def test_a_name_that_moved(monkeypatch):
    monkeypatch.delattr(LoraModel, "_create_new_module")
    (sentence,) = peft_names.moved()
    assert "has no peft.tuners.lora.model.LoraModel._create_new_module; models with adapters: look in" in sentence
