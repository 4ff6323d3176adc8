"""Data: splits, augmentation, order, and one clear error for what is missing or damaged."""

import hashlib
import itertools
import pickle
import shutil

import numpy as np
import pytest
import sklearn.datasets
import torch
from PIL import Image

import linl
from linl import class_folders, data
from linl.data import DataError, load


def test_digits_are_embedded_and_split_by_seed():
    a, b, c = load("digits", seed=0), load("digits", seed=0), load("digits", seed=1)
    assert a.input_size == (1, 8, 8) and a.num_classes == 10
    assert (a.size("train"), a.size("validation"), a.size("test")) == (1293, 144, 360)
    assert torch.equal(a.train[0], b.train[0]) and not torch.equal(a.validation[0], c.validation[0])
    assert torch.equal(a.test[0], c.test[0]), "the test split doesn't depend on the seed"
    assert load("digits", validation=0).size("validation") == 0


def test_digits_are_scikit_learns(monkeypatch):
    """Read from its file; by its own reader where the file isn't there: the same bytes."""
    bunch = sklearn.datasets.load_digits()
    table = data._digits_table()
    assert table.dtype == np.uint8 and np.array_equal(table, np.column_stack([bunch.data, bunch.target]))
    monkeypatch.setattr(data.Path, "is_file", lambda self: False)
    assert np.array_equal(data._digits_table(), table) and data._digits_table().dtype == np.uint8


def test_splits_do_not_overlap():
    digits = load("digits")
    seen = [{bytes(image.numpy().tobytes()) for image in getattr(digits, s)[0]} for s in ("train", "validation")]
    whole = load("digits", validation=0)
    assert digits.size("train") + digits.size("validation") == whole.size("train")
    everything = {bytes(image.numpy().tobytes()) for image in whole.train[0]}
    assert seen[0] | seen[1] == everything


def test_enlarged_for_convolutions():
    digits = load("digits", size=32, channels=3, limit=10)
    assert digits.input_size == (3, 32, 32) and digits.size("train") == 10
    assert torch.equal(digits.train[0][:, 0], digits.train[0][:, 2])


def test_normalization():
    digits = load("digits", validation=0)
    images = torch.cat([x for x, _ in digits.batches("train", 500)])
    assert abs(images.mean().item()) < 0.02 and abs(images.std().item() - 1) < 0.02


def test_order_follows_from_seed_and_epoch_alone():
    digits = load("digits", size=32, channels=3, limit=64)
    digits.augment = ("crop", "flip")

    def epoch(seed, number):
        return torch.cat([x for x, _ in digits.batches("train", 16, seed=seed, epoch=number)])

    first = epoch(0, 3)
    torch.randn(17)  # whatever else draws random numbers
    assert torch.equal(epoch(0, 3), first)
    assert not torch.equal(epoch(0, 4), first) and not torch.equal(epoch(1, 3), first)


def test_every_image_once_an_epoch_and_no_short_batch():
    digits = load("digits", limit=50)
    labels = [y for _, y in digits.batches("train", 16, seed=0)]
    assert [len(y) for y in labels] == [16, 16, 16]
    assert [len(y) for _, y in digits.batches("test", 16)] == [16, 16, 16, 2]
    assert [len(y) for _, y in digits.batches("train", 500, seed=0)] == [50], "a batch larger than the data"


def test_bad_names_and_shares():
    with pytest.raises(ValueError, match=r"unknown data set 'cifar'.*digits, mnist"):
        load("cifar")
    for share in (1.0, -0.1):
        with pytest.raises(ValueError, match="share of the training images"):
            load("digits", validation=share)


def test_missing_data_says_what_where_and_how(tmp_path):
    with pytest.raises(DataError, match=rf"CIFAR10 not found; looked in {tmp_path}.*LINL_DATA"):
        load("cifar10", tmp_path, download=False)
    with pytest.raises(DataError, match="no folder of pictures: looked for train/<class>/"):
        load("imagefolder", tmp_path)
    with pytest.raises(DataError, match="no folder of pictures"):
        load(f"imagefolder:{tmp_path}/nothing")


@pytest.mark.parametrize("content", [b"", b"no pickle"])
def test_damaged_data_is_told_from_missing(tmp_path, content):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(content)
    with pytest.raises(DataError, match="incomplete or corrupt: its checksums don't match"):
        load("cifar10", tmp_path)


