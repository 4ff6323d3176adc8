"""Measuring: counts that can be checked by hand."""

import gc
import itertools
import os
import subprocess
import sys

import pandas as pd
import pytest
import torch
from torch import nn

import linl
from linl import cost
from linl.cost import depth


def test_counts_of_a_small_network():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    row = linl.measure(net, torch.randn(4, 3, 6, 6), batches=()).table.iloc[0]
    assert row["parameters"] == 8 * 27 + 8 + 16 + 8 * 36 * 5 + 5
    assert row["gmacs"] == pytest.approx((36 * 8 * 27 + 8 * 36 * 5) / 1e9), "multiply-adds, not FLOPs"
    assert row["depth"] == 2 and row["activations"] == 1
    assert row["mbytes"] == pytest.approx((row["parameters"] * 4 + 8 * 4 * 2 + 8) / 1e6)


def test_alexnet_at_224_pixels():
    """62.4 M parameters; 1.13 GMACs by hand: 105.4 + 448 + 149.5 + 224.3 + 149.5 + 58.6 (METHODS 1.3)."""
    net = linl.models.create("alexnet", 1000, (3, 224, 224))
    row = linl.measure(net, torch.randn(1, 3, 224, 224), batches=()).table.iloc[0]
    by_hand = 55**2 * 96 * 363 + 27**2 * 256 * 2400 + 13**2 * (384 * 2304 + 384 * 3456 + 256 * 3456)
    by_hand += 9216 * 4096 + 4096 * 4096 + 4096 * 1000
    assert row["gmacs"] == pytest.approx(by_hand / 1e9, rel=1e-9) and row["parameters"] == 62_387_912


