"""Decodes image files to 8-bit RGB."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

# Numbers of TIFF tags.
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262


class CorruptImage(ValueError):
    """Raised when a file can't be read as an image. The message has one line and names the file."""


def read_rgb(path: Path, size: tuple[int, int] | None = None) -> "Image.Image":
    """Reads an image file as RGB with 8 bits for each channel.

    Gray images of more than 8 bits are scaled to 8 bits. Their values must be integers of 12 or
    16 bits, integers of 32 bits from 0 to 65535, or floats from 0 to 1. As in torchvision's loader,
    EXIF orientation is not applied.

    If ``size`` (width, height) is given, a larger JPEG may be decoded at a reduced scale, which is
    faster. The result is not smaller than ``size``.

    Raises:
        CorruptImage: if pillow can't read the file, or its gray values are out of range.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            if size is not None:
                image.draft("RGB", size)
            # Modes of more than 8 bits are scaled, because convert() would clip values above 255.
            wide = image.mode in ("I", "F") or image.mode.startswith("I;16")
            return (in_eight_bits(image) if wide else image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise CorruptImage(f"{path} can't be read as an image: {reason}") from error


def read_image(path: Path, largest_side: int) -> Tensor:
    """Reads an image file as uint8 (3, H, W), and shrinks it if a side exceeds ``largest_side``."""
    import numpy as np

    picture = read_rgb(path)
    picture.thumbnail((largest_side, largest_side))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def in_eight_bits(image: "Image.Image") -> "Image.Image":
    """Scales a gray image of more than 8 bits to 8 bits."""
    import numpy as np
    from PIL import Image

    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    bits = 12 if tags.get(BITS_PER_SAMPLE) == (12,) else 16
    top = 1 if image.mode == "F" else 2**bits - 1
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= top):
        raise ValueError(
            f"gray values of mode {image.mode} must be from 0 to {top}, got {low} to {high}"
        )
    if tags.get(PHOTOMETRIC) == 0:  # WhiteIsZero: the value 0 is white
        values = top - values
    eight = np.rint(values * 255) if image.mode == "F" else values >> (bits - 8)
    return Image.fromarray(eight.astype(np.uint8))
