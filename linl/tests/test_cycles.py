"""Cycles: what is rewound, what AP goes by, what is recorded, and a run that was killed."""

import copy

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import linl
from linl.masks import masks_of, prunable, raw_weight
from linl.train import fit, recipe


def net_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(6, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3)]
    return nn.Sequential(*layers)


X, Y = torch.randn(40, 6, generator=torch.Generator().manual_seed(5)), torch.arange(40) % 3


def train(net: nn.Module, steps: int = 4) -> float:
    """Some steps of SGD with momentum and decay; the last loss."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(X), Y)
        loss.backward()
        optimizer.step()
    return loss.item()


class Spy:
    """A training that notes the weights it begins and ends with."""

    def __init__(self):
        self.begun, self.ended, self.live = [], [], []

    def __call__(self, net: nn.Module) -> float:
        assert net.training
        self.begun.append(copy.deepcopy(net.state_dict()))
        self.live.append({name: mask.clone() for name, mask in masks_of(net).items()})
        loss = train(net)
        self.ended.append(copy.deepcopy(net.state_dict()))
        return loss


def unmasked(state: dict) -> dict:
    return {n.replace("weight_orig", "weight"): t for n, t in state.items() if not n.endswith("weight_mask")}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


def test_the_table_is_the_curve_and_masks_only_shrink():
    net, spy = net_of(), Spy()
    before = copy.deepcopy(net.state_dict())
    report = linl.prune_cycles(net, spy, rate=0.3, ap=0.05, cycles=4, images=X)
    live, expected = 6 * 12 + 12 * 9 + 9 * 3, []
    for _ in range(5):
        expected.append(live)
        live -= round(0.3 * live)
    assert report.table["cycle"].tolist() == [0, 1, 2, 3, 4] and report.table["weights"].tolist() == expected
    assert report.table["share"].tolist() == [n / expected[0] for n in expected]
    assert [sum(int(m.sum()) for m in masks.values()) for masks in spy.live] == expected, "live while it was trained"
    for earlier, later in zip(spy.live, spy.live[1:], strict=False):
        assert not any((later[name] & ~earlier[name]).any() for name in later)
    rates = linl.dead_rate(report.net, X)
    assert report.table.iloc[-1][["dynamic", "static", "observed"]].tolist() == [
        rates.dynamic,
        rates.static,
        rates.observed,
    ]
    assert same(net.state_dict(), before) and not report.net.training
    assert "<table" in report._repr_html_() and report.curve.empty


@pytest.mark.parametrize("rewind", ["weights", "fine-tune", "late"])
def test_what_every_training_begins_with(rewind):
    net, spy, first = net_of(), Spy(), Spy()
    early = {"early": lambda net: (first(net), None)[1]} if rewind == "late" else {}
    linl.prune_cycles(net, spy, rate=0.3, cycles=3, rewind=rewind, **early)
    target = first.ended[0] if rewind == "late" else net.state_dict()
    assert same(unmasked(spy.begun[0]), unmasked(target))
    for cycle in range(1, 4):
        begun = unmasked(spy.begun[cycle])
        kept = unmasked(spy.ended[cycle - 1]) if rewind == "fine-tune" else unmasked(target)
        assert same(begun, kept), "weights, biases, norms and running statistics alike"
    assert not same(unmasked(spy.ended[0]), unmasked(target)), "the training did something"


def test_x_and_ap_go_by_the_weights_after_and_before_the_training():
    """Each cycle's masks again, by hand: the smallest trained weights, then the negative ones that moved least."""
    spy = Spy()
    linl.prune_cycles(net_of(), spy, rate=0.3, ap=0.1, cycles=3)
    for cycle in range(3):
        live = torch.cat([m.flatten() for m in spy.live[cycle].values()])
        now, start = (
            torch.cat([s[f"{n}.weight_orig"].flatten() for n in spy.live[cycle]])
            for s in (spy.ended[cycle], spy.begun[cycle])
        )
        total = int(live.sum())
        by_ap = round(0.1 * total)
        ranked = sorted(live.nonzero()[:, 0].tolist(), key=lambda i: abs(now[i].item()))
        gone = set(ranked[: round(0.3 * total) - by_ap])
        negative = [i for i in live.nonzero()[:, 0].tolist() if i not in gone and now[i] < 0]
        gone |= set(sorted(negative, key=lambda i: abs(now[i].item() - start[i].item()))[:by_ap])
        after = torch.cat([m.flatten() for m in spy.live[cycle + 1].values()])
        assert set((live & ~after).nonzero()[:, 0].tolist()) == gone


