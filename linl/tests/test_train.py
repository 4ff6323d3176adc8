"""Training: recipes, the step, checkpoints, and a kill -9 that changes nothing."""

import math
import os
import pickle
import re
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch

import linl
from linl.train import RECIPES, evaluate, fit, recipe

SMALL = {"epochs": 3, "batch_size": 32, "lr": 0.05, "unit_lr": 5e-3, "schedule": "onecycle"}


def setting(name="mlp", **data):
    digits = linl.data.load("digits", limit=128, **data)
    torch.manual_seed(0)
    return linl.linearize(linl.models.create(name, 10, digits.input_size, width=0.125), "linlu"), digits


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


def test_distillation_is_hintons():
    """T² Σ q·log(q/p), softened by T, mean over images; in float64, written out."""
    a, b = torch.randn(2, 5, 7, dtype=torch.float64)
    p, q = (torch.exp(z / 3.0) / torch.exp(z / 3.0).sum(1, keepdim=True) for z in (a, b))
    wanted = 9 * (q * (q / p).log()).sum(1).mean()
    assert abs(linl.losses.distillation(a, b, 3.0) - wanted) < 1e-12
    assert linl.losses.distillation(a, a, 2.0).abs() < 1e-12 < linl.losses.distillation(a, b, 2.0)


def test_a_student_comes_nearer_to_its_teacher(tmp_path):
    """By its outputs alone: the labels are wrong. Killed on its way it ends the same; other teachers are refused."""
    net, digits = setting()
    teacher = linl.graph.clone(net)
    fit(teacher, digits, recipe("linlnet-digits", epochs=6), device="cpu", verbose=False)
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    digits.train = digits.train[0], digits.train[1].flip(0)
    settings = recipe("distill-digits", epochs=8, batch_size=16, lr=3e-3)
    how = {"device": "cpu", "precision": "fp32", "verbose": False}

    def apart(student):
        return linl.losses.distillation(student.eval()(x), teacher(x), 2.0).item()

    x, start = digits.normalize(digits.test[0]), linl.graph.clone(net)
    first = apart(start)
    whole = fit(net, digits, settings, teacher=teacher, folder=tmp_path / "whole", **how)
    assert apart(net) < first / 2 and whole.metrics["train_loss"].is_monotonic_decreasing
    assert not teacher.training and all(torch.equal(before[k], v) for k, v in teacher.state_dict().items())
    assert any(p.requires_grad for p in teacher.parameters())

    epochs = []

    def kill(net):
        epochs.append(1)
        if len(epochs) == 2:
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt):
        fit(start, digits, settings, teacher=teacher, folder=tmp_path / "killed", watch=kill, **how)
    again = fit(start, digits, settings, teacher=teacher, folder=tmp_path / "killed", **how)
    assert again.resumed_from == 1
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), start.parameters(), strict=True))
    with pytest.raises(ValueError, match="teacher"):
        fit(start, digits, settings, teacher=start, folder=tmp_path / "whole", **how)


def test_a_teacher_belongs_to_a_recipe_that_distils():
    net, digits = setting()
    with pytest.raises(ValueError, match=r"distill = 1.0: a recipe with distill above 0 needs teacher="):
        fit(net, digits, recipe("distill-digits"), device="cpu")
    with pytest.raises(ValueError, match=r"distill = 0.0: .* another takes none"):
        fit(net, digits, recipe("linlnet-digits"), device="cpu", teacher=net)


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


def same(a, b):
    columns = ["epoch", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "lr"]
    pd.testing.assert_frame_equal(a[columns], b[columns], check_exact=True)


def test_same_seed_same_figures_other_seed_others():
    runs = []
    for seed in (0, 0, 1):
        net, digits = setting()
        torch.randn(seed + 5)  # the caller's random state must not matter
        runs.append(fit(net, digits, recipe("linlnet-digits", **SMALL), seed=seed, verbose=False).metrics)
    same(runs[0], runs[1])
    assert runs[0]["train_loss"].tolist() != runs[2]["train_loss"].tolist()


SCRIPT = """
import sys, torch, linl
torch.set_num_threads(1)
digits = linl.data.load("digits", size=32, channels=3, limit=96)
torch.manual_seed(0)
net = linl.linearize(linl.models.create("alexnet", 10, digits.input_size, width=0.0625), "linlu")
settings = linl.train.recipe("linlnet-digits", epochs=4, batch_size=16)
linl.train.fit(net, digits, settings, folder=sys.argv[1], seed=3)
print("test", linl.train.evaluate(net, digits).loss)
"""