def test_depth_is_the_longest_path():
    assert depth(linl.models.create("resnet20", width=0.5)) == 20
    assert depth(linl.models.create("resnet18", width=0.125)) == 18
    assert depth(linl.models.create("vgg16", width=0.125)) == 16
    assert depth(nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == 1


def test_depth_is_known_where_a_bend_has_no_name():
    class Clamped(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.second(self.first(x).clamp(-1, 1))

    class Branching(Clamped):
        def forward(self, x):
            return self.second(x if x.sum() > 0 else -x)

    told = linl.measure(Clamped(), Branching(), torch.randn(1, 4), batches=()).table
    assert told["depth"].iloc[0] == 2 and told["depth"].isna().iloc[1]
    assert told["activations"].isna().all() and (told["parameters"] == 30).all()


def test_side_by_side_with_latency():
    a, b, x = (
        nn.Sequential(nn.Linear(256, 2048), nn.ReLU()),
        nn.Sequential(nn.Linear(256, 2), nn.ReLU()),
        torch.randn(2, 256),
    )
    a.train()
    table = linl.measure(a, b, x, names=["wide", "narrow"], batches=(1, 256), seconds=0.05).table
    assert list(table.index) == ["wide", "narrow"] and (table[["ms_1", "ms_256"]] > 0).all().all()
    assert table.loc["wide", "ms_256"] > table.loc["narrow", "ms_256"]
    assert a.training, "modes are restored"


def test_shared_parameters_count_once():
    layer = nn.Linear(4, 4)
    net = nn.Sequential(layer, nn.ReLU(), layer)
    row = linl.measure(net, torch.randn(1, 4), batches=()).table.iloc[0]
    assert row["parameters"] == 20 and row["depth"] == 2


def test_bad_calls():
    with pytest.raises(ValueError, match="then an example tensor"):
        linl.measure(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="2 names for 1 networks"):
        linl.measure(nn.Linear(2, 2), torch.randn(1, 2), names=["a", "b"])


def test_turns_change_their_order_and_collect_no_garbage():
    """Of two calls each is as often the first; a turn begins with a call that isn't counted."""
    seen, collected = [], []

    def call(name):
        seen.append(name)
        collected.append(gc.isenabled())

    assert gc.isenabled()
    took = cost.in_turn([lambda name=name: call(name) for name in "abc"], seconds=1e-12, rounds=4)
    assert took.shape == (4, 3) and (took > 0).all().all() and gc.isenabled()
    assert "".join(seen) == "aabbcc" + "abc" + "cba" + "abc" + "cba", "too slow for calls that aren't counted"
    assert collected == [True, False] * 3 + [False] * 12, "only what is timed has to do without"
    for told in (seen, collected):
        told.clear()
    cost.in_turn([lambda name=name: call(name) for name in "ab"], seconds=0.01, rounds=2)
    assert "".join(name for name, _ in itertools.groupby(seen)) == "ababa"
    assert sum(collected) == 2 + 4, "one at first, one at the beginning of each turn"


def test_turns_of_what_takes_longer_are_shorter():
    """As many calls as fill the time; a pair's times are means of one call."""
    calls = {"short": 0, "long": 0}

    def work(name, size):
        calls[name] += 1
        torch.ones(size).sum()

    took = cost.in_turn([lambda: work("short", 1), lambda: work("long", 20_000_000)], seconds=0.1, rounds=3)
    assert calls["short"] > 10 * calls["long"] and (took[1] > took[0]).all()


def test_a_ratio_is_the_median_of_the_rounds_own():
    took = pd.DataFrame({"ours": [1.0, 2.0, 3.0, 4.0, 50.0], "theirs": [2.0, 4.0, 6.0, 4.0, 100.0]})
    assert cost.ratio(took, "ours", "theirs") == {"ratio": 0.5, "ratio_low": 0.5, "ratio_high": 0.5}
    took["ours"] = [1.0, 3.0, 1.5, 5.0, 25.0]
    assert cost.ratio(took, "ours", "theirs") == {"ratio": 0.5, "ratio_low": 0.25, "ratio_high": 0.75}


def test_how_many_times_as_fast_with_every_pair():
    nets = [nn.Sequential(nn.Linear(512, width), nn.ReLU()).eval() for width in (4096, 8)]
    told = cost.faster(*nets, torch.randn(4, 512), seconds=0.05, rounds=5)
    assert len(told["ratios"]) == 5 and told["before"] > told["after"] > 0
    assert told["ratio_low"] <= told["ratio"] <= told["ratio_high"]
    assert told["ratio"] == pytest.approx(pd.Series(told["ratios"]).median(), abs=1e-4) and told["ratio"] > 1


def test_pairs_of_several_visits_are_told_together():
    nets = [nn.Linear(64, width).eval() for width in (512, 8)]
    visits = [cost.pairs(*nets, torch.randn(2, 64), seconds=0.01, rounds=rounds) for rounds in (3, 4)]
    assert [list(one) for one in visits] == [["before", "after"]] * 2
    told = cost.times_as_fast(pd.concat(visits, ignore_index=True))
    alone = [cost.times_as_fast(one)["ratios"] for one in visits]
    assert told["ratios"] == alone[0] + alone[1] and len(told["ratios"]) == 7
    slow = pd.DataFrame({"before": [2.0, 2.0, 6.0, 6.0], "after": [1.0, 1.0, 1.0, 1.0]})  # two visits, two states
    told = cost.times_as_fast(slow)
    assert (told["ratio_low"], told["ratio"], told["ratio_high"]) == (2.0, 4.0, 6.0)
    assert (told["before"], told["after"]) == (4.0, 1.0)


def test_collection_goes_on_as_it_was():
    for wanted in (True, False):
        (gc.enable if wanted else gc.disable)()
        try:
            with cost.no_collection():
                assert not gc.isenabled()
            assert gc.isenabled() is wanted
        finally:
            gc.enable()


def test_timing_says_nothing_about_a_gpu_that_nobody_asked_for(tmp_path):
    """As torch.utils.benchmark does, when first imported, where there is CUDA's compiler: lessons would show it."""
    code = "import torch; from linl import cost; cost.latencies([torch.nn.ReLU()], torch.ones(1), 0.01)"
    hidden = {**os.environ, "CUDA_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=hidden)
    assert done.stderr == ""
