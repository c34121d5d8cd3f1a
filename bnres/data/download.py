"""Downloads data with pooch."""

from pathlib import Path

from bnres.data.cifar10 import BINARY_ARCHIVE, MD5, URL


def download_cifar10(
    folder: Path, url: str = URL + BINARY_ARCHIVE, md5: str = MD5[BINARY_ARCHIVE]
) -> Path:
    """Downloads the binary archive of CIFAR-10 (162 MB) into ``folder``, and returns its path.

    If ``folder`` already holds the archive, nothing is downloaded.

    Raises:
        ValueError: if the download fails or its checksum is wrong.
        ModuleNotFoundError: if pooch is missing. The extra ``bnres[train]`` installs it.
    """
    import pooch

    try:
        return Path(pooch.retrieve(url, f"md5:{md5}", url.rsplit("/", 1)[-1], folder))
    except (OSError, ValueError) as error:  # pooch uses requests, which raises OSErrors
        raise ValueError(f"download of {url} failed: {error}") from error