def test_killed_and_started_again_it_ends_the_same(tmp_path):
    """kill -9 in the third epoch; then the same command, and one that was never stopped."""
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)

    def start(folder):
        return subprocess.Popen(
            [sys.executable, str(script), str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    straight = start(tmp_path / "straight")
    victim = start(tmp_path / "killed")
    for line in victim.stdout:
        if line.startswith("epoch   2/4"):
            os.kill(victim.pid, signal.SIGKILL)
            break
    victim.communicate()
    assert victim.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model.safetensors").exists(), "a killed training doesn't look finished"
    again = start(tmp_path / "killed")
    told, _ = again.communicate(timeout=120)
    want, _ = straight.communicate(timeout=120)
    assert "resumed after epoch 2 of 4" in told or "resumed after epoch 3 of 4" in told, told
    assert again.returncode == straight.returncode == 0, told + want
    assert told.splitlines()[-1] == want.splitlines()[-1]
    for table in ("metrics.csv", "units.csv"):
        a, b = (pd.read_csv(tmp_path / f / table) for f in ("killed", "straight"))
        drop = [c for c in ("seconds", "images_per_second") if c in a]
        pd.testing.assert_frame_equal(a.drop(columns=drop), b.drop(columns=drop), check_exact=True)


class Stops:
    """Data whose reading ends with an interrupt, as a kill would, after so many training batches in all."""

    def __init__(self, data, after):
        self.data, self.left = data, after

    def __getattr__(self, name):
        return getattr(self.data, name)

    def to(self, device):
        return self

    def batches(self, split, batch_size, *, seed=None, epoch=0):  # knows nothing of shares, nor of a later start
        for batch in self.data.batches(split, batch_size, seed=seed, epoch=epoch):
            if split == "train":
                self.left -= 1
                if self.left < 0:
                    raise KeyboardInterrupt
            yield batch


@pytest.mark.parametrize("extra", [{}, {"adversary": "pgd", "eps": 0.1, "attack_step": 0.05, "attack_steps": 2}])
def test_stopped_within_an_epoch_it_ends_the_same(tmp_path, capsys, extra):
    """Seven batches an epoch; stopped in the second after three of them, and there again: dropout, attacks and all."""
    data = linl.data.load("digits", limit=256, validation=0.1)
    settings = recipe("linlnet-digits", **SMALL, **extra)

    def net():
        return setting()[0]

    straight = fit(net(), data, settings, folder=tmp_path / "straight", verbose=False)
    for count in (11, 4):  # the second start skips three by reading them
        with pytest.raises(KeyboardInterrupt):
            fit(net(), Stops(data, count), settings, folder=tmp_path / "cut", verbose=False, save_every=0)
    capsys.readouterr()
    ended = fit(net(), data, settings, folder=tmp_path / "cut")
    assert "resumed after epoch 1 of 3, 50 % into the next" in capsys.readouterr().out
    same(ended.metrics, straight.metrics)
    a, b = ((tmp_path / f / "model.safetensors").read_bytes() for f in ("cut", "straight"))
    assert a == b, "every weight is the same"


def test_fewer_processes_go_on_within_an_epoch(tmp_path):
    """Of a checkpoint that two had written: the same images, other dropout."""
    data = linl.data.load("digits", limit=256, validation=0.1)
    settings = recipe("linlnet-digits", **SMALL)
    with pytest.raises(KeyboardInterrupt):
        fit(setting()[0], Stops(data, 3), settings, folder=tmp_path, verbose=False, save_every=0)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert saved["within"]["step"] == 3 and len(saved["within"]["chance"]) == 1
    saved["within"]["chance"] *= 2
    torch.save(saved, tmp_path / "checkpoint.pt")
    ended = fit(setting()[0], data, settings, folder=tmp_path, verbose=False).metrics
    straight = fit(setting()[0], data, settings, verbose=False).metrics
    assert len(ended) == 3 and ended["train_loss"].iloc[-1] == pytest.approx(straight["train_loss"].iloc[-1], rel=0.1)


def test_a_long_epoch_tells_how_far_it_is(capsys, monkeypatch):
    monkeypatch.setattr(linl.epochs, "TELL_EVERY", 0.0)
    net, digits = setting()
    fit(net, digits, recipe("linlnet-digits", **{**SMALL, "epochs": 1}))
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"epoch   1/1   25 %  loss \d\.\d{4}  \d+ images/s  0 min to its end", lines[0]), lines
    assert len(lines) == 4 and "validation" in lines[-1], "three of four batches, then the epoch"


def test_finished_training_is_loaded_not_redone(tmp_path, capsys):
    net, digits = setting()
    settings = recipe("linlnet-digits", **SMALL)
    first = fit(net, digits, settings, folder=tmp_path, verbose=False)
    (tmp_path / "checkpoint.pt").unlink()
    other, _ = setting()
    again = fit(other, digits, settings, folder=tmp_path)
    assert capsys.readouterr().out == "", "no epoch was trained"
    pd.testing.assert_frame_equal(again.metrics, first.metrics)
    assert again.seconds == pytest.approx(first.seconds)
    assert evaluate(other, digits).loss == evaluate(net, digits).loss


def test_settings_that_only_one_training_has_tell_them_apart(tmp_path):
    """Either way round: settings that aren't used are in no identity."""
    digits = linl.data.load("digits", limit=64)
    for name, extra in (("plain", {}), ("sparse", {"l1": 0.01})):
        fit(setting()[0], digits, recipe("stability-digits", 1, **extra), folder=tmp_path / name, verbose=False)
    for name, extra in (("sparse", {}), ("plain", {"l1": 0.01})):
        with pytest.raises(ValueError, match=r"belongs to another training \(l1 differ\)"):
            fit(setting()[0], digits, recipe("stability-digits", 1, **extra), folder=tmp_path / name, verbose=False)


def test_what_is_watched_may_be_a_number_of_numpy_or_torch(tmp_path):
    digits, settings = linl.data.load("digits", limit=64), recipe("stability-digits", 3)
    calls = []

    def watch(net):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return {"a": np.float64(1.5), "b": torch.tensor(2.5)}

    with pytest.raises(KeyboardInterrupt):
        fit(setting()[0], digits, settings, folder=tmp_path, verbose=False, watch=watch)
    ended = fit(setting()[0], digits, settings, folder=tmp_path, verbose=False, watch=watch)
    assert ended.resumed_from == 1 and ended.metrics[["a", "b"]].to_numpy().tolist() == [[1.5, 2.5]] * 3


def test_a_folder_of_another_training_is_refused(tmp_path):
    net, digits = setting()
    fit(net, digits, recipe("linlnet-digits", **SMALL), folder=tmp_path, verbose=False)
    with pytest.raises(ValueError, match=r"model.safetensors belongs to another training \(seed differ\)"):
        fit(net, digits, recipe("linlnet-digits", **SMALL), folder=tmp_path, seed=1)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"checkpoint.pt belongs to another training \(lr differ\)"):
        fit(net, digits, recipe("linlnet-digits", **{**SMALL, "lr": 0.1}), folder=tmp_path)
    other = linl.linearize(linl.models.create("mlp", 10, digits.input_size, width=0.25), "linlu")
    with pytest.raises(ValueError, match=r"checkpoint.pt belongs to another network"):
        fit(other, digits, recipe("linlnet-digits", **SMALL), folder=tmp_path)
    for file in ("checkpoint.pt", "model.safetensors"):
        for content in (b"", b"cut short"):
            (tmp_path / file).write_bytes(content)
            with pytest.raises(ValueError, match=rf"{file} can't be read .* delete it"):
                fit(net, digits, recipe("linlnet-digits", **SMALL), folder=tmp_path)


