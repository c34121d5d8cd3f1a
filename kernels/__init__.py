"""Triton kernels of bnres, imported as ``bnres.kernels``.

The folder is not inside ``bnres/`` because it depends on nothing there: on torch and triton only.
"""

if __name__ != "bnres.kernels":
    raise ImportError(
        f"this folder was imported as {__name__!r}; its import name is 'bnres.kernels' "
        "(the name 'kernels' on its own belongs to another package)"
    )
