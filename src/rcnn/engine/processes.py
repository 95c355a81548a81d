"""Several processes as one: what the first one does and says counts for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import Accelerator

from rcnn.errors import RcnnError

T = TypeVar("T")


def on_first_process(accelerator: Accelerator, action: Callable[[], T]) -> T:
    """Runs `action` on the first process; all of them get its result, or raise its error and so end together."""
    if accelerator.num_processes == 1:
        return action()
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome = [action(), None]
        except RcnnError as error:
            outcome = [None, error]
    torch.distributed.broadcast_object_list(outcome, src=0)
    result, error = outcome
    if error is not None:
        raise error
    return result


def gather_objects(accelerator: Accelerator, item: T) -> list[T]:
    """The items of all processes, by rank, on every process."""
    if accelerator.num_processes == 1:
        return [item]
    items = [item] * accelerator.num_processes
    torch.distributed.all_gather_object(items, item)
    return items
