"""Random generators that depend only on a seed and on a place in a run."""

import hashlib

import torch


def generator_at(seed: int, *place: int | str) -> torch.Generator:
    """A generator on the CPU for a place, such as an epoch and a step of it.

    A run that goes on from a checkpoint draws what it would have drawn without the break.
    """
    text = "/".join(map(str, (seed, *place)))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
