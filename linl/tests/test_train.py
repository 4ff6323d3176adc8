"""Training: recipes, the step, and what is told and scored."""

import math
import re

import pandas as pd
import pytest
import torch

import linl
from linl.tests.small_trainings import SMALL, same, setting
from linl.train import RECIPES, evaluate, fit, recipe


def test_the_papers_recipe():
    """METHODS 1.2: SGD 0.9, rates 1e-2 and 1e-3, decay 5e-4 on both, ×0.1 every 140 of 200 epochs, batch 100."""
    paper = recipe("linlnet")
    assert (paper.epochs, paper.batch_size, paper.momentum) == (200, 100, 0.9)
    assert (paper.lr, paper.unit_lr, paper.weight_decay, paper.unit_weight_decay) == (1e-2, 1e-3, 5e-4, 5e-4)
    assert [paper.factor(epoch * 10, 10) for epoch in (0, 139, 140, 199)] == pytest.approx([1, 1, 0.1, 0.1])
    assert paper.penalty == 0 and paper.init == "linlnet"
    ours = [r for name, r in RECIPES.items() if name.startswith(("linlnet", "mobile"))]
    assert all(r.unit_lr == pytest.approx(r.lr / 10) for r in ours), "p's rate is not tuned apart"


def test_layer_foldings_recipes():
    """METHODS 2.1-2.3: rate 1e-3, momentum 0.9, batch 128, 100 + 100 epochs, α trained as the weights are."""
    for name, decay in (("", 0.0), ("-vgg", 5e-4)):
        first, then = recipe(f"layer-folding{name}"), recipe(f"fine-tune{name}")
        for r in (first, then):
            assert (r.epochs, r.batch_size, r.lr, r.momentum, r.weight_decay) == (100, 128, 1e-3, 0.9, decay)
        assert (first.penalty, then.penalty) == (0.25, 0.0)
    assert recipe("layer-folding").factor(999, 10) == 1.0
    assert [recipe("layer-folding-vgg").factor(epoch * 10, 10) for epoch in (49, 50)] == pytest.approx([1, 0.1])
    folding = [r for name, r in RECIPES.items() if name.startswith("layer-folding")]
    assert len(folding) == 3 and all(r.unit_lr is None and r.unit_weight_decay is None for r in folding)


def test_one_cycle_rises_and_falls_to_zero():
    factors = [recipe("linlnet-short", epochs=10).factor(step, 20) for step in range(200)]
    assert max(factors) == 1 and factors.index(1.0) == 59
    assert factors[0] == pytest.approx(1 / 60) and factors[-1] < 1e-3
    assert factors == sorted(factors[:60]) + sorted(factors[60:], reverse=True)


def test_the_schedule_of_activating_while_pruning():
    """As its code: 0.1·i/20000 up to epoch 25, 0.01 up to 32, then 0.001; 782 steps an epoch."""
    ap = recipe("ap")
    steps = {0: 0.1 / 20_000, 9_999: 0.05, 25 * 782 - 1: 0.1 * 19_550 / 20_000, 25 * 782: 0.01, 32 * 782 - 1: 0.01}
    steps |= {32 * 782: 0.001, 50 * 782 - 1: 0.001}
    assert [ap.lr * ap.factor(step, 782) for step in steps] == pytest.approx(list(steps.values()))
    assert "milestones" not in recipe("linlnet").identity() and ap.identity()["milestones"] == [25, 32]


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("linlnet", {"optimizer": "adam"}, "optimizer = 'adam': choose from sgd, adamw"),
        ("linlnet", {"distill": 1.5}, "distill = 1.5, temperature = 2.0: from 0 to 1, and above 0"),
        ("linlnet", {"hint": 1.0}, "hint = 1.0 with distill = 0: hints are a teacher's"),
        ("distill-hints", {"hint": -1.0}, "hint = -1.0: must be at least 0"),
        ("linlnet", {"distill": 1.0, "loss": "reconstruction"}, "distill = 1.0 with loss = 'reconstruction'"),
        ("linlnet", {"temperature": 0.0}, "temperature = 0.0: from 0 to 1, and above 0"),
        ("linnet", {}, r"unknown recipe 'linnet': choose from linlnet"),
        ("linlnet", {"epochs": 0}, "epochs = 0: must be at least 1"),
        ("linlnet", {"epochs": -3}, "epochs = -3"),
        ("linlnet", {"batch_size": 0}, "batch_size = 0"),
        ("linlnet", {"learning_rate": 1}, "a recipe has no learning_rate; it has epochs"),
        ("linlnet", {"schedule": "cosine"}, "schedule = 'cosine'"),
    ],
)
def test_bad_recipes(name, changes, message):
    with pytest.raises(ValueError, match=message):
        recipe(name, **changes)


