"""`stage_children`: a model by module."""

from __future__ import annotations

import copy
import pickle

import pytest

torch = pytest.importorskip("torch")

import gpuscope  # noqa: E402
from gpuscope.integrations.modules import stage_children  # noqa: E402

from .models_recorded import paths, recorded  # noqa: E402

INPUT = torch.ones(2, 3)


class Broken(torch.nn.Module):
    """Fails when it is called."""

    def forward(self, _):
        """Raise."""
        raise ValueError("not today")


def two_layers():
    """Return a model with the children `first` and `second`."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.ReLU()), torch.nn.Linear(3, 1)
    ).requires_grad_(requires_grad=False)


def named(first, second):
    """Return a model whose children have names."""
    model = torch.nn.Sequential()
    model.add_module("first", first)
    model.add_module("second", second)
    return model


@pytest.fixture
def model():
    """A model whose first child has children itself."""
    return named(*two_layers())


def test_each_child_is_a_stage(model):
    """The children are stages by their names, and the answer is the same."""
    plain = model(INPUT)
    stage_children(model)
    with recorded() as spans, gpuscope.stage("infer"):
        assert torch.equal(model(INPUT), plain)
    assert paths(spans) == ["infer", "infer/first", "infer/second"]


def test_a_level_below(model):
    """Called on a child, its children are stages within it."""
    stage_children(model)
    stage_children(model.first)
    with recorded() as spans:
        model(INPUT)
    assert paths(spans) == ["first", "first/0", "first/1", "second"]


def test_the_hooks_go_away(model):
    """What it returns takes the stages away again."""
    stage_children(model)()
    with recorded() as spans:
        model(INPUT)
    assert spans == []
    assert not any(child._forward_hooks or child._forward_pre_hooks for child in model.children())


def test_a_child_that_fails(model):
    """A child that raises ends its stage with the error, and the next call is as if nothing had been."""
    broken = named(model.first, Broken())
    stage_children(broken)
    with recorded() as spans:
        with pytest.raises(ValueError, match="not today"):
            broken(INPUT)
        model(INPUT)
    assert [(span.name, span.status) for span in spans] == [
        ("first", "UNSET"),
        ("second", "ERROR"),
        ("first", "UNSET"),
    ]
    assert paths(spans) == ["first", "second", "first"]


def test_a_call_while_an_error_is_handled(model):
    """A model called while the program handles an error of its own has not failed."""
    stage_children(model)
    with recorded() as spans:
        try:
            {}.pop("what the program looks for")
        except KeyError:
            model(INPUT)
    assert {span.status for span in spans} == {"UNSET"}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_stages_too(model, duplicate):
    """A copy of the model, and one that was pickled, work, with stages of their own."""
    stage_children(model)
    other = duplicate(model)
    with recorded() as spans:
        assert torch.equal(other(INPUT), model(INPUT))
    assert paths(spans) == ["first", "second"] * 2


def test_a_compiled_model_has_one_graph(model):
    """A model with the hooks compiles to one graph, and has no stages then."""
    stage_children(model)
    torch._dynamo.reset()
    with recorded() as spans:
        torch.compile(model, backend="eager", fullgraph=True)(INPUT)
    assert spans == []


def test_what_is_no_module_is_refused():
    """Something without children is refused at once."""
    with pytest.raises(TypeError, match=r"takes an `nn.Module`, not an object of type `int`"):
        stage_children(3)
