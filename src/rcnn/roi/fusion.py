"""The proposal's own score in the final one, as probabilistic two-stage detectors have it (Zhou et al., 2021).

Letters: R regions of a batch, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rcnn.errors import Problem, SetupError

# "none": p(class); "product": p(class) * p(proposal); "sqrt": the root of the product (CenterNet2).
ProposalFusion = Literal["none", "product", "sqrt"]


def fuse(
    scores: Float[Tensor, "r k"], proposal_scores: Sequence[Tensor | None], fusion: ProposalFusion
) -> Float[Tensor, "r k"]:
    """Class scores of all regions with the scores of their proposals, given picture by picture.

    Raises `SetupError` where a fusion is asked for and a picture's proposals have no scores.
    """
    if fusion == "none":
        return scores
    known = [given for given in proposal_scores if given is not None]
    if len(known) < len(proposal_scores) or not known:
        raise SetupError(
            Problem(
                where="detector.roi.fusion",
                given=f"{fusion}, and proposals without scores",
                allowed="none, product, sqrt; the last two need a score for each proposal",
                remedy="detector.roi.fusion=none, or proposals with scores",
            )
        )
    fused = scores * torch.cat(known).to(scores.dtype)[:, None]
    return fused.sqrt() if fusion == "sqrt" else fused
