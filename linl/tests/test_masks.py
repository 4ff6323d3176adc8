"""Masks: they copy, train, save and load like any network, and stay what they are."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import linl
from linl.checkpoints import save_weights
from linl.masks import Mask, harden_masks, is_masked, mask_, masks_of, prunable
from linl.train import fit, recipe

X = torch.randn(6, 3, 8, 8)


def small() -> nn.Sequential:
    layers = [nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def half(net: nn.Module) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.rand(m.shape, generator=generator) < 0.5 for name, m in masks_of(net).items()}


def masked(net: nn.Module) -> nn.Module:
    mask_(net, half(net))
    return net


def test_only_weights_of_dense_and_convolutional_layers_are_masked():
    net = masked(small())
    assert list(prunable(net)) == ["0", "3", "6"]
    assert {n for n, _ in net.named_parameters() if n.endswith("_orig")} == {f"{i}.weight_orig" for i in (0, 3, 6)}
    assert not is_masked(net[1]) and net[1].weight.requires_grad


def test_a_masked_network_computes_what_its_zeros_do():
    net = small()
    plain = copy.deepcopy(net)
    masks = half(net)
    with torch.no_grad():
        for name, layer in prunable(plain).items():
            layer.weight *= masks[name]
    mask_(net, masks)
    hard = harden_masks(net)
    assert torch.equal(net(X), plain(X)) and torch.equal(hard(X), plain(X))
    assert hard.state_dict().keys() == plain.state_dict().keys(), "ordinary parameters again"
    assert not any(m._forward_pre_hooks for m in hard.modules())
    assert is_masked(net[0]), "the argument is left alone"


def test_a_copy_is_whole_and_independent_also_after_a_forward_pass_in_training():
    net = masked(small())
    net(X).sum().backward()
    twin = copy.deepcopy(net)
    assert torch.equal(twin(X), net(X))
    with torch.no_grad():
        twin[0].weight_orig.zero_()
        twin[0].weight_mask.zero_()
    assert net[0].weight_orig.any() and net[0].weight_mask.any()
    again = copy.deepcopy(copy.deepcopy(twin))
    assert not again(X).isnan().any() and not again[0].weight.any()
    assert [isinstance(h, Mask) for h in again[0]._forward_pre_hooks.values()] == [True]


def test_pickled_whole_it_comes_back(tmp_path):
    net = masked(small())
    net(X).sum().backward()
    torch.save(net, tmp_path / "net.pt")
    loaded = torch.load(tmp_path / "net.pt", weights_only=False)
    assert torch.equal(loaded.eval()(X), net.eval()(X))


def test_masks_survive_momentum_and_decay_and_the_live_weights_train():
    net = masked(small())
    before, start = masks_of(net), copy.deepcopy(net.state_dict())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        net(X).square().mean().backward()
        optimizer.step()
    for name, layer in prunable(harden_masks(net)).items():
        assert torch.equal(masks_of(net)[name], before[name])
        assert not layer.weight[~before[name]].any()
        assert (layer.weight != start[f"{name}.weight_orig"])[before[name]].all()


def test_a_loss_may_read_a_layers_weight():
    """Σ|weight| of linl.losses, read between forward and backward, must pull at the live weights alone."""
    net = masked(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)))
    (0 * net(torch.ones(1, 4)).sum() + linl.losses.l1(net)).backward()
    for name, layer in prunable(net).items():
        assert torch.equal(layer.weight_orig.grad, layer.weight_orig.sign() * masks_of(net)[name])


def test_fit_trains_saves_and_loads_them(tmp_path):
    data = linl.data.load("digits")
    net = linl.models.create("mlp", 10, data.input_size, hidden=(8,), norm=True, dropout=0)
    mask_(net, masks := half(net))
    fresh = copy.deepcopy(net)
    fit(net, data, recipe("stability-digits", epochs=1), folder=tmp_path, device="cpu", verbose=False)
    for name, layer in prunable(harden_masks(net)).items():
        assert not layer.weight[~masks[name]].any()
    again = fit(fresh, data, recipe("stability-digits", epochs=1), folder=tmp_path, device="cpu", verbose=False)
    assert again.resumed_from == 1
    x = torch.randn(3, *data.input_size)
    assert torch.equal(fresh.eval()(x), net.eval()(x))
    save_weights(net, tmp_path / "once more.safetensors")


def test_other_dtypes_and_memory_formats():
    net = masked(small()).double().to(memory_format=torch.channels_last).eval()
    assert net(X.double()).dtype == torch.float64
    assert torch.equal(net(X.double()), harden_masks(net)(X.double()))


def test_torchs_own_masks_are_understood():
    net = small()
    torch_prune.random_unstructured(net[0], "weight", 0.5)
    torch_prune.random_unstructured(net[0], "weight", 0.5)
    torch_prune.random_unstructured(net[6], "bias", 0.5)
    assert masks_of(net)["0"].sum() == net[0].weight.count_nonzero() < masks_of(net)["3"].sum()
    hard = harden_masks(net.eval())
    assert not any(n.endswith("_orig") for n, _ in hard.named_parameters()) and torch.equal(hard(X), net(X))
    share = linl.prune(net, rate=0.5).prune_report.share
    assert share == pytest.approx(0.5 * sum(int(m.sum()) for m in masks_of(net).values()) / 612, abs=1e-3)


def test_fold_and_analyse_say_what_to_do_first():
    net = masked(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))).eval()
    with pytest.raises(ValueError, match="2 layers are under masks: call linl.harden_masks"):
        linl.fold(net, torch.zeros(1, 4))
    box = linl.Box.around(torch.zeros(4), 1.0)
    with pytest.raises(ValueError, match="under masks"):
        linl.analyse(net, box)
    hard = harden_masks(net)
    assert linl.verify(hard, linl.fold(hard, torch.zeros(1, 4), objective="depth"), torch.randn(5, 4)).equal
    assert linl.analyse(hard, box, "interval").names == ["1"]


def test_what_cannot_be_masked_is_refused_or_left_out():
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="0 and 1 share one weight"):
        prunable(tied)
    with pytest.raises(ValueError, match="nothing to prune"):
        prunable(nn.ReLU())
    computed = nn.Sequential(nn.Linear(3, 3))
    nn.utils.parametrizations.weight_norm(computed[0])
    with pytest.raises(ValueError, match="0 has no weight of its own"):
        prunable(computed)
    with pytest.raises(ValueError, match="the masks don't fit"):
        mask_(small(), {"0": torch.ones(1)})
    attention = nn.MultiheadAttention(4, 2)
    assert list(prunable(nn.ModuleList([attention, nn.Linear(2, 2)]))) == ["1"]


def test_a_network_that_is_one_layer():
    net = nn.Linear(4, 2)
    mask_(net, {"": torch.eye(2, 4, dtype=torch.bool)})
    assert harden_masks(net).weight.count_nonzero() == 2
