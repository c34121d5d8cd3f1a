"""Tests that the kernels and ATen augment images as torchvision does."""

import importlib
import math

import pytest
import torch

from benchmarks.torchvision_import import torchvision
from bnres import augment, use_backend
from bnres.augment import transforms as bt
from bnres.augment.segments import segments, size_of
from bnres.data.images import read_image
from tests.command import run
from tests.device import DEVICE

v2 = importlib.import_module(f"{torchvision.__name__}.transforms.v2")
F = v2.functional

# Tolerances of geometric steps and of colours. bnres and torchvision both compute in fp32, but they
# add the weighted pixels of a resize, and the gray values of an image, in different orders.
GEOMETRY, COLOR = 1e-5, 1e-4
ROUTES = ("aten", "kernels")


@pytest.fixture(params=ROUTES)
def route(request):
    if request.param == "aten":
        with use_backend("aten"):
            yield "cpu"
    else:
        yield DEVICE


def images(n, channels, height, width, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        return torch.randint(256, (n, channels, height, width), generator=generator).byte()
    return torch.rand((n, channels, height, width), generator=generator).to(dtype)


def by_torchvision(x, draws):
    """Applies the drawn transforms with torchvision in fp32, one image and one step at a time."""
    found = []
    for index, image in enumerate(x.float() / 255 if x.dtype == torch.uint8 else x.float()):
        for draw in draws:
            if isinstance(draw, bt.Flip):
                flip = F.vertical_flip if draw.vertical else F.horizontal_flip
                image = flip(image) if draw.chosen[index] else image
            elif isinstance(draw, bt.Crop):
                box = draw.boxes[index].tolist()
                if draw.resizes:
                    image = F.resized_crop(image, *box, list(draw.size), antialias=True)
                else:
                    image = F.crop(image, *box)
            elif isinstance(draw, bt.Color):
                brightness, contrast, saturation, hue = draw.factors[index].float().tolist()
                for number in draw.numbers[index].tolist():
                    if number == 0:
                        image = F.adjust_brightness(image, brightness)
                    elif number == 1:
                        image = F.adjust_contrast(image, contrast)
                    elif number == 2:
                        image = F.adjust_saturation(image, saturation)
                    elif number == 3:
                        image = F.adjust_hue(image, hue)
            else:
                image = F.normalize(image, list(draw.mean), list(draw.std))
        found.append(image)
    return torch.stack(found)


FLIPS = [augment.RandomHorizontalFlip(), augment.RandomVerticalFlip()]
JITTER = augment.ColorJitter(0.5, 0.2, 0.6, 0.4)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.3, 0.25)


