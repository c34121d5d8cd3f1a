"""Triton kernels of bnres, imported as ``bnres.kernels``.

The folder is outside ``bnres/`` because the kernels need only torch and triton, and not the rest
of bnres.
"""

if __name__ != "bnres.kernels":
    raise ImportError(
        f"this folder was imported as {__name__!r}; its import name is 'bnres.kernels' "
        "(the name 'kernels' on its own belongs to another package)"
    )
