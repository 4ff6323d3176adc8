"""One training by two processes (gloo, on the processor) against the same by one."""

import os
import re
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import linl
from linl import distributed, train
from linl.recipes import recipe
from linl.worlds import World


@pytest.fixture(scope="module")
def digits():
    return linl.data.load("digits", validation=0.2)


def mlp(**options) -> nn.Module:
    torch.manual_seed(0)
    options = {"hidden": (32, 16), "norm": False, "dropout": 0.0, **options}
    return linl.linearize(linl.models.create("mlp", 10, (1, 8, 8), **options), "linlu")


HOW = {"device": "cpu", "precision": "fp32", "verbose": False}


@pytest.mark.parametrize("extra", [{}, {"l1": 1e-3}])
def test_the_first_steps_gradient_is_one_processes(digits, extra):
    """Of the weights and of p, l1 included: (before − after)/lr of one step of plain SGD."""
    one_step = linl.images.Images("digits", tuple(t[:64] for t in digits.train), digits.validation, digits.test, 10,
                                  digits.mean, digits.std, ("crop", "flip"))  # fmt: skip
    settings = recipe("linlnet-digits", 1, batch_size=64, schedule="constant", momentum=0.0, lr=1.0, unit_lr=1.0,
                      weight_decay=0.0, unit_weight_decay=0.0, eps=0.05, **extra)  # fmt: skip
    start, one, two = mlp(), mlp(), mlp()
    train.fit(one, one_step, settings, **HOW)
    distributed.fit(two, one_step, settings, 2, **HOW)
    for (name, before), a, b in zip(start.named_parameters(), one.parameters(), two.parameters(), strict=True):
        assert (before - a).abs().max() > 0, f"{name} didn't move"
        assert ((before - a) - (before - b)).abs().max() <= 1e-6, name


