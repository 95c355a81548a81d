"""MMDetection's detectors as ours: the `model` of a config."""

from __future__ import annotations

from dataclasses import dataclass

from rcnn.recipes.heads import RPNSpec
from rcnn.recipes.mmdetection.heads import dense_head
from rcnn.recipes.mmdetection.ledger import Part
from rcnn.recipes.mmdetection.parts import min_side_px, nms
from rcnn.recipes.mmdetection.regions import regions
from rcnn.recipes.mmdetection.trunk import Trunk, trunk
from rcnn.recipes.recipe import (
    DetectorSpec,
    FirstStageSpec,
    GivenProposalsSpec,
    ImageSpec,
    OneStageSpec,
    ProposalCountSpec,
    ProposalsSpec,
    TwoStageSpec,
)

_TWO_STAGES = ("FasterRCNN", "CascadeRCNN", "FastRCNN", "TwoStageDetector", "MaskRCNN")
_ONE_STAGE = ("RetinaNet", "FCOS", "ATSS", "GFL", "SingleStageDetector")
DETECTORS = (*_TWO_STAGES, "RPN", *_ONE_STAGE)


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """What the rest of a config says about its detector."""

    image: ImageSpec
    fixed_padding: bool
    """Pictures are padded to one size in training, and what pads them counts as part of them."""
    train_limit: int | None
    """Of proposals from files."""
    test_limit: int | None


def detector(model: Part, around: Surroundings) -> DetectorSpec:
    """`model`. Raises `RecipeError` where it is none that can be built here, and with it all that was unmapped."""
    kind = model.kind()
    if kind not in DETECTORS:
        raise model.fail("type", DETECTORS)
    if kind == "MaskRCNN":
        model.refuse("type", "masks: detectors here find boxes")
    model.ignore("how layers start that no file brings is fixed here", "init_cfg")
    found = trunk(model)
    training, testing = model.part("train_cfg"), model.part("test_cfg")
    if kind in _ONE_STAGE:
        spec: DetectorSpec = _one_stage(model, training, testing, found, around)
    elif kind == "RPN":
        spec = _first_stage(model, training, testing, found, around)
    else:
        spec = _two_stages(model, training, testing, found, around)
    training.close()
    testing.close()
    model.close()
    return spec


def _one_stage(model: Part, training: Part, testing: Part, found: Trunk, around: Surroundings) -> OneStageSpec:
    head = dense_head(model.part("bbox_head"), training, found, fixed_padding=around.fixed_padding)
    if isinstance(head, RPNSpec):
        raise model.fail("bbox_head", ("a head with classes; an RPNHead is the rpn_head of an RPN",))
    overlap, soft = nms(testing, 0.5)
    limit = testing.whole("max_per_img", 100)
    return OneStageSpec(
        image=around.image,
        backbone=found.backbone,
        neck=found.neck,
        head=head,
        pre_nms=testing.count("nms_pre", 1000),
        score_threshold=float(testing.number("score_thr", 0.05)),
        nms_iou=overlap,
        soft_nms=soft,
        max_detections=limit if limit > 0 else None,
        min_side_px=min_side_px(testing, 0.0),
    )


def _first_stage(model: Part, training: Part, testing: Part, found: Trunk, around: Surroundings) -> FirstStageSpec:
    test = testing.part("rpn")
    training.ignore("an RPN alone proposes in evaluation only", "rpn_proposal")
    return FirstStageSpec(
        image=around.image,
        backbone=found.backbone,
        neck=found.neck,
        proposals=_proposals(model, training, None, test, found, around),
    )


def _two_stages(model: Part, training: Part, testing: Part, found: Trunk, around: Surroundings) -> TwoStageSpec:
    proposals: ProposalsSpec | GivenProposalsSpec
    if model.peek("rpn_head") is None:
        model.take("rpn_head")
        for cfg in (training, testing):
            cfg.ignore("the proposals come from files", "rpn", "rpn_proposal")
        proposals = GivenProposalsSpec(train_limit=around.train_limit, test_limit=around.test_limit)
    else:
        train, test = training.part("rpn_proposal"), testing.part("rpn")
        proposals = _proposals(model, training, train, test, found, around)
    return TwoStageSpec(
        image=around.image,
        backbone=found.backbone,
        neck=found.neck,
        proposals=proposals,
        roi=regions(model.part("roi_head"), training.parts("rcnn"), testing.part("rcnn"), found),
    )


def _proposals(
    model: Part, training: Part, train: Part | None, test: Part, found: Trunk, around: Surroundings
) -> ProposalsSpec:
    """A dense head as first stage. An RPNHead filters each level by itself, others all levels together."""
    head = dense_head(model.part("rpn_head"), training.part("rpn"), found, fixed_padding=around.fixed_padding)
    scope = "level" if isinstance(head, RPNSpec) else "joint"
    tested = _proposal_filter(test, scope)
    trained = tested
    if train is not None and train.section:
        trained = _proposal_filter(train, scope)
        for name in ("nms_iou", "scope", "min_side_px", "score_threshold"):
            if getattr(trained, name) != getattr(tested, name):
                train.refuse_whole(f"{name} is one number here for training and evaluation: that of test_cfg.rpn")
    count = tested.count if train is None else trained.count
    return ProposalsSpec(
        head=head,
        train=count,
        test=tested.count,
        nms_iou=tested.nms_iou,
        scope="joint" if tested.scope == "joint" else "level",
        min_side_px=tested.min_side_px,
        score_threshold=tested.score_threshold,
    )


@dataclass(frozen=True, kw_only=True)
class _ProposalFilter:
    count: ProposalCountSpec
    nms_iou: float
    scope: str
    min_side_px: float
    score_threshold: float


def _proposal_filter(part: Part, scope: str) -> _ProposalFilter:
    """`rpn_proposal` or `test_cfg.rpn`. Old names: nms_thr, max_num, nms_post, nms_across_levels."""
    overlap, soft = nms(part, 0.7)
    if soft is not None:
        part.refuse("nms", "proposals pass plain NMS here")
    across = part.truth("nms_across_levels", scope == "joint")
    before = part.count("nms_pre", 1000)
    after = part.count("max_per_img", part.count("max_num", part.count("nms_post", before)))
    if part.whole("nms_post", after) < after:
        part.refuse("nms_post", "each level gives as many as it has after NMS")
    found = _ProposalFilter(
        count=ProposalCountSpec(pre_nms=before, post_nms=after),
        nms_iou=overlap,
        scope="joint" if across else "level",
        min_side_px=min_side_px(part, 0.0),
        score_threshold=float(part.number("score_thr", 0.0)),
    )
    part.close()
    return found