def test_pro_trains_between_the_score_and_ap():
    spy = Spy()
    report = linl.prune_cycles(net_of(), spy, rate=0.3, ap=0.1, cycles=2, variant="pro")
    live = [sum(int(m.sum()) for m in masks.values()) for masks in spy.live]
    assert (
        live == [207, 207 - 62 + 21, 207 - 62, 145 - 44 + 14, 145 - 44]
        and report.table["weights"].tolist() == live[::2]
    )
    for between, after in ((1, 2), (3, 4)):
        assert same(unmasked(spy.begun[between]), unmasked(spy.begun[0])), "rewound for the training in between too"
        gone = {name: spy.live[between][name] & ~spy.live[after][name] for name in spy.live[between]}
        moved, negative = [], []
        for name, mask in spy.live[between].items():
            now, start = (s[between][f"{name}.weight_orig"] for s in (spy.ended, spy.begun))
            may = mask & (now < 0)
            assert not (gone[name] & ~may).any()
            moved += (now - start).abs()[gone[name]].tolist()
            negative += (now - start).abs()[may & ~gone[name]].tolist()
        assert max(moved) <= min(negative)


def test_at_no_share_for_ap_or_all_of_it_pro_is_lite():
    for ap in (0.0, 0.3):
        lite, pro = (
            linl.prune_cycles(net_of(), train, rate=0.3, ap=ap, cycles=2, variant=variant)
            for variant in ("lite", "pro")
        )
        assert lite.table.equals(pro.table) and same(lite.net.state_dict(), pro.net.state_dict())


def test_training_functions_get_what_they_ask_for(tmp_path):
    asked = []

    def curious(net, cycle, folder, seed):
        asked.append((cycle, folder, seed))
        train(net)

    linl.prune_cycles(net_of(), curious, rate=0.3, ap=0.1, cycles=2, variant="pro", folder=tmp_path)
    assert [cycle for cycle, *_ in asked] == [0, 1, 1, 2, 2]
    assert len({folder for _, folder, _ in asked}) == 5 and all(folder.parent == tmp_path for _, folder, _ in asked)
    assert len({seed for *_, seed in asked}) == 5
    linl.prune_cycles(net_of(), lambda net, folder=0: asked.append(folder), cycles=1)
    assert asked[-1] is None


@pytest.mark.parametrize(
    ("result", "columns"),
    [
        (0.5, {"result": 0.5}),
        (torch.tensor(0.5), {"result": 0.5}),
        ({"accuracy": 0.5, "loss": torch.tensor(0.25)}, {"accuracy": 0.5, "loss": 0.25}),
        (None, {}),
    ],
)
def test_what_a_training_returns_is_in_the_table(result, columns):
    report = linl.prune_cycles(net_of(), lambda net: result, cycles=1)
    row = report.table.iloc[-1].to_dict()
    assert {name: row[name] for name in row if name not in ("cycle", "weights", "share")} == columns


class KilledError(Exception):
    pass


@pytest.mark.parametrize("options", [{}, {"variant": "pro", "score": "random"}, {"rewind": "late", "early": train}])
def test_a_killed_run_ends_with_the_same_masks(tmp_path, options):
    options = {"rate": 0.3, "ap": 0.1, "cycles": 3, "images": X} | options
    whole = linl.prune_cycles(net_of(), train, folder=tmp_path / "whole", **options)
    calls = []

    def killed(net):
        calls.append(1)
        if len(calls) == 3:
            raise KilledError
        return train(net)

    with pytest.raises(KilledError):
        linl.prune_cycles(net_of(), killed, folder=tmp_path / "killed", **options)
    other = net_of(9)  # made without a seed, say: the first one's weights count, if one wants that
    with pytest.raises(ValueError, match="weights or layers at its start differ"):
        linl.prune_cycles(other, train, folder=tmp_path / "killed", **options)
    resumed = linl.prune_cycles(other, train, folder=tmp_path / "killed", other_start=True, **options)
    assert resumed.resumed_from in (1, 2)
    assert same(resumed.net.state_dict(), whole.net.state_dict()) and resumed.table.equals(whole.table)
    done = linl.prune_cycles(net_of(), killed, folder=tmp_path / "killed", **options)
    assert done.resumed_from == 4 and done.table.equals(whole.table), "nothing is trained again"
    assert pd.read_csv(tmp_path / "killed" / "cycles.csv")["weights"].tolist() == whole.table["weights"].tolist()


