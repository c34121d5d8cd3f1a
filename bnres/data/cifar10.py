"""Reads the published files of CIFAR-10 (Krizhevsky, 2009): the binary or the Python version.

The files are read from the extracted folder, or from the archive without extracting it.
"""

import hashlib
import lzma
import tarfile
import zlib
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor

from bnres.data.dataset import ImageDataset, make_dataset
from bnres.data.pickles import load_arrays

URL = "https://www.cs.toronto.edu/~kriz/"
BINARY_ARCHIVE, PYTHON_ARCHIVE = "cifar-10-binary.tar.gz", "cifar-10-python.tar.gz"
MD5 = {
    BINARY_ARCHIVE: "c32a1d4ab5d03f1284b67883e8d87530",
    PYTHON_ARCHIVE: "c58f30108f718f92721af3b95e74349a",
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
BINARY = tuple(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"
PYTHON = tuple(f"data_batch_{i}" for i in range(1, 6)), "test_batch"
FILES = {*BINARY[0], BINARY[1], *PYTHON[0], PYTHON[1]}
CLASS_NAMES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
IMAGE_SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32


def load_cifar10(path: Path, *, checksum: bool = True) -> ImageDataset:
    """Reads CIFAR-10.

    If a folder has both versions, the binary one is read, because it has no pickles.

    Args:
        path: the archive, the extracted folder, or a folder that contains either.
        checksum: whether to compare archives and pickles with their published MD5, and binary files
            with their published length. If False, any files in CIFAR-10's format are accepted.

    Raises:
        ValueError: if the data is not found, if a file is truncated or has the wrong checksum, if
            a pickle contains anything but numbers, strings, containers and uint8 arrays, or if a
            label is out of range.
    """
    source, contents = _read(Path(path), checksum)
    is_binary = BINARY[1] in contents
    train_names, test_name = BINARY if is_binary else PYTHON
    decode = _decode_binary if is_binary else _decode_pickle
    parts = {}
    for name in (*train_names, test_name):
        if name not in contents:
            raise ValueError(f"{source} has no {name}")
        images, labels = decode(contents[name], f"{source}: {name}", checksum)
        wrong = labels[(labels < 0) | (labels >= len(CLASS_NAMES))].tolist()
        if labels.shape != images.shape[:1] or wrong:
            raise ValueError(
                f"{source}: {name} must have {len(images)} labels from 0 to 9, one for each image, "
                f"got {labels.numel()} labels" + (f", one of which is {wrong[0]}" if wrong else "")
            )
        parts[name] = images, labels
    train = [torch.cat(part) for part in zip(*(parts[n] for n in train_names), strict=True)]
    return make_dataset("cifar10", CLASS_NAMES, (train[0], train[1]), parts[test_name])


def _read(path: Path, checksum: bool) -> tuple[Path, dict[str, bytes]]:
    """Returns the path of the archive or folder, and the contents of its files by name."""
    if path.is_dir():
        for folder in (path, path / "cifar-10-batches-bin", path / "cifar-10-batches-py"):
            for train_names, test_name in (BINARY, PYTHON):
                if (folder / test_name).is_file():
                    found = [folder / name for name in (*train_names, test_name)]
                    return folder, {p.name: p.read_bytes() for p in found if p.is_file()}
        for name in (BINARY_ARCHIVE, PYTHON_ARCHIVE):
            if (path / name).is_file():
                return path / name, _read_archive(path / name, checksum)
        raise ValueError(
            f"data: {path} holds neither {BINARY_ARCHIVE} nor {PYTHON_ARCHIVE}, nor extracted files"
        )
    if not path.is_file():
        raise ValueError(f"data: there is no file or folder {str(path)!r}")
    return path, _read_archive(path, checksum)


def _read_archive(path: Path, checksum: bool) -> dict[str, bytes]:
    if checksum:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "md5").hexdigest()
        if found not in (MD5[BINARY_ARCHIVE], MD5[PYTHON_ARCHIVE]):
            raise ValueError(
                f"{path} is damaged, or not a published archive of CIFAR-10: its MD5 is {found}"
            )
    contents: dict[str, bytes] = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if member.isfile() and name in FILES:
                    content = archive.extractfile(member)
                    assert content is not None
                    contents[name] = content.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not contents:
        raise ValueError(f"{path} holds no file of CIFAR-10")
    return contents


def _decode_binary(content: bytes, source: str, checksum: bool) -> tuple[Tensor, Tensor]:
    """Decodes records. Each is a label (one byte), then the image's red, green and blue planes."""
    record, published = 1 + PIXELS, 10_000
    if not content or len(content) % record or (checksum and len(content) != published * record):
        raise ValueError(
            f"{source} is damaged: {len(content)} bytes, "
            f"{f'not {published * record}' if checksum else f'not a multiple of {record}'}"
        )
    table = torch.frombuffer(bytearray(content), dtype=torch.uint8).view(-1, record)
    return table[:, 1:].reshape(-1, *IMAGE_SHAPE), table[:, 0].long()


def _decode_pickle(content: bytes, source: str, checksum: bool) -> tuple[Tensor, Tensor]:
    name = source.rsplit(" ", 1)[-1]
    if checksum:
        found = hashlib.md5(content, usedforsecurity=False).hexdigest()
        if found != MD5[name]:
            raise ValueError(f"{source} is damaged: its MD5 is {found}, not {MD5[name]}")
    batch = load_arrays(content, source)
    try:
        images = torch.from_numpy(batch[b"data"]).view(-1, *IMAGE_SHAPE)
        return images, torch.tensor(batch[b"labels"], dtype=torch.long)
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{source} is not a batch of CIFAR-10: {error!r}") from error
