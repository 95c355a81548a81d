"""The command as one of several processes of torchrun: what is said once, and leaving in order."""

from __future__ import annotations

import hashlib
import os
import sys
from typing import Any


def is_first_process() -> bool:
    """Whether this process prints results; the only process is the first."""
    return os.environ.get("RANK", "0") == "0"


def is_first_to_say(text: str) -> bool:
    """Whether no other process has said this yet. Before the processes know each other, the first of a machine says it.

    An error may be everybody's (a recipe) or one process's own (its picture): either way it has to be read once.
    """
    distributed = _group()
    if distributed is None:
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        store = distributed.distributed_c10d._get_default_store()
        return store.add(f"rcnn said {hashlib.sha256(text.encode()).hexdigest()}", 1) == 1
    except RuntimeError:  # the process that keeps the store has gone
        return True


def leave_group(*, together: bool) -> None:
    """In order, before the interpreter ends: a group that is torn down by it can abort the process.

    `together` waits for the others, which after an error may never come.
    """
    distributed = _group()
    if distributed is None:
        return
    if together:
        distributed.barrier()
    distributed.destroy_process_group()


def was_left_by_another(error: BaseException) -> bool:
    """Whether this is how a process learns that another one has ended."""
    return _group() is not None and isinstance(error, RuntimeError) and _LOST in str(error).lower()


_LOST = "closed by peer"


def _group() -> Any:
    """torch.distributed where this process is in a group. Nothing is imported for the question."""
    torch = sys.modules.get("torch")
    distributed = getattr(torch, "distributed", None)
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return None
    return distributed