def test_another_runs_folder_is_refused(tmp_path):
    linl.prune_cycles(net_of(), train, cycles=1, folder=tmp_path)
    with pytest.raises(ValueError, match="another training .rate differ"):
        linl.prune_cycles(net_of(), train, rate=0.3, cycles=1, folder=tmp_path)
    longer = linl.prune_cycles(net_of(), train, cycles=2, folder=tmp_path)
    assert longer.resumed_from == 2 and len(longer.table) == 3, "more cycles go on from there"
    with pytest.raises(ValueError, match=r"cycles.pt is of 2 cycles: ask for as many"):
        linl.prune_cycles(net_of(), train, cycles=1, folder=tmp_path)
    with pytest.raises(ValueError, match="at its start differ"):
        linl.prune_cycles(net_of(1), train, cycles=2, folder=tmp_path)
    tanh = net_of()
    tanh[2] = nn.Tanh()
    with pytest.raises(ValueError, match="at its start differ"):
        linl.prune_cycles(tanh, train, cycles=2, folder=tmp_path)


def test_another_batch_for_the_score_is_another_run(tmp_path):
    linl.prune_cycles(net_of(), train, "snip", cycles=1, batch=(X, Y), folder=tmp_path)
    with pytest.raises(ValueError, match=r"another training \(batch differ\)"):
        linl.prune_cycles(net_of(), train, "snip", cycles=1, batch=(-X, Y), folder=tmp_path)
    rounded = (X * (1 + 1e-6), Y)
    assert linl.prune_cycles(net_of(), train, "snip", cycles=1, batch=rounded, folder=tmp_path).resumed_from == 2


def test_what_trainings_of_a_killed_run_left(tmp_path):
    """Of cycles that are saved it goes; of a later one than the next it is another run's."""

    def killed(net, folder, cycle):
        folder.mkdir(parents=True)
        if cycle == 2:
            raise KilledError
        return train(net)

    with pytest.raises(KilledError):
        linl.prune_cycles(net_of(), killed, cycles=3, folder=tmp_path)
    (tmp_path / "cycle-01-after").mkdir()  # killed after its cycle was saved
    assert (tmp_path / "cycle-02-after").is_dir()
    linl.prune_cycles(net_of(), train, cycles=3, folder=tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cycles.csv", "cycles.pt"]
    (tmp_path / "cycle-02-after").mkdir()
    (tmp_path / "cycles.pt").unlink()
    with pytest.raises(ValueError, match=r"cycle-02-after of another run, where cycle 0 is next: .* delete these"):
        linl.prune_cycles(net_of(), train, cycles=3, folder=tmp_path)


def test_with_fit_the_curve_is_every_epochs(tmp_path):
    data = linl.data.load("digits")
    images = data.normalize(data.train[0][:40])
    net = linl.models.create("mlp", 10, data.input_size, hidden=(8,), norm=False, dropout=0)
    watch = linl.dead_rates.watch(images)

    def trained(net, folder, seed):
        short = recipe("stability-digits", epochs=1, batch_size=256)
        return fit(net, data, short, seed=seed, folder=folder, device="cpu", verbose=False, watch=watch)

    report = linl.prune_cycles(net, trained, cycles=1, images=images, folder=tmp_path)
    assert report.curve[["cycle", "epoch"]].to_numpy().tolist() == [[0, 1], [1, 1]]
    assert report.curve["dynamic"].tolist() == report.table["dynamic"].tolist()
    assert "dynamic" in (tmp_path / "cycles.csv").read_text().splitlines()[0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cycles.csv", "cycles.pt"], "trainings' folders are gone"
    assert report.table["train_loss"].notna().all()
    for name, layer in prunable(linl.harden_masks(report.net)).items():
        assert not raw_weight(layer)[~masks_of(report.net)[name]].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rewind": "back"}, "unknown rewind 'back': choose from weights, late, fine-tune"),
        ({"variant": "max"}, "unknown variant 'max'"),
        ({"rewind": "late"}, "belong together"),
        ({"early": train}, "belong together"),
        ({"cycles": 0}, "cycles = 0"),
        ({"rate": 2}, "rate = 2"),
        ({"score": "snip"}, "pass batch="),
    ],
)
def test_bad_settings_are_refused_before_any_training(options, message):
    def never(net):
        raise AssertionError

    with pytest.raises(ValueError, match=message):
        linl.prune_cycles(net_of(), never, **options)


def test_a_training_that_gives_back_another_network_is_refused():
    with pytest.raises(ValueError, match="in place"):
        linl.prune_cycles(net_of(), copy.deepcopy, cycles=1)
    assert len(linl.prune_cycles(net_of(), lambda net: net, cycles=1).table) == 2
