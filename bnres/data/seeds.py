"""Makes random generators that depend only on a seed and a position in a run."""

import hashlib

import torch


def generator_at(seed: int, *place: int | str) -> torch.Generator:
    """Returns a CPU generator for a position in a run, such as an epoch and a batch.

    Therefore a resumed run draws the same random numbers as an uninterrupted run.
    """
    text = "/".join(map(str, (seed, *place)))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
