"""Decodes image files, those of data sets and single pictures."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

# TIFF's tags.
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262


class CorruptImage(ValueError):
    """A file that can't be read as an image; the message names it, in one line."""


def read_rgb(path: Path, size: tuple[int, int] | None = None) -> "Image.Image":
    """The image of a file, with 8 bits each for red, green and blue.

    Gray of more than 8 bits is scaled down: integers of 12 and of 16 bits, integers of 32 bits, which
    must be on the scale of 16, and floats, which must be from 0 to 1. An orientation in EXIF is not
    applied, as torchvision's loader does not apply it.

    Args:
        path: a file that pillow reads.
        size: width and height that are enough; a JPEG is then decoded no larger than needed.

    Raises:
        CorruptImage: if pillow can't read the file, or its values are outside of the scale.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            if size is not None:
                image.draft("RGB", size)
            # pillow would clip them at 255.
            wide = image.mode in ("I", "F") or image.mode.startswith("I;16")
            return (in_eight_bits(image) if wide else image).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise CorruptImage(f"{path} can't be read as an image: {reason}") from error


def in_eight_bits(image: "Image.Image") -> "Image.Image":
    """A gray image of wider values as one of 8 bits.

    Raises:
        ValueError: if there are values outside of the scale.
    """
    import numpy as np
    from PIL import Image

    values, tags = np.asarray(image), getattr(image, "tag_v2", {})
    bits = 12 if tags.get(BITS_PER_SAMPLE) == (12,) else 16
    top = 1 if image.mode == "F" else 2**bits - 1
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= top):
        raise ValueError(f"gray of mode {image.mode} must be from 0 to {top}, got {low} to {high}")
    if tags.get(PHOTOMETRIC) == 0:  # 0 is white
        values = top - values
    eight = np.rint(values * 255) if image.mode == "F" else values >> (bits - 8)
    return Image.fromarray(eight.astype(np.uint8))
