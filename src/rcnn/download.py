"""A file of weights on the web, fetched once into torch's folder of such files (`$TORCH_HOME/hub/checkpoints`).

A name that ends with digits of the file's SHA-256, as torch's and OpenMMLab's do, is of one content, whatever the
address: such a file lies where torch.hub has it, so that what torch fetched is used here, and the other way round. Any
other name may be of many (`model_final.pth`): such a file lies in a folder of its address, beside the SHA-256 of what
arrived (NAME.sha256, as `sha256sum -c` reads it). Both are compared whenever the file is used again.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import re
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from pathlib import Path

import torch

from rcnn.errors import DownloadError, Problem

# The first digits of a SHA-256, and no day (model-20200130.pth).
_DIGEST_IN_NAME = re.compile(
    r"-(?!(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\.)(?P<digest>[0-9a-f]{8,64})\.\w+"
)
_TIMEOUT_S = 10
_CHUNK_BYTES = 1 << 20


def is_url(name: str) -> bool:
    """Whether `name` is an address on the web, and no file."""
    return name.startswith(("http://", "https://"))


def digest_in(name: str) -> str | None:
    """The first digits of the file's SHA-256, where its name ends with them."""
    found = _DIGEST_IN_NAME.search(name)
    return found and found["digest"]


def place_of(url: str) -> Path:
    """Where the file of that address lies once it is fetched, or is put by hand. Raises `DownloadError`."""
    try:
        name = Path(urllib.parse.unquote(urllib.parse.urlsplit(url).path)).name
    except ValueError:  # half a bracket, where an address of IPv6 would stand
        name = ""
    if not name.isprintable() or name in ("", ".."):
        raise DownloadError(Problem(where=url, given="an address without the name of a file"))
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    if digest_in(name) is None:
        address, _ = urllib.parse.urldefrag(url)
        folder /= hashlib.sha256(address.encode(errors="surrogatepass")).hexdigest()[:16]
    return folder / name


def _unsaid(text: str) -> None:
    """Nobody is told."""


def fetch_weights(url: str, *, otherwise: str, say: Callable[[str], None] = _unsaid) -> Path:
    """The file of that address, from torch's folder or fetched into it; which of the two, `say` is told.

    Raises `DownloadError` for a file that does not arrive whole or is not the one that its name promises, with the
    place where it can be put by hand, and what to do `otherwise`; and for one in its place that is another by now.
    """
    target = place_of(url)
    part = target.with_name(f".{uuid.uuid4().hex}.part")
    try:
        if os.path.isfile(target):
            say(f"{url}: was fetched before ({target})")
            _refuse_another(target, url)
            return target
        say(f"{url}: is being fetched ({target})")
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = _receive(url, part, target.name)
        if digest_in(target.name) is None:
            _record_of(target).write_text(f"{digest}  {target.name}\n", encoding="utf-8")
        os.replace(part, target)
    except (OSError, http.client.HTTPException, ValueError) as error:
        if isinstance(error, urllib.error.HTTPError):
            error.close()
        given = f"could not be fetched ({error or type(error).__name__})"
        remedy = f"put the file at {target}, or {otherwise}{_namesake(target)}"
        raise DownloadError(Problem(where=url, given=given, remedy=remedy)) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()
    return target


def _receive(url: str, part: Path, name: str) -> str:
    """The SHA-256 of what arrived. Raises ValueError for a file that is cut, or that is not what its name promises."""
    hashed, have = hashlib.sha256(), 0
    with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response, part.open("wb") as file:
        while chunk := response.read(_CHUNK_BYTES):
            file.write(chunk)
            hashed.update(chunk)
            have += len(chunk)
        length = response.headers.get("Content-Length")
    if length is not None and have != int(length):
        raise ValueError(f"the connection ended after {have} of {length} bytes")
    digest, promised = hashed.hexdigest(), digest_in(name)
    if promised is not None and not digest.startswith(promised):
        raise ValueError(f"what arrived has the SHA-256 {digest}, by its name one that begins {promised}")
    return digest


def _namesake(target: Path) -> str:
    """What torch.hub has under the same name, from this address or another."""
    there = Path(torch.hub.get_dir()) / "checkpoints" / target.name
    return f" (of that name there is {there}, from an address that is not known)" if os.path.isfile(there) else ""


def _record_of(path: Path) -> Path:
    """Where the SHA-256 stands of a file whose name does not have it."""
    return path.with_name(f"{path.name}.sha256")


def _refuse_another(path: Path, url: str) -> None:
    """Raises `DownloadError` for a file that changed. Of one that was put there by hand nothing need be known."""
    record, promised = _record_of(path), digest_in(path.name)
    if promised is not None:
        allowed, remedy = f"one that begins {promised}, by its name", "delete it: it will be fetched again"
    elif os.path.isfile(record):
        promised = record.read_text(encoding="utf-8", errors="replace")[:64]
        allowed, remedy = f"{promised}, as when it was fetched", f"delete it, or {record} if it is meant to be another"
    else:
        return
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if not promised or not digest.startswith(promised):
        given = f"not the file of {url}: its SHA-256 is {digest}"
        raise DownloadError(Problem(where=str(path), given=given, allowed=allowed, remedy=remedy))
