"""Distortions of training images: what each may do, beside torchvision where it has the same, and when it is drawn."""

import math

import pytest
import torch
import torchvision.transforms.functional as tv

from linl.data import load
from linl.distortions import DISTORTIONS, colour_jitter, distorted, random_affine, random_crop, random_flip
from linl.models import create
from linl.train import fit, recipe


def test_random_crop_only_shifts():
    images = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8).repeat(200, 1, 1, 1)
    cropped = random_crop(images, torch.Generator().manual_seed(0), 2)
    padded = torch.nn.functional.pad(images[0, 0], (2,) * 4)
    windows = [padded[dy : dy + 8, dx : dx + 8] for dy in range(5) for dx in range(5)]
    which = [[torch.equal(c[0], w) for w in windows] for c in cropped]
    assert all(sum(row) == 1 for row in which), "each is one of the 25 shifts"
    assert len({row.index(True) for row in which}) == 25, "and all of them occur"


def test_random_flip():
    images = torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).repeat(100, 1, 1, 1)
    flipped = random_flip(images, torch.Generator().manual_seed(0))
    same = sum(torch.equal(a, b) for a, b in zip(flipped, images, strict=True))
    mirrored = sum(torch.equal(a, b.flip(2)) for a, b in zip(flipped, images, strict=True))
    assert same + mirrored == 100 and 30 < same < 70


def drawn(seed, count):
    """What a distortion with three numbers an image draws, from 0 to 1."""
    return torch.rand(3, count, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(8, 8), (12, 9)])
def test_random_affine_is_torchvisions(size):
    images = torch.randint(1, 256, (40, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = random_affine(images, torch.Generator().manual_seed(2))
    for image, one, (turn, scale, shear) in zip(images, found, (2 * drawn(2, 40) - 1).T.tolist(), strict=True):
        wanted = tv.affine(image, 10 * turn, [0, 0], 1 + 0.2 * scale, [10 * shear, 0.0])
        off = (one != wanted).any(0).float().mean().item()
        assert off <= 0.02, f"{off:.0%} of the pixels differ"  # by rounding: the nearest of two as near
    assert (found == 0).any() and not torch.equal(found, images), "zeros come in where the image ends"


def test_colour_jitter_is_torchvisions():
    images = torch.randint(0, 256, (40, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = colour_jitter(images, torch.Generator().manual_seed(2))
    for image, one, (bright, contrast, colour) in zip(
        images, found, (0.8 + 0.4 * drawn(2, 40)).T.tolist(), strict=True
    ):
        x = tv.adjust_contrast(tv.adjust_brightness(image.float() / 255, bright), contrast)
        wanted = 255 * tv.adjust_saturation(x, colour)
        assert (one - wanted).abs().max() <= 0.51
    grey = images[:, :1]
    assert colour_jitter(grey, torch.Generator().manual_seed(0)).shape == grey.shape
    assert not torch.equal(colour_jitter(grey, torch.Generator().manual_seed(0)), grey)


@pytest.mark.parametrize("name", DISTORTIONS)
def test_each_image_has_a_draw_of_its_own(name):
    image = torch.randint(0, 256, (1, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    found = DISTORTIONS[name](image.repeat(60, 1, 1, 1), torch.Generator().manual_seed(0))
    assert found.dtype == torch.uint8 and found.shape == (60, 3, 8, 8)
    assert len({one.numpy().tobytes() for one in found}) > (1 if name == "flip" else 20)


def test_several_are_done_in_one_order():
    images = torch.randint(0, 256, (9, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    both = [
        distorted(images, names, torch.Generator().manual_seed(3)) for names in (("flip", "crop"), ("crop", "flip"))
    ]
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(both[0], both[1])
    assert torch.equal(both[0], random_flip(random_crop(images, generator), generator))
    assert distorted(images, (), generator) is images


def test_a_recipe_has_distortions_of_its_own():
    digits = load("digits", limit=64)
    assert digits.augment == () and digits.augmented(()).augment == ()
    settings = recipe("stability-cifar", epochs=1, batch_size=32)
    losses = {}
    for name, how in (("its own", settings), ("none", recipe("stability", epochs=1, batch_size=32))):
        torch.manual_seed(0)
        net = create("mlp", 10, digits.input_size, hidden=(8,))
        losses[name] = fit(net, digits, how, verbose=False).metrics["train_loss"].item()
    assert losses["its own"] != losses["none"] and all(map(math.isfinite, losses.values()))
    assert digits.augment == (), "the data set itself is left as it is"
    assert "augment" not in recipe("stability").identity() and settings.identity()["augment"] == [
        "flip",
        "affine",
        "jitter",
    ]
    with pytest.raises(ValueError, match="augment = turn: choose from crop, flip, affine, jitter"):
        recipe("stability", augment=("turn",))


def test_pictures_in_folders_have_no_others(tmp_path):
    from PIL import Image

    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / split / "a" / "0.png")
    found = load(f"imagefolder:{tmp_path}", validation=0.0)
    with pytest.raises(ValueError, match="flip affine: distortions of data sets held as tensors"):
        found.augmented(("flip", "affine"))
