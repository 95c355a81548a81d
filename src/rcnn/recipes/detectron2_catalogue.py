"""The named recipes of detectron2's baselines: caffe-style ResNets, blue first, the mean alone taken away.

No ImageNet weights of this style can be fetched by name: the user gives the file (`rcnn convert` makes one of
detectron2's R-50.pkl), starts from a converted detector, or takes torchvision's weights with their style and mean.
"""

from __future__ import annotations

from rcnn.config.edit import edit
from rcnn.recipes.heads import RetinaNetSpec, RPNSpec
from rcnn.recipes.parts import AnchorSpec, DeltaCoderSpec, EverySamplerSpec, L1Spec, MatcherSpec
from rcnn.recipes.recipe import (
    DataSpec,
    DetectorSpec,
    FPNSpec,
    ImageSpec,
    MultiStepSpec,
    OneStageSpec,
    ProposalCountSpec,
    ProposalsSpec,
    Recipe,
    ResNetSpec,
    SGDSpec,
    SingleMapSpec,
    TrainSpec,
    TwoStageSpec,
)
from rcnn.recipes.regions import CascadeSpec, CascadeStepSpec, LevelMapSpec, Res5Spec, RoIAlignSpec, RoISpec

_SOURCE = "detectron2's config of that name and the number in its model zoo"
# A side must be more than nothing.
_MIN_SIDE_PX = 1e-9
_IMAGE = ImageSpec(
    rounding="round_half_up",
    kernel="bilinear_uint8_antialias",
    channel_order="bgr",
    mean=(103.53, 116.28, 123.675),
    std=(1.0, 1.0, 1.0),
)
_BACKBONE = ResNetSpec(depth=50, style="caffe", norm="frozen", weights=None)
_ALIGN = RoIAlignSpec(sampling_ratio=0, aligned=True, level_map=LevelMapSpec(epsilon=1e-8, epsilon_place="inside"))
_RPN = RPNSpec(box_loss=L1Spec(), loss_count=256)
_PYRAMID_PROPOSALS = ProposalsSpec(
    head=_RPN,
    train=ProposalCountSpec(pre_nms=2000, post_nms=1000),
    test=ProposalCountSpec(pre_nms=1000, post_nms=1000),
    min_side_px=_MIN_SIDE_PX,
)
_SINGLE_MAP_PROPOSALS = ProposalsSpec(
    head=edit(_RPN, {"anchors": AnchorSpec(sizes_px=((32.0, 64.0, 128.0, 256.0, 512.0),))}),
    train=ProposalCountSpec(pre_nms=12000, post_nms=2000),
    test=ProposalCountSpec(pre_nms=6000, post_nms=1000),
    min_side_px=_MIN_SIDE_PX,
)
_REGIONS = RoISpec(pooling=_ALIGN, box_loss=L1Spec(), min_side_px=_MIN_SIDE_PX)


def _recipe(expected: str, detector: DetectorSpec, *, lr: float = 0.02, source: str = _SOURCE) -> Recipe:
    """detectron2's 1x: 90,000 batches of 16, a tenth of the rate after 60,000 and 80,000."""
    return Recipe(
        expected=expected,
        source=source,
        detector=detector,
        data=DataSpec(skip_empty=True, aspect_ratio_groups=1, short_sides=(640, 672, 704, 736, 768, 800)),
        train=TrainSpec(
            epochs=12,
            batch_size=16,
            optimizer=SGDSpec(lr=lr, norm_weight_decay=0.0),
            schedule=MultiStepSpec(milestones=(60 / 90, 80 / 90)),
        ),
    )


def resampling_steps(*positive_ious: float) -> tuple[CascadeStepSpec, ...]:
    """The stages of its cascades: the later ones take all that the first one drew, without the truth."""
    return tuple(
        CascadeStepSpec(
            matcher=MatcherSpec(positive_iou=iou, negative_iou=iou),
            coder=DeltaCoderSpec(weights=(10.0 * scale, 10.0 * scale, 5.0 * scale, 5.0 * scale)),
            sampler=None if scale == 1 else EverySamplerSpec(),
            join_truth=scale == 1,
        )
        for scale, iou in enumerate(positive_ious, start=1)
    )


def faster_rcnn_resnet50_caffe_fpn() -> Recipe:
    """Faster R-CNN on FPN, as detectron2's faster_rcnn_R_50_FPN_1x."""
    return _recipe(
        "COCO val2017 box AP 37.9",
        TwoStageSpec(image=_IMAGE, backbone=_BACKBONE, proposals=_PYRAMID_PROPOSALS, roi=_REGIONS),
    )


def faster_rcnn_resnet50_c4() -> Recipe:
    """Faster R-CNN on C4, the last stage of the ResNet as box head, as detectron2's faster_rcnn_R_50_C4_1x."""
    return _recipe(
        "COCO val2017 box AP 35.7",
        TwoStageSpec(
            # Without a pyramid nothing asks for sizes that can be halved five times.
            image=edit(_IMAGE, {"divisor": 1}),
            backbone=_BACKBONE,
            neck=SingleMapSpec(index=2),
            proposals=_SINGLE_MAP_PROPOSALS,
            roi=edit(_REGIONS, {"pooling.output_size": 14, "box_head": Res5Spec()}),
        ),
    )


def faster_rcnn_resnet50_dc5() -> Recipe:
    """Faster R-CNN on a C5 that is dilated to stride 16, as detectron2's faster_rcnn_R_50_DC5_1x."""
    return _recipe(
        "COCO val2017 box AP 37.3",
        TwoStageSpec(
            image=edit(_IMAGE, {"divisor": 1}),
            backbone=edit(_BACKBONE, {"dilation": 2}),
            neck=SingleMapSpec(),
            proposals=_SINGLE_MAP_PROPOSALS,
            roi=_REGIONS,
        ),
    )


def cascade_rcnn_resnet50_caffe_fpn() -> Recipe:
    """Cascade R-CNN on FPN, as the boxes of detectron2's cascade_mask_rcnn_R_50_FPN_1x (without its masks)."""
    return _recipe(
        "not measured",
        TwoStageSpec(
            image=_IMAGE,
            backbone=_BACKBONE,
            proposals=edit(_PYRAMID_PROPOSALS, {"train.post_nms": 2000}),
            roi=CascadeSpec(
                pooling=_ALIGN,
                box_loss=L1Spec(),
                min_side_px=_MIN_SIDE_PX,
                stages=resampling_steps(0.5, 0.6, 0.7),
                gradient_share=1 / 3,
            ),
        ),
        source="detectron2's cascade_mask_rcnn_R_50_FPN_1x, whose number is with masks",
    )


def retinanet_resnet50_caffe_fpn() -> Recipe:
    """RetinaNet, as detectron2's retinanet_R_50_FPN_1x."""
    return _recipe(
        "COCO val2017 box AP 37.4",
        OneStageSpec(
            image=_IMAGE,
            backbone=_BACKBONE,
            neck=FPNSpec(first_map=1, extra="convs_on_c5"),
            head=RetinaNetSpec(
                matcher=MatcherSpec(positive_iou=0.5, negative_iou=0.4, low_quality_iou=0.0),
                coder=DeltaCoderSpec(),
                normalizer="moving",
                beyond_picture="negative",
                clips_candidates=False,
            ),
        ),
        lr=0.01,
    )