def test_bad_device_and_precision():
    net, digits = setting()
    with pytest.raises(ValueError, match="precision 'fp16'"):
        fit(net, digits, recipe("linlnet-digits", **SMALL), precision="fp16")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device 'cuda' isn't available here"):
            fit(net, digits, recipe("linlnet-digits", **SMALL), device="cuda")


def test_first_step_is_sgd_with_two_groups():
    """One step by hand, one by fit: momentum starts at zero, decay on both groups, p projected."""
    net, digits = setting(validation=0)
    for module in net.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    twin = linl.graph.clone(net)
    settings = recipe("linlnet", epochs=1, batch_size=128, lr=0.1, unit_lr=1.0)
    fit(net, digits, settings, precision="fp32", verbose=False)
    x, y = next(digits.batches("train", 128, seed=0, epoch=0))
    torch.nn.functional.cross_entropy(twin.train()(x), y).backward()
    units = {id(u.p) for u in linl.units.units_of(twin).values()}
    for own, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        rate = 1.0 if id(theirs) in units else 0.1
        want = theirs.data - rate * (theirs.grad + 5e-4 * theirs.data)
        want = want.clamp(0.5, 1) if id(theirs) in units else want
        torch.testing.assert_close(own.data, want)


def test_adamw_is_torchs():
    net, digits = setting()
    weights = {name: p.detach().clone() for name, p in net.named_parameters()}
    own = linl.graph.clone(net)
    settings = recipe("distill-digits", epochs=1, distill=0.0, schedule="constant", batch_size=32)
    fit(net, digits, settings, device="cpu", precision="fp32", verbose=False)
    groups = linl.param_groups(own, settings.lr, settings.unit_lr, settings.weight_decay, settings.unit_weight_decay)
    optimizer = torch.optim.AdamW(groups, foreach=False)
    own.train()
    torch.manual_seed(linl.data.mixed_seed(0, 0))
    for images, labels in digits.batches("train", 32, seed=0, epoch=0):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(own(images), labels).backward()
        optimizer.step()
        linl.project_(own)
    for (name, a), b in zip(net.named_parameters(), own.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-3 and not torch.equal(a, weights[name]), name
    assert "momentum" not in settings.identity() and "optimizer" not in recipe("linlnet").identity()


def test_learns_and_tells(tmp_path, capsys):
    net, digits = setting()
    history = fit(net, digits, recipe("linlnet-digits", **{**SMALL, "epochs": 8}), folder=tmp_path, precision="fp32")
    lines = capsys.readouterr().out.strip().splitlines()
    assert len(lines) == 8 and lines[0].startswith("epoch   1/8  loss ")
    assert history.metrics["train_loss"].iloc[-1] < history.metrics["train_loss"].iloc[0] / 1.5
    assert evaluate(net, digits).accuracy > 0.5
    assert not net.training
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"checkpoint.pt", "metrics.csv", "units.csv", "model.safetensors"}
    units = pd.read_csv(tmp_path / "units.csv")
    assert sorted(units["epoch"].unique()) == list(range(9)) and len(units) == 9 * 4
    assert units.loc[units["epoch"] == 0, "parameter"].tolist() == [0.75] * 4
    last = units[units["epoch"] == 8].set_index("name")["parameter"]
    for name, unit in linl.units.units_of(net).items():
        assert last[name] == pytest.approx(unit.p.item())