class TestValues:
    def check(self, route, chain, x, tolerance, **options):
        compose = augment.Compose(chain, **options)
        n, _, height, width = x.shape
        draws = compose.draws(n, height, width, torch.Generator().manual_seed(1))
        assert len(segments(draws)) == 1
        actual = compose.apply(x.to(route), draws)
        expected = by_torchvision(x, draws)
        assert actual.shape == expected.shape and actual.dtype == compose.dtype
        error = (actual.cpu().float() - expected).abs().max().item()
        assert error <= tolerance, error
        return actual

    @pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
    @pytest.mark.parametrize(
        ("size", "out"), [((32, 32), (32, 32)), ((40, 24), (16, 20)), ((9, 13), (21, 17))]
    )
    def test_flips_and_resized_crop(self, route, dtype, size, out):
        crop = augment.RandomResizedCrop(out, scale=(0.1, 1.0), ratio=(0.5, 2))
        self.check(route, [*FLIPS, crop, *FLIPS], images(6, 3, *size, dtype), GEOMETRY)

    @pytest.mark.parametrize("padding", [4, (1, 3), (0, 1, 2, 3)])
    def test_padded_crop_is_exact(self, route, padding):
        chain = [*FLIPS, augment.RandomCrop((15, 16), padding), *FLIPS]
        self.check(route, chain, images(8, 3, 16, 16), 0)

    @pytest.mark.parametrize("size", [(8, 8), (9, 6), (15, 16)])
    def test_center_crop_is_exact(self, route, size):
        x = images(2, 3, 15, 16)
        actual = augment.CenterCrop(size)(x.to(route)).cpu()
        assert torch.equal(actual, v2.CenterCrop(size)(x))

    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize("order", ["crop first", "color first"])
    def test_whole_chain(self, route, order, channels):
        crop = augment.RandomResizedCrop(20, scale=(0.3, 0.8), ratio=(0.5, 2))
        chain = [crop, JITTER] if order == "crop first" else [JITTER, crop]
        scale = augment.Normalize(MEAN[:channels], STD[:channels])
        x = images(8, channels, 28, 24)
        # Normalising divides by STD, so an error grows by a factor of up to 1 / min(STD).
        self.check(route, [FLIPS[0], *chain, scale], x, COLOR / min(STD))

    @pytest.mark.parametrize("order", ["crop first", "color first"])
    def test_images_that_several_programs_share(self, route, order):
        chain = [JITTER, augment.RandomCrop(34, padding=2)]
        if order == "crop first":
            chain = chain[::-1]
        self.check(route, [FLIPS[1], *chain], images(3, 3, 36, 35), COLOR)

    @pytest.mark.parametrize(
        "amounts", [(0.5, None, None, None), (None, 0.9, None, None), (None, None, 0.9, None),
                    (None, None, None, 0.5), (None, (0.5, 0.7), None, (0.1, 0.2))],
    )  # fmt: skip
    def test_single_colours(self, route, amounts):
        x = images(6, 3, 8, 8)
        x[0] = 0.25  # gray has no hue
        x[1, 1] = x[1, 0]  # red equals green, so often two channels have the maximum
        self.check(route, [augment.ColorJitter(*amounts)], x, COLOR)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
    def test_output(self, route, dtype, memory_format):
        x = images(4, 3, 16, 16, torch.uint8)
        y = self.check(
            route, [*FLIPS, augment.RandomCrop(16, 2), augment.Normalize(MEAN, STD)], x,
            torch.finfo(dtype).eps * 2, dtype=dtype, memory_format=memory_format,
        )  # fmt: skip
        assert y.is_contiguous(memory_format=memory_format)

    def test_input_layout_is_kept_and_does_not_change_values(self, route):
        chain = augment.Compose([*FLIPS, augment.RandomResizedCrop(8)])
        x = images(3, 3, 12, 12).to(route)
        draws = chain.draws(3, 12, 12, torch.Generator().manual_seed(0))
        last = chain.apply(x.contiguous(memory_format=torch.channels_last), draws)
        assert last.is_contiguous(memory_format=torch.channels_last)
        strided = torch.stack((x, x), -1)[..., 0]
        assert torch.equal(chain.apply(x, draws), last)
        assert torch.equal(chain.apply(strided, draws), last)

    def test_a_chain_that_needs_several_kernels(self, route):
        chain = augment.Compose(
            [augment.RandomCrop(12), JITTER, augment.RandomCrop(8), augment.RandomHorizontalFlip(),
             augment.Normalize(MEAN, STD), augment.RandomVerticalFlip()]
        )  # fmt: skip
        x = images(4, 3, 16, 16)
        draws = chain.draws(4, 16, 16, torch.Generator().manual_seed(0))
        assert len(segments(draws)) == 3
        actual = chain.apply(x.to(route), draws).cpu()
        assert (actual - by_torchvision(x, draws)).abs().max() <= COLOR / min(STD)

    def test_empty_batch_and_empty_chain(self, route):
        x = images(2, 3, 8, 8, torch.uint8).to(route)
        # The compiled kernel multiplies by 1/255. Dividing by 255, as here, rounds differently.
        error = (augment.Compose([])(x).cpu() - x.cpu().float() / 255).abs().max()
        assert error <= 2**-23
        assert augment.Compose(FLIPS)(x[:0]).shape == (0, 3, 8, 8)


NAN, INF = float("nan"), float("inf")


