"""What Dynamo looks at in every call: of a layer nothing, where torch's guards tell by a module's dictionary.

torch 2.11 does so; later ones have the switch off. It is on here wherever that leaves plain modules right.
"""

import pytest
import torch
from torch import nn
from torch._dynamo import config
from torch._dynamo.testing import CompileCounter

import dorac
from dorac import nn as dnn
from dorac.nn.compiled_norm import DICTIONARIES_TELL


class Stack(nn.Module):
    def __init__(self, make) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make() for _ in range(3))

    def forward(self, x):
        return sum(layer(x) for layer in self.layers)


def linear():
    return dnn.DoraLinear(nn.Linear(8, 8), r=2, init_lora_weights=False)


def conv():
    return dnn.DoraConv1d(nn.Conv1d(8, 8, 3, padding=1), r=2, init_lora_weights=False)


def embedding():
    return dnn.DoraEmbedding(nn.Embedding(8, 8), r=2, init_lora_weights=False)


INPUTS = {linear: (5, 8), conv: (5, 8, 4), embedding: (5,)}


def guarded(model: nn.Module):
    """By source, the managers of Dynamo's guards on the layers of the code that was compiled last for ``model``."""
    manager = torch._C._dynamo.eval_frame._debug_get_cache_entry_list(type(model).forward.__code__)[0].guard_manager
    found = {}

    def walk(node) -> None:
        if issubclass(node.get_type_of_guarded_value(), dnn.DoraLayer):
            found[node.get_source()] = node
            return
        values = node.get_key_value_managers().values() if hasattr(node, "get_key_value_managers") else ()
        for child in (*node.get_child_managers(), *(m for pair in values for m in pair if m is not None)):
            walk(child)

    walk(manager.root)
    return found


@pytest.mark.parametrize("keeps", [True, False], ids=["kept", "own"])
@pytest.mark.parametrize("make", INPUTS, ids=lambda make: make.__name__)
@config.patch(use_recursive_dict_tags_for_guards=DICTIONARIES_TELL or config.use_recursive_dict_tags_for_guards)
def test_layers_are_told_by_their_dictionaries(make, keeps):
    """So are plain layers. After a change, seen again: another graph where there has to be one, and only there."""
    model, x = Stack(make), torch.randn(INPUTS[make])
    x = x.sigmoid().mul(8).long() if make is embedding else x
    if keeps:
        cache = dorac.cache_norms(model)
    counter = CompileCounter()
    run = torch.compile(model, backend=counter, fullgraph=True)
    run(x)
    layers = guarded(model)
    assert len(layers) == 3
    if DICTIONARIES_TELL:
        assert all(node.is_tag_safe() for node in layers.values()), layers.keys()
    if not keeps:
        return
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        y = run(x)
        torch.testing.assert_close(y, model(x))
        y.sum().backward()
        optimizer.step()
        cache.check()
    assert counter.frame_count == 1
    model.eval().train()  # in doubt: another graph, until the norms are taken anew
    with torch.no_grad():
        next(p for p in model.parameters() if p.requires_grad).data.mul_(3)
    torch.testing.assert_close(run(x), model(x))
    assert counter.frame_count == 2
    cache.refresh()
    torch.testing.assert_close(run(x), model(x))
    assert counter.frame_count == 2


def test_a_step_leaves_the_dictionaries_alone():
    """A norm that is taken anew is written where it was, and what compiled code is told is the same object."""
    model = Stack(linear)
    dorac.cache_norms(model)
    told = [layer.compiled_norm for layer in model.layers]
    assert all(one.norm is layer.kept.norm for one, layer in zip(told, model.layers, strict=True))
    model(torch.randn(2, 8)).sum().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    assert all(layer.compiled_norm is one for one, layer in zip(told, model.layers, strict=True))
