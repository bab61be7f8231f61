"""Reading the weights of checkpoints: what fits, what does not, and how it is said."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pushforward.degeneracy.checkpoint_weights import check_weights, loaded
from pushforward.errors import NetworkError, WeightsError

F64 = torch.float64


def network():
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).to(F64).eval()


def other(net, factor=2.0):
    return {name: factor * tensor.detach() + 1 for name, tensor in net.state_dict().items()}


def same(net, state):
    return all(torch.equal(tensor, state[name]) for name, tensor in net.state_dict().items())


def test_state_dicts_modules_and_files_are_the_same(tmp_path):
    net = network()
    state = other(net)
    module = network()
    module.load_state_dict(state)
    path = tmp_path / "there.safetensors"
    save_file(state, path)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    for weights in (state, module, path, str(path)):
        found = loaded(net, 1, weights)
        assert same(found, state)
        assert not found.training
    assert same(net, before)  # a copy was loaded
    found = loaded(net, 1, module)
    with torch.no_grad():
        found[0].weight.zero_()
    assert same(module, state)  # and shares nothing


def test_tied_weights_need_be_there_once(tmp_path):
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)).to(F64)
    net[1].weight = net[0].weight
    save_file({"0.weight": torch.eye(2, dtype=F64)}, tmp_path / "tied.safetensors")
    found = loaded(net, "tied", tmp_path / "tied.safetensors")
    assert torch.equal(found[1].weight.detach(), torch.eye(2, dtype=F64))


@pytest.mark.parametrize("kind", ["file", "state"])
def test_names_and_shapes_that_do_not_fit(tmp_path, kind):
    net = network()

    def given(state):
        if kind == "state":
            return state
        save_file(state, tmp_path / "wrong.safetensors")
        return tmp_path / "wrong.safetensors"

    state = other(net)
    missing = {name: tensor for name, tensor in state.items() if name != "2.bias"}
    with pytest.raises(WeightsError, match=r"checkpoint 'late', 2\.bias: it is missing"):
        check_weights(net, "late", given(missing))
    with pytest.raises(WeightsError, match=r"checkpoint 7, 0\.scale: Sequential has no such"):
        check_weights(net, 7, given(state | {"0.scale": torch.ones(1)}))
    shape = r"checkpoint 7, 0.weight: it has shape \(2, 3\) instead of \(3, 2\)"
    with pytest.raises(WeightsError, match=shape):
        check_weights(net, 7, given(state | {"0.weight": state["0.weight"].T.contiguous()}))


def test_weights_of_a_training_that_diverged():
    net = network()
    state = other(net)
    state["0.bias"][1] = torch.nan
    with pytest.raises(NetworkError, match=r"checkpoint 300, 0.bias: it holds NaN"):
        loaded(net, 300, state)


def test_what_is_no_safetensors_file(tmp_path):
    net = network()
    torch.save(net.state_dict(), tmp_path / "pickled.pt")
    with pytest.raises(WeightsError, match="not a complete safetensors file"):
        check_weights(net, 0, tmp_path / "pickled.pt")
    with pytest.raises(WeightsError, match="no such file"):
        check_weights(net, 0, tmp_path / "nowhere.safetensors")


@pytest.mark.wrong_types
def test_what_holds_no_weights():
    for weights in (3, {"0.weight": [1.0]}, None):
        with pytest.raises(WeightsError, match="holds no weights"):
            check_weights(network(), 0, weights)