class TestNotFinite:
    """Tests that NaN and infinity spread to the same pixels as in torchvision."""

    def check(self, route, draws, x, tolerance):
        actual = bt.apply_draws(x.to(route), draws).cpu()
        expected = by_torchvision(x, draws)
        assert torch.equal(actual.isnan(), expected.isnan())
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance, equal_nan=True)
        return actual

    def images(self, value, channels=3, size=(9, 9)):
        """Returns images with ``value`` in one channel of one pixel. The last image is finite."""
        places = [(0, 0), (4, 5), (size[0] - 1, size[1] - 1), (2, size[1] - 1)]
        x = images(len(places) + 1, channels, *size)
        for index, (row, col) in enumerate(places):
            x[index, index % channels, row, col] = value
        return x

    @pytest.mark.parametrize("value", [NAN, INF, -INF])
    @pytest.mark.parametrize("channels", [1, 3])
    @pytest.mark.parametrize(
        ("name", "amount"),
        [("brightness", 0.7), ("brightness", 0.0), ("contrast", 0.7), ("contrast", 1.4),
         ("saturation", 0.7), ("saturation", 1.4)],
    )  # fmt: skip
    def test_colours(self, route, name, amount, channels, value):
        x = self.images(value, channels)
        draw = augment.ColorJitter(**{name: (amount, amount)}).draw(*size_of(x), None)
        y = self.check(route, [draw], x, COLOR)
        assert y[-1].isfinite().all()
        if value is NAN:
            assert y[0, 0, 0, 0].isnan()

    @pytest.mark.parametrize("turn", [0.2, -0.4])
    def test_hue(self, route, turn):
        x = self.images(NAN)
        y = self.check(route, [bt.ColorJitter(hue=(turn, turn)).draw(*size_of(x), None)], x, COLOR)
        assert y.isnan().all(1).sum() == y.isnan().any(1).sum() == 4

    @pytest.mark.parametrize("value", [INF, -INF])
    def test_hue_of_infinity_is_nan(self, route, value):
        """All channels of the pixel become NaN.

        In torchvision only one channel does, because torchvision casts the NaN hue to int.
        """
        x = self.images(value)
        y = augment.ColorJitter(hue=(0.2, 0.2))(x.to(route)).cpu()
        assert torch.equal(y.isnan(), x.isinf().any(1, keepdim=True).expand_as(x))

    @pytest.mark.parametrize("size", [(8, 8), (36, 35)])
    @pytest.mark.parametrize("order", ["crop first", "color first"])
    def test_colours_of_a_chain(self, route, order, size):
        x = self.images(NAN, size=size)
        generator = torch.Generator().manual_seed(3)
        chain = [JITTER, augment.RandomCrop(7)]
        chain = chain if order == "color first" else chain[::-1]
        draws = augment.Compose(chain).draws(*size_of(x), generator)
        y = self.check(route, draws, x, COLOR)
        assert y[-1].isfinite().all()
        # If colours come first, contrast spreads the NaN before the crop can remove it.
        assert y.isnan().any() or order == "crop first"

    @pytest.mark.parametrize("value", [NAN, INF])
    def test_flips_padding_and_normalise(self, route, value):
        x = self.images(value)
        flips = [f.draw(*size_of(x), None) for f in (bt.RandomHorizontalFlip(1.0), *FLIPS)]
        pad = augment.RandomCrop(13, padding=2).draw(*size_of(x), None)
        scale = augment.Normalize(MEAN, STD).draw(*size_of(x), None)
        y = self.check(route, [*flips, pad, scale], x, 1e-6)
        assert [int((~image.isfinite()).sum()) for image in y] == [1, 1, 1, 1, 0]

    @pytest.mark.parametrize("value", [NAN, INF])
    @pytest.mark.parametrize(
        ("box", "out"),
        [
            ((0, 0, 9, 9), (9, 9)),
            ((0, 0, 9, 9), (9, 5)),
            ((0, 0, 9, 9), (3, 9)),
            ((0, 0, 9, 9), (3, 3)),
            ((1, 2, 3, 4), (9, 10)),
            ((3, 4, 5, 4), (3, 7)),
            ((0, 6, 2, 3), (7, 2)),
        ],
    )
    @pytest.mark.parametrize("flips", [pytest.param([], marks=pytest.mark.slow), [0, 1]])
    def test_resized_crops(self, route, box, out, value, flips):
        x = self.images(value)
        draws = [bt.Crop(torch.tensor([box]).expand(len(x), 4), out, True)]
        draws += [bt.Flip(torch.ones(len(x), dtype=torch.bool), bool(axis)) for axis in flips]
        y = self.check(route, draws, x, GEOMETRY)
        top, left, height, width = box
        for index, image in enumerate(x):
            inside = image[:, top : top + height, left : left + width].isfinite().all()
            assert y[index].isfinite().all() == inside

    @pytest.mark.parametrize("route", ["aten"], indirect=True)
    @pytest.mark.parametrize("side", [64, 65])
    def test_both_ways_to_resize(self, route, side):
        """On the ATen route, finite images of at most 64×64 are resized by matrix products.

        Other images are resized one by one.
        """
        x = self.images(NAN, size=(side, side))
        draws = [bt.Crop(torch.tensor([[0, 2, side, 30]]).expand(len(x), 4), (6, 5), True)]
        y = self.check(route, draws, x, GEOMETRY)
        assert [bool(image.isnan().any()) for image in y] == [False, True, False, False, False]


