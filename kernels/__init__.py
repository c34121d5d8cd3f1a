"""Triton kernels of bnres, imported as ``bnres.kernels``.

The folder is outside ``bnres/`` because it depends only on torch and triton, not on bnres.
"""

if __name__ != "bnres.kernels":
    raise ImportError(
        f"this folder was imported as {__name__!r}; its import name is 'bnres.kernels' "
        "(the name 'kernels' on its own belongs to another package)"
    )
