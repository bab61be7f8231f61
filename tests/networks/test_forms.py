"""What is done to a form is done to its value."""

import pytest
import torch

from pushforward.errors import ShapeError, UnsupportedLayerError
from pushforward.networks.forms import Form, concatenated
from pushforward.networks.linear_maps import Dense, Identity, Structured
from scenarios import normal

ATOMS = {0: normal(1, 5, 6), 1: normal(2, 5, 4), 2: normal(3, 5, 6)}
# Two values of one shape, with an atom in common and one of their own each.
DOUBLED = Structured(lambda x: x.flatten(1).repeat(1, 2)[:, :6], (4,), (6,))
FIRST = Form({0: Dense(normal(4, 6, 6)), 1: DOUBLED}, normal(5, 6), (2, 3), "first")
SECOND = Form({0: Identity(6), 2: Dense(normal(6, 6, 6))}, normal(7, 6), (2, 3), "second")
VECTOR = normal(8, 3)


def value(form):
    """The form at the atoms, as a batch of shaped examples."""
    flat = sum(linear.apply(ATOMS[atom]) for atom, linear in form.maps.items()) + form.bias
    return flat.reshape(-1, *form.shape)


OPERATIONS = {
    "mapped": (
        lambda f: f.mapped("new", Dense(normal(9, 4, 6)), (4,), normal(10, 4)),
        lambda x: x.flatten(1) @ normal(9, 4, 6).mT + normal(10, 4),
    ),
    "scaled": (
        lambda f: f.scaled("new", normal(9, 6), normal(10, 6)),
        lambda x: x * normal(9, 6).reshape(2, 3) + normal(10, 6).reshape(2, 3),
    ),
    "negated": (lambda f: f.negated("new"), lambda x: -x),
    "plus a form": (lambda f: f.plus("new", SECOND), lambda x: x + value(SECOND)),
    "plus itself": (lambda f: f.plus("new", f), lambda x: 2 * x),
    "plus a number": (lambda f: f.plus("new", 3), lambda x: x + 3),
    "plus a tensor": (lambda f: f.plus("new", VECTOR), lambda x: x + VECTOR),
    "plus a batch of one": (lambda f: f.plus("new", VECTOR.expand(1, 2, 3)), lambda x: x + VECTOR),
    "structured": (lambda f: f.structured("new", "sum", lambda x: x.sum(2)), lambda x: x.sum(2)),
    "structured with a constant": (
        lambda f: f.structured("new", "", lambda x: x.cumsum(1) + VECTOR),
        lambda x: x.cumsum(1) + VECTOR,
    ),
    "concatenated": (
        lambda f: concatenated("new", [f, SECOND, f], 1),
        lambda x: torch.cat([x, value(SECOND), x], 1),
    ),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_form_follows_its_value(operation):
    on_form, on_value = OPERATIONS[operation]
    form = on_form(FIRST)
    assert form.name == "new"
    torch.testing.assert_close(value(form), on_value(value(FIRST)), rtol=1e-12, atol=1e-12)


def test_a_reshaping_keeps_maps_and_name():
    form = FIRST.reshaped("view", "view", lambda x: x.view(x.shape[0], 3, 2))
    assert (form.name, form.shape) == ("first", (3, 2))
    assert form.maps is FIRST.maps
    assert form.bias is FIRST.bias


def test_a_zero_bias_stays_out_of_autograd_unless_it_is_a_parameter():
    def bias_behind(bias):
        return Form({0: Identity(6)}, bias, (6,), "").mapped("", weight, (2,)).bias

    weight = Dense(normal(9, 2, 6).requires_grad_())
    zero = torch.zeros(6, dtype=torch.float64)
    assert not bias_behind(zero).requires_grad
    assert bias_behind(zero.clone().requires_grad_()).requires_grad


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sum(0),
        lambda x: x.sum(),
        lambda x: x[:2],
        lambda x: x.permute(1, 0, 2),
    ],
)
def test_functions_that_mix_examples_are_refused(function):
    # The first dimension of an example is as large as the first probe of a batch.
    with pytest.raises(UnsupportedLayerError, match="batch"):
        FIRST.structured("new", "function", function)


def test_reshapings_that_mix_examples_are_refused():
    for function in (lambda x: x.reshape(2, -1), lambda x: x.flatten()):
        with pytest.raises(UnsupportedLayerError, match="batch"):
            FIRST.reshaped("new", "reshape", function)


def test_shapes_that_do_not_fit_are_refused():
    flat = FIRST.reshaped("flatten", "flatten", lambda x: x.flatten(1))
    with pytest.raises(UnsupportedLayerError, match="broadcasts"):
        FIRST.plus("new", flat)
    with pytest.raises(ShapeError, match="joins"):
        concatenated("new", [FIRST, FIRST.reshaped("", "", lambda x: x.mT)], 1)
    with pytest.raises(UnsupportedLayerError, match="dimension 2"):
        concatenated("new", [FIRST, SECOND], 2)
    with pytest.raises(UnsupportedLayerError, match="constants"):
        concatenated("new", [FIRST, VECTOR], 1)
    with pytest.raises(ShapeError, match="constant of shape"):
        FIRST.plus("new", normal(9, 5))
    with pytest.raises(UnsupportedLayerError, match="str"):
        FIRST.plus("new", "3")