@pytest.fixture
def small_cifar100(tmp_path):
    """A folder with 300 + 200 pictures of noise, in files as CIFAR-100 has them; and what is in them."""
    inside, rng, written = tmp_path / "cifar-100-python", np.random.default_rng(0), {}
    inside.mkdir()
    for name, count in (("train", 300), ("test", 200)):
        fine, pixels = rng.permutation(count) % 100, rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        written[name] = {"filenames": [f"{i}.png" for i in range(count)], "batch_label": name, "data": pixels}
        written[name] |= {"fine_labels": fine.tolist(), "coarse_labels": (fine // 5).tolist()}
    fine, coarse = ([str(i) for i in range(count)] for count in (100, 20))
    written["meta"] = {"fine_label_names": fine, "coarse_label_names": coarse}
    for name, content in written.items():
        (inside / name).write_bytes(pickle.dumps(content, protocol=2))
    return tmp_path, written


def test_cifar100_has_its_own_checksums(small_cifar100):
    with pytest.raises(DataError, match="CIFAR100 under .* is incomplete or corrupt: its checksums don't match"):
        load("cifar100", small_cifar100[0])


def test_cifar100_is_read_with_its_hundred_labels(small_cifar100, monkeypatch):
    from torchvision.datasets import CIFAR100

    folder, written = small_cifar100
    inside = folder / "cifar-100-python"
    sums = {name: hashlib.md5((inside / name).read_bytes()).hexdigest() for name in written}
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": sums["meta"]})
    found = load("cifar100", folder, download=False)
    assert found.num_classes == 100 and found.input_size == (3, 32, 32)
    assert [found.size(s) for s in ("train", "validation", "test")] == [270, 30, 200]
    images, labels = found.test
    assert labels.tolist() == written["test"]["fine_labels"], "the hundred classes, not the twenty above them"
    assert np.array_equal(images, written["test"]["data"].reshape(-1, 3, 32, 32)), "red, green, blue; row by row"
    (inside / "meta").unlink()
    with pytest.raises(DataError, match="incomplete or corrupt"):
        load("cifar100", folder)


@pytest.fixture
def cifar100_folders(tmp_path, monkeypatch):
    """Noise as 100 folders of 3 + 1 PNGs of 8×8, the pixel at the corner telling the class."""
    monkeypatch.setitem(class_folders.SHAPES, "cifar100", (3, 1, 8))
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("test", 1)):
        for label in range(100):
            folder = tmp_path / "cifar100" / split / f"c{label:02}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                pixels[0, 0] = label, i, split == "test"
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path


def test_cifar100_is_read_from_a_folder_for_each_class(cifar100_folders):
    found = load("cifar100", cifar100_folders, validation=0.1, download=False)
    assert [found.size(s) for s in ("train", "validation", "test")] == [270, 30, 100]
    assert found.num_classes == 100 and found.input_size == (3, 8, 8)
    seen = []
    for split in ("train", "validation", "test"):
        images, labels = getattr(found, split)
        assert torch.equal(images[:, 0, 0, 0].long(), labels), "an image without its label"
        assert (images[:, 2, 0, 0] == (split == "test")).all(), "a test image in training, or the reverse"
        seen += [tuple(row) for row in images[:, :, 0, 0].tolist()]
    assert len(set(seen)) == 400, "an image twice"
    first = load("cifar100", cifar100_folders, limit=60, download=False).train[1]
    assert len(first.unique()) > 30, "a trial run with few images must see many classes"
    again = load("cifar100", cifar100_folders, download=False)
    assert torch.equal(again.train[0], found.train[0]) and torch.equal(again.train[1], found.train[1])


def test_folders_for_each_class_must_be_whole(cifar100_folders):
    root = cifar100_folders / "cifar100"
    (root / "train" / "c07" / "1.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"c07.1\.png can't be read"):
        load("cifar100", cifar100_folders, download=False)
    Image.new("RGB", (9, 8)).save(root / "train" / "c07" / "1.png")
    with pytest.raises(DataError, match=r"1\.png is 9×8 pixels, not 8×8"):
        load("cifar100", cifar100_folders, download=False)
    (root / "train" / "c07" / "1.png").unlink()
    with pytest.raises(DataError, match=r"c07 has 2 pictures \(\*\.png\) of 3"):
        load("cifar100", cifar100_folders, download=False)
    shutil.rmtree(root / "train" / "c07")
    with pytest.raises(DataError, match="has 99 folders, one is due for each of 100 classes"):
        load("cifar100", cifar100_folders, download=False)


def test_missing_cifar_names_both_layouts(tmp_path):
    with pytest.raises(DataError, match=r"torchvision's layout, or cifar100/train/<class>/\*\.png and cifar100/test/"):
        load("cifar100", tmp_path, download=False)
    with pytest.raises(DataError, match=r"\(torchvision's layout\)"):
        load("mnist", tmp_path, download=False)


def test_folders_of_pictures(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 3)):
        for label in ("cat", "dog"):
            (tmp_path / split / label).mkdir(parents=True)
            for i in range(count):
                picture = rng.integers(0, 255, (40 + i, 50, 3), dtype=np.uint8)
                Image.fromarray(picture).save(tmp_path / split / label / f"{i}.png")
    found = load(f"imagefolder:{tmp_path}", size=32, validation=0.2, workers=0)
    assert found.input_size == (3, 32, 32) and found.num_classes == 2
    assert [found.size(s) for s in ("train", "validation", "test")] == [16, 4, 6]
    a, b, c = (torch.cat([x for x, _ in found.batches("train", 8, seed=0, epoch=e)]) for e in (0, 0, 1))
    assert a.shape == (16, 3, 32, 32)
    assert torch.equal(a, b) and not torch.equal(a, c), "crops and flips follow from seed and epoch"
    labels = torch.cat([y for _, y in found.batches("test", 4)])
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    (tmp_path / "val" / "dog").rename(tmp_path / "val" / "wolf")
    with pytest.raises(DataError, match="classes differ between train/ and val/, e.g. dog"):
        load(f"imagefolder:{tmp_path}", size=32)


def pictures(folder, count, draw):
    """train/ and val/ of two classes, `count` pictures each."""
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (folder / split / label).mkdir(parents=True)
            for i in range(count):
                draw(folder / split / label / f"{i}.png")


@pytest.mark.parametrize("limit", [None, 3])
def test_files_of_a_split_come_as_its_batches_do(tmp_path, limit):
    grey = itertools.count(0, 10)
    pictures(tmp_path, 5, lambda path: Image.new("L", (8, 8), next(grey)).save(path))
    found = load(f"imagefolder:{tmp_path}", size=8, validation=0.3, workers=0, normalize="none", limit=limit)
    for split in ("train", "validation", "test"):
        shown = torch.cat([x for x, _ in found.batches(split, 2)])[:, 0, 0, 0]
        told = [Image.open(path).getpixel((0, 0)) for path in found.files(split)]
        assert torch.equal((255 * shown).round().int(), torch.tensor(told, dtype=torch.int32)) and len(told) > 1
    assert {*found.files("train")} < {*found.files()} and len(found.files()) == 10


def test_pictures_kept_apart_are_neither_trained_on_nor_validated(tmp_path):
    pictures(tmp_path, 20, lambda path: Image.new("L", (8, 8), int(path.stem)).save(path))
    plain, found = (load(f"imagefolder:{tmp_path}", size=8, validation=0.25, workers=0, apart=a) for a in ("", "1"))
    assert [plain.size(s) for s in ("train", "validation", "test", "apart")] == [30, 10, 40, 0]
    assert [found.size(s) for s in ("train", "validation", "test", "apart")] == [14, 4, 40, 22]
    apart = found.files("apart")
    assert sorted(path.name for path in apart) == sorted(2 * [f"{i}.png" for i in (1, *range(10, 20))])
    others = [*found.files("train"), *found.files("validation")]
    assert not {*apart} & {*others} and {*apart, *others} == {*found.files()}
    assert torch.cat([y for _, y in found.batches("apart", 5)]).tolist() == 11 * [0] + 11 * [1]
    assert found.fingerprint() != plain.fingerprint(), "a run goes on with the pictures that it began with"
    with pytest.raises(DataError, match="no picture's name begins with 'x'"):
        load(f"imagefolder:{tmp_path}", size=8, apart="x")
    with pytest.raises(ValueError, match="digits is no folder of pictures"):
        load("digits", apart="1")


def noise(path, mode="RGB", kind=None):
    shape = {"RGB": (30, 40, 3), "CMYK": (30, 40, 4), "L": (30, 40)}[mode]
    Image.fromarray(np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8), mode).save(path, kind)


