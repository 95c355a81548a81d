"""Files of other systems, read without running anything in them."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import torch

from rcnn.backbones.pretrained import read_tensors
from rcnn.converters.interface import ForeignFile
from rcnn.engine.checkpoint import read_meta
from rcnn.errors import CheckpointError, Problem


def read_foreign(source: Path) -> ForeignFile:
    """The tensors of the file, also of a whole training as torchvision's references save it.

    Raises `CheckpointError` for a file that is none, that is ours already, or that wants to run code.
    """
    if not source.is_file():
        given = "this is a folder" if source.is_dir() else "there is no such file"
        raise CheckpointError(Problem(where=str(source), given=given, remedy="check the path"))
    if _is_ours(source):
        raise CheckpointError(
            Problem(where=str(source), given="a checkpoint of rcnn already", remedy="it is used as it is: rcnn predict")
        )
    with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
        # torch warns of odd pickles, then refuses what it does not know. The references save their command line, which
        # is a Namespace of plain values.
        warnings.simplefilter("ignore", UserWarning)
        return ForeignFile(path=source, tensors=read_tensors(source))


def _is_ours(source: Path) -> bool:
    try:
        read_meta(source)
    except CheckpointError:
        return False
    return True