class Runs:
    """What a pickle can hold: a call that is made when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_shared_checkpoint_cannot_run_code(tmp_path):
    net, digits = setting()
    torch.save({"net": Runs(tmp_path / "ran"), "identity": {}}, tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"checkpoint.pt can't be read"):
        fit(net, digits, recipe("linlnet-digits", **SMALL), folder=tmp_path)
    torch.save({"state_dict": Runs(tmp_path / "ran")}, tmp_path / "weights.pt")
    with pytest.raises(pickle.UnpicklingError):
        linl.weights.load_weights_(net, tmp_path / "weights.pt")
    assert not (tmp_path / "ran").exists()


def test_other_data_in_the_same_folder_is_refused(tmp_path):
    net, digits = setting()
    fit(net, digits, recipe("linlnet-digits", **SMALL), folder=tmp_path, verbose=False)
    digits.train = (255 - digits.train[0], digits.train[1])
    with pytest.raises(ValueError, match=r"another training \(data differ\)"):
        fit(net, digits, recipe("linlnet-digits", **SMALL), folder=tmp_path)


def test_a_disk_that_is_really_full(tmp_path):
    """torch and safetensors report it with exceptions of their own."""
    import resource

    net, _ = setting()

    def attempt(write):
        with linl.files.atomic(tmp_path / "net.bin") as part:
            write(part)

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, before[1]))
        for write in (lambda p: torch.save(net.state_dict(), p), lambda p: linl.checkpoints.save_weights(net, p)):
            with pytest.raises(OSError, match=r"could not write .*net\.bin .*run the same command again"):
                attempt(write)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, old)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path, monkeypatch):
    net, digits = setting()
    saved = torch.save

    def full(content, path):
        if content["epoch"] == 2:
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        saved(content, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match=r"could not write .*checkpoint.pt .*No space left.*run the same command again"):
        fit(net, digits, recipe("linlnet-digits", **SMALL), folder=tmp_path, verbose=False)
    assert not list(tmp_path.glob(".*part")), "nothing half-written is left"
    monkeypatch.setattr(torch, "save", saved)
    net, _ = setting()
    history = fit(net, digits, recipe("linlnet-digits", **SMALL), folder=tmp_path, verbose=False)
    assert history.resumed_from == 1
    straight, _ = setting()
    same(history.metrics, fit(straight, digits, recipe("linlnet-digits", **SMALL), verbose=False).metrics)


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