def test_the_whole_training_and_its_figures_are_one_processes(digits, tmp_path, capfd):
    settings = recipe("linlnet-digits", 3, batch_size=32)
    one, two = mlp(), mlp()
    alone = train.fit(one, digits, settings, **HOW)
    both = distributed.fit(two, digits, settings, 2, folder=tmp_path, **{**HOW, "verbose": True})
    assert capfd.readouterr().out.count("epoch ") == 3, "one of them speaks"
    for column in ("train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "lr"):
        assert both.metrics[column].to_numpy() == pytest.approx(alone.metrics[column].to_numpy(), abs=2e-3), column
    assert both.units["parameter"].to_numpy() == pytest.approx(alone.units["parameter"].to_numpy(), abs=1e-3)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-3
    assert {path.name for path in tmp_path.iterdir()} >= {"model.safetensors", "metrics.csv", "units.csv"}
    assert not (tmp_path / distributed.WORK).exists()
    again = distributed.fit(mlp(), digits, settings, 2, folder=tmp_path, **HOW)
    assert again.resumed_from == 3, "what is finished isn't done again"


def test_a_process_that_dies_ends_it_and_the_next_call_goes_on(digits, tmp_path, capfd):
    """In the middle of a long epoch, from where it goes on."""
    settings = recipe("linlnet-digits", 2, batch_size=4, lr=5e-3, unit_lr=5e-4)

    def kill_one() -> None:
        while not (tmp_path / "checkpoint.pt").is_file():
            time.sleep(0.05)
        mark = str(tmp_path / distributed.WORK).encode()
        workers = [
            int(path.parent.name) for path in Path("/proc").glob("[0-9]*/cmdline")
            if mark in path.read_bytes() and b"torch.distributed.run" not in path.read_bytes()
        ]  # fmt: skip
        os.kill(workers[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(distributed.WorkerError, match=r"SIGKILL|Signal 9|exitcode"):
        distributed.fit(mlp(), digits, settings, 2, folder=tmp_path, save_every=0, **HOW)
    killer.join()
    assert capfd.readouterr().out == ""
    resumed = distributed.fit(mlp(), digits, settings, 2, folder=tmp_path, **{**HOW, "verbose": True})
    assert re.search(r"resumed after epoch 0 of 2, [1-9]\d* % into the next", capfd.readouterr().out)
    assert resumed.metrics["epoch"].tolist() == [1, 2]
    straight = train.fit(mlp(), digits, settings, **HOW)
    for column in ("train_loss", "train_accuracy", "validation_loss"):
        assert resumed.metrics[column].to_numpy() == pytest.approx(straight.metrics[column].to_numpy(), abs=0.01), (
            column
        )


def pictures(folder: Path) -> None:
    """Fourteen of noise, of two classes, to train on and as many to test."""
    from PIL import Image

    for split in ("train", "val"):
        for label in ("a", "b"):
            (folder / split / label).mkdir(parents=True)
            for i in range(7):
                noise = torch.randint(0, 255, (24, 24, 3), dtype=torch.uint8).numpy()
                Image.fromarray(noise).save(folder / split / label / f"{i}.png")


def test_a_folder_of_pictures_and_a_workers_error(tmp_path):
    """A picture that can't be read ends it with its name; mended, it is one process's training."""
    pictures(tmp_path / "data")
    broken = tmp_path / "data" / "train" / "b" / "3.png"
    whole = broken.read_bytes()
    broken.write_bytes(b"no picture")
    crop = linl.crops.Crop(16, 20, "bicubic", least=0.5)
    data = linl.data.load(f"imagefolder:{tmp_path / 'data'}", validation=0.0, size=8, crop=crop)
    settings, start = recipe("linlnet-digits", 1, batch_size=4), {"hidden": (8,), "norm": False, "dropout": 0.0}

    def net() -> nn.Module:
        torch.manual_seed(0)
        return linl.models.create("mlp", 2, data.input_size, **start)

    with pytest.raises(distributed.WorkerError, match=r"DataError: .*train/b/3\.png can't be read as a picture"):
        distributed.fit(net(), data, settings, 2, folder=tmp_path / "run", **HOW)
    broken.write_bytes(whole)
    one, two = net(), net()
    alone, both = (
        train.fit(one, data, settings, **HOW),
        distributed.fit(two, data, settings, 2, folder=tmp_path / "run", **HOW),
    )
    assert both.metrics["train_loss"].to_numpy() == pytest.approx(alone.metrics["train_loss"].to_numpy(), abs=1e-4)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert (a - b).abs().max() < 1e-4


def test_what_cannot_be_sent_is_refused_before_anything_starts(digits, monkeypatch):
    monkeypatch.setattr(distributed, "_start", lambda *_: pytest.fail("started"))
    settings = recipe("linlnet-digits", 1, batch_size=32)
    with pytest.raises(ValueError, match="a batch of 32 images can't be shared evenly by 3 processes"):
        distributed.fit(mlp(), digits, settings, 3, **HOW)
    with pytest.raises(ValueError, match="processes = 0"):
        distributed.fit(mlp(), digits, settings, 0, **HOW)
    with pytest.raises(ValueError, match="Sequential can't be built in another process"):
        distributed.fit(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), digits, settings, 2, **HOW)
    for changed in (linl.harden(mlp().eval()), linl.prune(mlp(), "magnitude", 0.5)):
        with pytest.raises(ValueError, match="was changed since"):
            distributed.fit(changed, digits, settings, 2, **HOW)
    with pytest.raises(ValueError, match="object can't be handed"):
        odd = type("object", (), {"size": lambda self, split: 64, "batches": None})()
        distributed.fit(mlp(), odd, settings, 2, **HOW)


# --- shares ----------------------------------------------------------------------------------------


def test_shares_of_a_batch_are_the_batch(digits):
    crops = linl.images.Images("digits", digits.train, digits.validation, digits.test, 10, digits.mean, digits.std,
                               ("crop", "flip"))  # fmt: skip
    for split, seed in (("train", 3), ("test", None)):
        whole = list(crops.batches(split, 50, seed=seed, epoch=1))
        parts = [list(crops.batches(split, 50, seed=seed, epoch=1, share=(i, 3))) for i in range(3)]
        for number, (x, y) in enumerate(whole):
            mine = [part[number] for part in parts if number < len(part)]
            for i, (a, b) in enumerate(mine):
                assert torch.equal(a, x[i::3]) and torch.equal(b, y[i::3])
            assert sum(len(b) for _, b in mine) == len(y)


def test_shares_of_a_folder_of_pictures(tmp_path):
    pictures(tmp_path)
    data = linl.data.load(f"imagefolder:{tmp_path}", validation=0.0, size=16, workers=0)
    for split, seed in (("train", 1), ("test", None)):
        whole = list(data.batches(split, 6, seed=seed))
        parts = [list(data.batches(split, 6, seed=seed, share=(i, 2))) for i in range(2)]
        assert [len(y) for _, y in whole] == ([6, 6] if seed else [6, 6, 2])
        for number, (x, y) in enumerate(whole):
            for i, part in enumerate(parts):
                assert torch.equal(part[number][0], x[i::2]) and torch.equal(part[number][1], y[i::2])


def test_alone_nothing_is_different():
    alone, net = World(), nn.Linear(2, 2)
    assert alone.share is None and alone.first and alone.totals(1.5, 2) == [1.5, 2]
    assert alone.wrapped(net, torch.device("cpu")) is net
    with pytest.raises(ValueError, match="a batch of 10 images can't be shared evenly by 4"):
        World(0, 4).refuse_batch(128, 10)
