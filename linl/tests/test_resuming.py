"""Training that was stopped, killed or done: what is taken up again, what is refused, and what a full disk leaves."""

import inspect
import os
import pickle
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pandas as pd
import pytest
import torch

import linl
from linl.tests.small_trainings import SMALL, same, setting
from linl.train import evaluate, fit, recipe

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
    with pytest.raises(ValueError, match=r"checkpoint.pt belongs to another training \(weights or layers"):
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


def test_another_network_to_begin_with_is_another_training(tmp_path):
    """Other weights, another activation, other layers; a thousandth of a rounding is none of these."""
    digits, settings = linl.data.load("digits", limit=64), recipe("linlnet-digits", 1, batch_size=32)
    fit(setting()[0], digits, settings, folder=tmp_path, verbose=False)

    def other(change):
        net = setting()[0]
        with torch.no_grad():
            change(net)
        return net

    def first(net):
        return next(m for m in net.modules() if isinstance(m, torch.nn.Linear))

    def renamed(net):
        name = next(n for n, m in net.named_modules() if isinstance(m, linl.LiNLU))
        parent, _, last = name.rpartition(".")
        setattr(net.get_submodule(parent), last, linl.PartialLinear())

    others = [lambda net: net.output.bias.add_(0.01), lambda net: first(net).weight.mul_(1.01), renamed]
    others += [
        lambda net: first(net).weight.copy_(first(net).weight.flip(0)),
        lambda net: setattr(next(m for m in net.modules() if isinstance(m, torch.nn.BatchNorm1d)), "momentum", 0.5),
    ]
    for kept in ("model.safetensors", "checkpoint.pt"):
        for change in others:
            with pytest.raises(ValueError, match=r"(?s)\(weights or layers at its start differ\).*other_start=True"):
                fit(other(change), digits, settings, folder=tmp_path, verbose=False)
        rounded = other(lambda net: [p.mul_(1 + 1e-6) for p in net.parameters()])
        assert fit(rounded, digits, settings, folder=tmp_path, verbose=False).resumed_from == 1
        unseeded = other(others[-2])
        assert fit(unseeded, digits, settings, folder=tmp_path, verbose=False, other_start=True).resumed_from == 1
        assert torch.equal(first(unseeded).weight, first(rounded).weight)
        assert fit(setting()[0], digits, settings, folder=tmp_path, verbose=False).resumed_from == 1, "still its own"
        (tmp_path / kept).unlink()


def test_a_cell_run_once_more_goes_on_with_its_own_network(tmp_path):
    """Interrupted, and again when it is done: the object is no longer what it began as, the training is the same."""
    digits, settings = linl.data.load("digits", limit=256, validation=0.1), recipe("linlnet-digits", **SMALL)
    net = setting()[0]
    with pytest.raises(KeyboardInterrupt):
        fit(net, Stops(digits, 11), settings, folder=tmp_path, verbose=False, save_every=0)
    assert fit(net, digits, settings, folder=tmp_path, verbose=False).resumed_from == 1
    assert fit(net, digits, settings, folder=tmp_path, verbose=False).resumed_from == 3
    with pytest.raises(ValueError, match="another training"):
        fit(net, digits, recipe("linlnet-digits", **{**SMALL, "lr": 0.1}), folder=tmp_path, verbose=False)
    for path in tmp_path.iterdir():
        path.unlink()
    ended = fit(net, digits, settings, folder=tmp_path, verbose=False)  # emptied: it begins with the trained network
    assert ended.resumed_from == 0
    with pytest.raises(ValueError, match="weights or layers at its start differ"):
        fit(setting()[0], digits, settings, folder=tmp_path, verbose=False)


def test_one_object_with_other_weights_is_another_training(tmp_path):
    """A loop that gives one network new weights, and says the same folder and seed."""
    digits, settings = linl.data.load("digits", limit=64), recipe("linlnet-digits", 1, batch_size=32)
    net = setting()[0]
    fresh = {name: values.clone() for name, values in net.state_dict().items()}
    fit(net, digits, settings, folder=tmp_path, verbose=False)
    net.load_state_dict({name: 0.5 * values for name, values in fresh.items()})
    with pytest.raises(ValueError, match="weights or layers at its start differ"):
        fit(net, digits, settings, folder=tmp_path, verbose=False)
    net.load_state_dict(fresh)
    assert fit(net, digits, settings, folder=tmp_path, verbose=False).resumed_from == 1


def test_what_is_frozen_is_part_of_a_network(tmp_path):
    digits, settings = linl.data.load("digits", limit=64), recipe("linlnet-digits", 1, batch_size=32)
    frozen = setting()[0]
    frozen.output.requires_grad_(False)
    fit(frozen, digits, settings, folder=tmp_path, verbose=False)
    with pytest.raises(ValueError, match="weights or layers at its start differ"):
        fit(setting()[0], digits, settings, folder=tmp_path, verbose=False)


def test_a_network_just_trained_is_the_one_that_is_loaded(tmp_path):
    """In bf16, where depthwise convolutions with a stride are run otherwise: a teacher is known again, say."""
    digits, told = linl.data.load("digits", limit=64, channels=3), []
    for _ in range(2):
        torch.manual_seed(0)
        net = linl.models.create("mobilenetv2", 10, digits.input_size, width=0.125)
        fit(
            net,
            digits,
            recipe("mobile-digits", epochs=1),
            folder=tmp_path,
            device="cpu",
            precision="bf16",
            verbose=False,
        )
        told.append(linl.identities.network_identity(net))
    assert told[0] == told[1]


def test_infinities_and_functions_among_a_networks_settings(tmp_path):
    """Masks of attention hold infinities; functions in tuples lie elsewhere in another process."""

    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.acts = torch.nn.Linear(64, 10), (torch.relu, torch.tanh)
            self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))

        def forward(self, x):
            return self.acts[0](self.fc(x.flatten(1)))

    def made():
        torch.manual_seed(0)
        return Masked()

    digits, settings = linl.data.load("digits", limit=64), recipe("linlnet-digits", 1, batch_size=32)
    fit(made(), digits, settings, folder=tmp_path, verbose=False)
    assert fit(made(), digits, settings, folder=tmp_path, verbose=False).resumed_from == 1
    told = linl.identities.network_identity(made())["modules"]
    script = "import torch, linl.identities as i\n" + textwrap.dedent(inspect.getsource(Masked))
    script += "torch.manual_seed(0)\nprint(i.network_identity(Masked())['modules'])"
    again = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    assert again == told


def test_other_distortions_are_another_training(tmp_path):
    digits, settings = linl.data.load("digits", limit=64), recipe("linlnet-digits", 1, batch_size=32)
    fit(setting()[0], digits, settings, folder=tmp_path, verbose=False)
    with pytest.raises(ValueError, match=r"another training \(data differ\)"):
        fit(setting()[0], digits.augmented(["flip"]), settings, folder=tmp_path, verbose=False)