@pytest.mark.skipif(DEVICE == "cuda", reason="counts the memory that the interpreter touches")
@pytest.mark.parametrize("order", ["crop first", "color first"])
def test_an_image_is_read_once_and_written_once(order):
    from benchmarks.audit.memory import count_traffic

    chain = [augment.RandomCrop(16), JITTER]
    chain = [*(chain if order == "crop first" else chain[::-1]), augment.Normalize(MEAN, STD)]
    compose = augment.Compose([FLIPS[0], *chain], dtype=torch.float16)
    x = images(4, 3, 16, 16, torch.uint8)
    with count_traffic() as traffic:
        y = compose(x)
    # If colours come first, the whole image is read twice, because contrast needs the image's mean.
    reads = 1 if order == "crop first" else 2
    assert traffic.lanes == reads * x.numel() + y.numel() * 2
    with count_traffic() as traffic:
        augment.Compose([augment.RandomResizedCrop(16), JITTER], dtype=torch.float16)(x)
    assert traffic.sectors <= x.numel() + y.numel() * 2


def test_both_routes_draw_the_same():
    chain = augment.Compose([*FLIPS, augment.RandomResizedCrop(12, scale=(0.3, 0.8)), JITTER])
    x = images(16, 3, 20, 20, torch.uint8)
    found = []
    for backend, device in (("aten", "cpu"), (None, DEVICE)):
        generator = torch.Generator().manual_seed(7)
        if backend:
            with use_backend(backend):
                found.append(chain(x.to(device), generator))
        else:
            found.append(chain(x.to(device), generator).cpu())
    assert (found[0] - found[1]).abs().max() <= COLOR
    assert not torch.equal(found[0][0], found[0][1])


def test_a_transform_is_a_chain_of_one():
    x = images(32, 1, 4, 4)
    y = augment.RandomHorizontalFlip()(x, torch.Generator().manual_seed(0))
    flipped = [torch.equal(a, b.flip(-1)) for a, b in zip(y, x, strict=True)]
    kept = [torch.equal(a, b) for a, b in zip(y, x, strict=True)]
    assert all(a != b for a, b in zip(flipped, kept, strict=True)) and 8 < sum(flipped) < 24


COUNT = 4000
# If two samples have COUNT draws each from the same distribution, their Kolmogorov-Smirnov distance
# exceeds this limit with probability 1e-6.
DISTANCE = math.sqrt(-math.log(1e-6 / 2) / COUNT)


def distance(a, b):
    """Returns the Kolmogorov-Smirnov distance of two samples."""
    a, b = a.double().sort().values, b.double().sort().values
    at = torch.cat((a, b))
    below = [torch.searchsorted(s, at, right=True) / len(s) for s in (a, b)]
    return (below[0] - below[1]).abs().max().item()


