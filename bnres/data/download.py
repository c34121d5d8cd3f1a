"""Downloads data with pooch, and resumes interrupted downloads."""

from pathlib import Path

from bnres.data.cifar10 import BINARY_ARCHIVE, MD5, URL

CHUNK_BYTES = 1 << 14
TIMEOUT_SECONDS = 30


def download_cifar10(
    folder: Path, url: str = URL + BINARY_ARCHIVE, md5: str = MD5[BINARY_ARCHIVE]
) -> Path:
    """Downloads the binary archive of CIFAR-10 (162 MB) into ``folder``, and returns its path.

    If ``folder`` already holds the archive, nothing is downloaded. If it holds a part of the
    archive, only the missing part is downloaded.

    Raises:
        ValueError: if the download fails or its checksum is wrong.
        ModuleNotFoundError: if pooch or requests is missing. The extra ``bnres[train]`` installs
            both.
    """
    import pooch
    import requests

    name = url.rsplit("/", 1)[-1]
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{name}.partial"

    def resume(url: str, output_file: object, pooch: object) -> None:
        """Downloads the missing bytes of ``partial``, then renames it to ``output_file``."""
        have = partial.stat().st_size if partial.exists() else 0
        # The transfer must not be compressed, because positions and checksum are those of the
        # uncompressed file.
        headers = {"Accept-Encoding": "identity"}
        if have:
            headers["Range"] = f"bytes={have}-"
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS) as response:
            if response.status_code != requests.codes.requested_range_not_satisfiable:
                response.raise_for_status()
                goes_on = response.status_code == requests.codes.partial_content
                with partial.open("ab" if goes_on else "wb") as file:
                    for chunk in response.iter_content(CHUNK_BYTES):
                        file.write(chunk)
        partial.replace(str(output_file))

    try:
        found = pooch.retrieve(url, f"md5:{md5}", name, folder, downloader=resume)
    except (requests.RequestException, OSError, ValueError) as error:
        raise ValueError(f"download of {url} failed: {error}") from error
    return Path(found)
