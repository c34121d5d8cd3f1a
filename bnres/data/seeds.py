"""Makes the random generators of a run."""

import hashlib

import torch


def generator_at(seed: int, *place: int | str) -> torch.Generator:
    """Returns a CPU generator that depends only on the run's seed and a place in the run.

    Therefore a resumed run draws the same random numbers as an uninterrupted run. A place is, for
    example, the numbers of an epoch and of a batch.
    """
    text = "/".join(map(str, (seed, *place)))
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