FORMATS = [("RGB", "PNG"), ("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "BMP"), ("CMYK", "TIFF")]


@pytest.mark.parametrize(("mode", "kind"), FORMATS)
def test_a_decoded_picture_is_pillows(tmp_path, mode, kind):
    noise(tmp_path / "x", mode, kind)
    with Image.open(tmp_path / "x") as picture:
        want = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    found = linl.pictures.decoded(tmp_path / "x")
    assert found.dtype == torch.uint8 and found.shape == (3, 30, 40)
    assert (found.int() - want.int()).abs().max() <= (0 if mode != "CMYK" else 3)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_picture_that_cannot_be_read_is_named(tmp_path, workers):
    pictures(tmp_path, 2, noise)
    (tmp_path / "train" / "dog" / "1.png").write_bytes(b"no picture")
    found = load(f"imagefolder:{tmp_path}", size=16, validation=0.0, workers=workers)
    with pytest.raises(
        DataError, match=r"^[^\n]*train/dog/1\.png can't be read as a picture .*: mend it, or take it out"
    ):
        list(found.batches("train", 4, seed=0))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # on a machine with one core
def test_workers_and_a_late_start_change_nothing(tmp_path):
    pictures(tmp_path, 6, noise)
    calm, many = (load(f"imagefolder:{tmp_path}", size=16, validation=0.0, workers=n) for n in (0, 2))
    torch.manual_seed(5)
    whole = list(calm.batches("train", 4, seed=1))
    untouched = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(untouched, torch.rand(1)), "the training's own chance stays as it is"
    for found, first in ((many, 0), (calm, 1), (many, 2)):
        for (x, y), (a, b) in zip(found.batches("train", 4, seed=1, first=first), whole[first:], strict=True):
            assert torch.equal(x, a) and torch.equal(y, b)


def test_a_network_is_scored_with_its_own_crop(tmp_path):
    lite = [linl.crops.standard(f"efficientnet_lite{i}") for i in range(5)]
    assert [c.size for c in lite] == [224, 240, 260, 300, 380]
    assert [c.interpolation for c in lite] == ["bicubic"] * 3 + ["bilinear"] * 2 and lite[0].shorter == 256
    assert linl.crops.standard("alexnet") == linl.crops.Crop(224, 256)
    assert linl.crops.sized(lite[4], 190) == linl.crops.Crop(190, round(lite[4].shorter / 2), "bilinear")
    pictures(tmp_path, 1, lambda path: Image.fromarray(np.tile(np.arange(64, dtype=np.uint8) * 4, (32, 1))).save(path))
    small = load(f"imagefolder:{tmp_path}", validation=0.0, workers=0, crop=linl.crops.Crop(16, 16))
    wide = load(f"imagefolder:{tmp_path}", validation=0.0, workers=0, crop=linl.crops.Crop(16, 32))
    (a, _), (b, _) = (next(f.batches("test", 2)) for f in (small, wide))
    assert a.shape == b.shape == (2, 3, 16, 16)
    spread = [(x[:, 0].amax() - x[:, 0].amin()).item() for x in (a, b)]
    assert spread[0] == pytest.approx(2 * spread[1], rel=0.02), "half the picture was resized to as much"
    with pytest.raises(ValueError, match="a crop of 16 pixels out of 8"):
        linl.crops.Crop(16, 8)
    with pytest.raises(ValueError, match="choose from bilinear, bicubic"):
        linl.crops.Crop(16, 16, "nearest")


def test_random_crops_take_at_least_a_share_of_a_picture(tmp_path):
    """A picture that grows to the right and downwards tells how much of it a crop has seen."""
    across, down = np.meshgrid(*[np.arange(64, dtype=np.uint8) * 4] * 2)
    picture = Image.fromarray(np.stack([across, down, across], -1))
    pictures(tmp_path, 8, picture.save)

    def seen(least: float) -> torch.Tensor:
        crop = linl.crops.Crop(16, least=least)
        found = load(f"imagefolder:{tmp_path}", validation=0.0, workers=0, crop=crop, normalize="none")
        drawn = torch.cat([x for epoch in range(20) for x, _ in found.batches("train", 16, seed=0, epoch=epoch)])
        sides = 16 / 15 * (drawn.flatten(2).amax(2) - drawn.flatten(2).amin(2))[:, :2] * 255 / 252
        return sides.prod(1)

    most, some, whole = (seen(least) for least in (0.08, 0.5, 1.0))
    assert most.min() < 0.15 and most.median() < some.median()
    assert 0.45 < some.min() < 0.6 and whole.min() > 0.9
    crops = [linl.crops.Crop(16), linl.crops.Crop(16, least=0.08), linl.crops.Crop(16, least=0.35)]
    told = [load(f"imagefolder:{tmp_path}", crop=crop).fingerprint() for crop in crops]
    assert told[0] == told[1] != told[2], "other training pictures"
    assert linl.crops.sized(crops[2], 8) == linl.crops.Crop(8, 9, least=0.35)
    for least in (0.0, -1.0, 1.5, float("nan")):
        with pytest.raises(ValueError, match="least = .*: a share of a picture's area"):
            linl.crops.Crop(16, least=least)


def test_real_cifar10(data_folder):
    cifar = load("cifar10", data_folder)
    assert [cifar.size(s) for s in ("train", "validation", "test")] == [45_000, 5_000, 10_000]
    pixels = cifar.train[0].double() / 255
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.tensor(cifar.mean).double(), atol=2e-3, rtol=0)
    assert torch.bincount(cifar.test[1]).tolist() == [1000] * 10


def test_real_mnist(data_folder):
    mnist = load("mnist", data_folder, validation=0)
    assert [mnist.size(s) for s in ("train", "test")] == [60_000, 10_000] and mnist.input_size == (1, 28, 28)