def test_same_seed_same_figures_other_seed_others():
    runs = []
    for seed in (0, 0, 1):
        net, digits = setting()
        torch.randn(seed + 5)  # the caller's random state must not matter
        runs.append(fit(net, digits, recipe("linlnet-digits", **SMALL), seed=seed, verbose=False).metrics)
    same(runs[0], runs[1])
    assert runs[0]["train_loss"].tolist() != runs[2]["train_loss"].tolist()


def test_a_long_epoch_tells_how_far_it_is(capsys, monkeypatch):
    monkeypatch.setattr(linl.epochs, "TELL_EVERY", 0.0)
    net, digits = setting()
    fit(net, digits, recipe("linlnet-digits", **{**SMALL, "epochs": 1}))
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"epoch   1/1   25 %  loss \d\.\d{4}  \d+ images/s  0 min to its end", lines[0]), lines
    assert len(lines) == 4 and "validation" in lines[-1], "three of four batches, then the epoch"


def test_a_loss_that_is_no_number_stops_with_words(tmp_path):
    net, digits = setting()
    with pytest.raises(FloatingPointError, match="lower learning rate than 1e"):
        fit(net, digits, recipe("linlnet-digits", **{**SMALL, "lr": 1e30, "schedule": "constant"}), folder=tmp_path,
            precision="fp32", verbose=False)  # fmt: skip
    assert not (tmp_path / "model.safetensors").exists()


def test_evaluate_counts_what_it_says():
    _, digits = setting()

    class Knows(torch.nn.Module):
        """Right for even labels; the right one second for odd labels."""

        def forward(self, x):
            y = digits.test[1][self.at : self.at + len(x)]
            self.at += len(x)
            scores = torch.zeros(len(x), 10)
            scores[torch.arange(len(x)), y] = 1.0
            wrong = (y + 1) % 10
            scores[torch.arange(len(x)), wrong] = torch.where(y % 2 == 1, 2.0, 0.0)
            return scores

    oracle = Knows()
    oracle.at = 0
    score = evaluate(oracle, digits, batch_size=50)
    assert score.accuracy == pytest.approx((digits.test[1] % 2 == 0).float().mean().item())
    assert score.top5 == 1 and score.images == len(digits.test[1]) and not math.isnan(score.loss)


def test_slow_bf16_convolutions_run_in_float32():
    """Depthwise with a stride or 5×5: float32 inside, bf16 outside, and no trace afterwards."""
    from linl.devices import autocast, fp32_where_bf16_is_slow

    net = torch.nn.Sequential(
        torch.nn.Conv2d(8, 8, 3, 2, 1, groups=8), torch.nn.Conv2d(8, 8, 5, 1, 2, groups=8), torch.nn.Conv2d(8, 4, 1)
    )
    x, cpu = torch.randn(2, 8, 9, 9), torch.device("cpu")
    exact = net[1](net[0](x).bfloat16().float()).bfloat16()
    seen = []
    net[2].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with fp32_where_bf16_is_slow(net, cpu, "bf16"):
        with autocast(cpu, "bf16"):
            y = net(x)
        net(x)  # an evaluation in float32 in between
    assert torch.equal(seen[0], exact) and y.dtype == torch.bfloat16 and seen[1].dtype == torch.float32
    y.float().sum().backward()
    with autocast(cpu, "bf16"):
        net(x)
    assert not torch.equal(seen[2], exact), "the hooks are gone"
    assert not torch.is_autocast_enabled("cpu")


def test_what_cannot_be_scored_is_said_first():
    net, digits = setting()
    for options, message in (
        ({"precision": "fp61"}, "precision 'fp61'"),
        ({"precision": "auto"}, '"fp32" or "bf16"'),
        ({"split": "tests"}, "unknown split 'tests': choose from train, validation, test"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(net, digits, **options)
    bare = linl.data.load("digits", limit=64, validation=0)
    with pytest.raises(ValueError, match="no images in 'validation'"):
        evaluate(net, bare, "validation")
