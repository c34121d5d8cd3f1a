"""Triton kernels of bnres, imported as ``bnres.kernels``.

The files are in a folder outside ``bnres/``, because they need nothing else of bnres: they import
only torch and triton. The link ``bnres/kernels`` points to this folder.
"""

if __name__ != "bnres.kernels":
    raise ImportError(
        f"this folder was imported as {__name__!r}; import it as 'bnres.kernels' "
        "(the name 'kernels' on its own belongs to another package)"
    )