class TestDistributions:
    @pytest.mark.parametrize(
        ("size", "scale", "ratio"),
        [((32, 32), (0.08, 1.0), (3 / 4, 4 / 3)), ((24, 60), (0.5, 1.0), (0.5, 2)),
         ((10, 80), (0.9, 1.0), (0.5, 2)), ((80, 10), (0.9, 1.0), (0.5, 2))],
    )  # fmt: skip
    def test_resized_crop(self, size, scale, ratio):
        ours = augment.RandomResizedCrop(8, scale, ratio)
        boxes = ours.draw(COUNT, *size, torch.Generator().manual_seed(0)).boxes
        torch.manual_seed(0)
        theirs = v2.RandomResizedCrop(8, scale, ratio)
        image = torch.empty(3, *size)
        names = ("top", "left", "height", "width")
        drawn = [theirs.make_params([image]) for _ in range(COUNT)]
        for column, name in enumerate(names):
            expected = torch.tensor([d[name] for d in drawn])
            assert distance(boxes[:, column], expected) <= DISTANCE, name
        assert (boxes[:, 0] >= 0).all() and (boxes[:, 0] + boxes[:, 2] <= size[0]).all()
        assert (boxes[:, 1] >= 0).all() and (boxes[:, 1] + boxes[:, 3] <= size[1]).all()

    def test_fallback_is_central(self):
        crop = augment.RandomResizedCrop(8, scale=(1.0, 1.0), ratio=(1.0, 1.0))
        boxes = crop.draw(3, 10, 20, None).boxes
        assert boxes.tolist() == [[0, 5, 10, 10]] * 3

    def test_padded_crop(self):
        ours = augment.RandomCrop(32, padding=4).draw(COUNT, 32, 32, None).boxes
        theirs = v2.RandomCrop(32, padding=4)
        image = torch.empty(3, 32, 32)
        drawn = [theirs.make_params([image]) for _ in range(COUNT)]
        for column, name in enumerate(("top", "left")):
            expected = torch.tensor([d[name] for d in drawn]) - 4
            assert distance(ours[:, column], expected) <= DISTANCE
        assert set(ours[:, 0].tolist()) == set(range(-4, 5))

    def test_jitter(self):
        draw = augment.ColorJitter(0.5, 2.0, (0.2, 0.6), 0.4).draw(COUNT, 8, 8, None)
        theirs = v2.ColorJitter(0.5, 2.0, (0.2, 0.6), 0.4)
        drawn = [theirs.make_params([]) for _ in range(COUNT)]
        names = ("brightness", "contrast", "saturation", "hue")
        for column, name in enumerate(names):
            expected = torch.tensor([d[f"{name}_factor"] for d in drawn])
            assert distance(draw.factors[:, column], expected) <= DISTANCE, name
        orders = {tuple(order) for order in draw.numbers.tolist()}
        assert len(orders) == 24 and all(sorted(order) == [0, 1, 2, 3] for order in orders)
        counts = draw.numbers[:, 0].bincount() / COUNT
        assert (counts - 0.25).abs().max() < 0.035  # five standard deviations

    @pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
    def test_flip(self, p):
        chosen = augment.RandomVerticalFlip(p).draw(COUNT, 8, 8, None).chosen
        assert abs(chosen.double().mean().item() - p) <= 5 * math.sqrt(p * (1 - p) / COUNT)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: augment.RandomHorizontalFlip(1.5), "p must be from 0 to 1"),
        (lambda: augment.RandomResizedCrop(0), "size must be one or two integers of at least 1"),
        (lambda: augment.RandomResizedCrop(8, scale=(1.0, 0.5)), "scale must be two numbers"),
        (lambda: augment.RandomCrop(8, padding=-1), "padding must be 1, 2 or 4 integers"),
        (lambda: augment.ColorJitter(hue=0.6), "hue must be within"),
        (lambda: augment.ColorJitter(brightness=-1), "brightness must be at least 0, got -1"),
        (lambda: augment.Normalize((0.5,), (0.0,)), "std must not contain 0"),
        (lambda: augment.Normalize((0.5,), (0.1, 0.2)), "mean and std must have the same length"),
        (lambda: augment.Compose([], dtype=torch.float64), "dtype must be fp32, fp16 or bf16"),
        (lambda: augment.RandomCrop(9)(images(1, 3, 8, 8)), "at most the size of the padded"),
        (lambda: augment.CenterCrop(9)(images(1, 3, 8, 8)), "size must be at most the images'"),
        (lambda: augment.Compose([])(images(1, 2, 8, 8)), "with 1 or 3 channels"),
        (lambda: augment.Compose([])(torch.ones(3, 8, 8)), r"must be \(N, C, H, W\)"),
        (lambda: augment.Compose([])(torch.ones(1, 3, 8, 8).int()), "must be uint8 or floating"),
        (lambda: augment.Normalize((0.5,), (1.0,))(images(1, 3, 8, 8)), "must have 1 channels"),
    ],
)  # fmt: skip
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_other_steps_are_refused():
    with pytest.raises(TypeError, match=r"must be transforms of bnres.augment, got ToTensor"):
        augment.Compose([v2.ToTensor()])


@pytest.mark.usefixtures("aten")
class TestPicture:
    def test_of_a_photo_and_of_a_data_set(self, tmp_path):
        pillow = importlib.import_module("PIL.Image")
        photo = tmp_path / "photo.png"
        pillow.fromarray(images(1, 3, 60, 90, torch.uint8)[0].permute(1, 2, 0).numpy()).save(photo)
        for source in (str(photo), "digits"):
            out = tmp_path / f"{len(source)}.png"
            run("augment", source, "--out", out)
            with pillow.open(out) as picture:
                assert picture.size[0] == 640 and picture.size[1] > 1000

    def test_photo_is_made_smaller(self, tmp_path):
        pillow = importlib.import_module("PIL.Image")
        photo = tmp_path / "photo.png"
        pillow.new("L", (1000, 500), 77).save(photo)
        image = read_image(photo, 400)
        assert image.shape == (3, 200, 400) and (image == 77).all()

    @pytest.mark.parametrize("name", ["nothing", "text.png"])
    def test_bad_image(self, tmp_path, name):
        (tmp_path / "text.png").write_text("no picture")
        out = tmp_path / "grid.png"
        line = run("augment", tmp_path / name, "--out", out, code=2)
        assert "image" in line and not out.exists()
