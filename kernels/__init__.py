"""Triton kernels of bnres, imported as ``bnres.kernels``.

The kernels import only torch and triton, so their folder is outside ``bnres/``. The link
``bnres/kernels`` points to this folder.
"""

if __name__ != "bnres.kernels":
    raise ImportError(
        f"this folder was imported as {__name__!r}; import it as 'bnres.kernels' "
        "(the name 'kernels' on its own belongs to another package)"
    )
