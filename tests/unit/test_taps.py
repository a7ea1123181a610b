import pytest
import torch
from torch import nn

from stillhouse.errors import UserError
from stillhouse.taps import paths, tap


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(4, 4)
        self.act = nn.ReLU(inplace=True)
        self.two = nn.Linear(4, 3)

    def forward(self, x):
        return self.two(self.act(self.one(x)))


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_outputs_inputs_and_what_an_in_place_layer_overwrites():
    net, x = Net().double(), torch.randn(5, 4, dtype=torch.float64)
    with tap(net, ["one", "two:in", ""]) as f:
        y = net(x)
    before = x @ net.one.weight.T + net.one.bias
    assert (before < 0).any()
    torch.testing.assert_close(f["one"], before)  # not its ReLU
    torch.testing.assert_close(f["two:in"], before.relu())
    assert torch.equal(f[""], y)
    assert paths(net) == ["one", "act", "two"]


def test_attached_unless_detached():
    net, x = Net(), torch.randn(5, 4)
    with tap(net, "one") as f:
        net(x)
    f["one"].sum().backward()
    torch.testing.assert_close(net.one.weight.grad, x.sum(0).expand(4, 4))
    with tap(net, "one", detach=True) as f:
        net(x)
    assert not f["one"].requires_grad


def test_hooks_are_removed_also_after_errors_and_nesting_works():
    net, x = Net(), torch.randn(2, 4)
    with pytest.raises(RuntimeError), tap(net, ["one", "two:in"]):
        net(torch.randn(2, 7))
    assert hooks(net) == 0
    with tap(net, "one") as outer, tap(net, ["one", "two"]) as inner:
        net(x)
    assert hooks(net) == 0 and torch.equal(outer["one"], inner["one"]) and list(outer) == ["one"]
    net(torch.zeros(9, 4))
    assert outer["one"].shape == (2, 4)


def test_unknown_path_says_what_was_meant_and_leaves_no_hook():
    net = Net()
    with pytest.raises(UserError, match=r"'tow'.*did you mean 'two'"), tap(net, ["one", "tow"]):
        pass
    with pytest.raises(UserError, match="did you mean 'one'"), tap(net, "onee:in"):
        pass
    assert hooks(net) == 0


def test_last_call_wins_tuples_and_the_never_called():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.rnn, self.idle = nn.Linear(4, 4), nn.GRU(4, 4), nn.Linear(1, 1)

        def forward(self, x):
            return self.rnn(self.lin(input=self.lin(x)))

    net, x = Odd(), torch.randn(3, 2, 4)
    with tap(net, ["lin", "lin:in", "rnn", "idle"]) as f:
        out, _ = net(x)
    assert torch.equal(f["lin"], net.lin(net.lin(x))) and torch.equal(f["lin:in"], net.lin(x))
    assert torch.equal(f["rnn"], out)
    with pytest.raises(UserError, match="idle"):
        f["idle"]


def test_module_without_a_tensor_is_refused():
    class Says(nn.Module):
        def forward(self, x):
            return "text"

    net = nn.Sequential(Says())
    with pytest.raises(UserError, match="str without a tensor"), tap(net, "0"):
        net(torch.zeros(1))
    assert hooks(net) == 0
