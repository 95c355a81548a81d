"""A file of weights on the web, fetched once into torch's folder of such files (`$TORCH_HOME/hub/checkpoints`)."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

import torch

from rcnn.errors import DownloadError, Problem

# Of a name that ends with the first digits of the file's SHA-256, as torch's and OpenMMLab's do.
_NAMED_HASH = re.compile(r"-([0-9a-f]{8,64})\.\w+")
_TIMEOUT_S = 10
_CHUNK_BYTES = 1 << 20


def is_url(name: str) -> bool:
    """Whether `name` is an address on the web, and no file."""
    return name.startswith(("http://", "https://"))


def place_of(url: str) -> Path:
    """Where the file of that address lies once it is fetched, or is put by hand. Raises `DownloadError`."""
    try:
        name = Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name
    except ValueError:  # half a bracket, where an address of IPv6 would stand
        name = ""
    if not name.isprintable() or name in ("", ".."):
        raise DownloadError(Problem(where=url, given="an address without the name of a file"))
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def fetch_weights(url: str, *, otherwise: str) -> Path:
    """The file of that address, from torch's folder or fetched into it.

    A digest in its name is compared with what arrives. Raises `DownloadError`, which names the place where the file
    can be put by hand, and what to do `otherwise`.
    """
    target = place_of(url)
    if target.is_file():
        return target
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _receive(url, part, target.name)
        os.replace(part, target)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        given = f"could not be fetched ({error or type(error).__name__})"
        remedy = f"put the file at {target}, or {otherwise}"
        raise DownloadError(Problem(where=url, given=given, remedy=remedy)) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return target


def _receive(url: str, part: Path, name: str) -> None:
    """Raises ValueError for a file that is cut, or that is not the one that its name promises."""
    digest, have = hashlib.sha256(), 0
    with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response, part.open("wb") as file:
        while chunk := response.read(_CHUNK_BYTES):
            file.write(chunk)
            digest.update(chunk)
            have += len(chunk)
        length = response.headers.get("Content-Length")
    if length is not None and have != int(length):
        raise ValueError(f"the connection ended after {have} of {length} bytes")
    named = _NAMED_HASH.search(name)
    if named is not None and not digest.hexdigest().startswith(named[1]):
        raise ValueError(f"what arrived has the SHA-256 {digest.hexdigest()}, by its name one that begins {named[1]}")
