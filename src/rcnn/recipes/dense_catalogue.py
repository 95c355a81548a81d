"""The named recipes with dense heads, cascades and given proposals: MMDetection's and CenterNet2's, and small ones."""

from __future__ import annotations

from rcnn.config.edit import edit
from rcnn.recipes.detectron2_catalogue import resampling_steps
from rcnn.recipes.heads import (
    ATSSSpec,
    CenterNetSpec,
    CentreMatcherSpec,
    DenseHeadSpec,
    FCOSSpec,
    GFLSpec,
    RetinaNetSpec,
    RPNSpec,
)
from rcnn.recipes.parts import DeltaCoderSpec, L1Spec, MatcherSpec, SmoothL1Spec
from rcnn.recipes.recipe import (
    CosineSpec,
    DataSpec,
    EvaluateSpec,
    FirstStageSpec,
    FPNSpec,
    GivenProposalsSpec,
    ImageSpec,
    MultiStepSpec,
    OneStageSpec,
    ProposalCountSpec,
    ProposalsSpec,
    Recipe,
    ResNetSpec,
    SGDSpec,
    TrainSpec,
    TwoStageSpec,
    WarmUpSpec,
)
from rcnn.recipes.regions import CascadeSpec, CascadeStepSpec, RoIAlignSpec, RoISpec

_MMDETECTION = "MMDetection 3's config of that name and the number in its documentation"
_NONE_PUBLISHED = "none published"
_IMAGE = ImageSpec(rounding="round_half_up", kernel="bilinear_uint8")
# Detectron's weights: blue first, the mean alone taken away.
_CAFFE_IMAGE = ImageSpec(
    rounding="round_half_up",
    kernel="bilinear_uint8",
    channel_order="bgr",
    mean=(102.9801, 115.9465, 122.7717),
    std=(1.0, 1.0, 1.0),
)
_BACKBONE = ResNetSpec(depth=50, norm="fixed_statistics")
# No ImageNet weights of this style can be fetched by name: the user gives the file, or starts from a detector.
_CAFFE_BACKBONE = ResNetSpec(depth=50, style="caffe", norm="frozen", weights=None)
_P3_TO_P7 = FPNSpec(first_map=1, extra="convs_on_p5")
_P3_TO_P7_PLAIN = FPNSpec(first_map=1, extra="convs_on_p5", p7_activation="none")
_ALIGNED = RoIAlignSpec(sampling_ratio=0, aligned=True)
# A side must be more than nothing.
_ANY_AREA = 1e-9
_CODER = DeltaCoderSpec(symmetric_clamp=True)
_REGION_CODER = DeltaCoderSpec(weights=(10.0, 10.0, 5.0, 5.0), symmetric_clamp=True)
_RPN = RPNSpec(
    matcher=MatcherSpec(positive_iou=0.7, negative_iou=0.3, low_quality_iou=0.3, claim_owner="claimer"),
    coder=_CODER,
    box_loss=L1Spec(),
    beyond_picture="left_out",
    loss_count="at_least_one_positive",
)
_PROPOSALS = ProposalsSpec(
    head=_RPN,
    train=ProposalCountSpec(pre_nms=2000, post_nms=1000),
    test=ProposalCountSpec(pre_nms=1000, post_nms=1000),
    min_side_px=_ANY_AREA,
)
_REGIONS = RoISpec(pooling=_ALIGNED, coder=_REGION_CODER, box_loss=L1Spec(), min_side_px=0.0)
_DATA = DataSpec(skip_empty=True, aspect_ratio_groups=0)
_PROPOSAL_RECALL = EvaluateSpec(metric="proposals")


def _one_epoch_schedule(lr: float, warm_up: WarmUpSpec | None = None, clip_norm: float | None = None) -> TrainSpec:
    """MMDetection's 1x: 12 epochs of batches of 16, a tenth of the rate after 8 and 11."""
    return TrainSpec(
        epochs=12,
        batch_size=16,
        optimizer=SGDSpec(lr=lr),
        schedule=MultiStepSpec(milestones=(8 / 12, 11 / 12)),
        warm_up=warm_up or WarmUpSpec(steps=500),
        clip_norm=clip_norm,
    )


def rpn_resnet50_fpn() -> Recipe:
    """The region proposal network alone, as MMDetection's rpn_r50_fpn_1x."""
    return Recipe(
        expected="COCO val2017 AR@1000 0.582",
        source=_MMDETECTION,
        detector=FirstStageSpec(image=_IMAGE, backbone=_BACKBONE, proposals=edit(_PROPOSALS, {"test.pre_nms": 2000})),
        data=_DATA,
        train=_one_epoch_schedule(0.02),
        evaluate=_PROPOSAL_RECALL,
    )


def fast_rcnn_resnet50_fpn() -> Recipe:
    """Fast R-CNN: the second stage on proposals from files (data.train_proposals, data.eval_proposals)."""
    return Recipe(
        expected="COCO val2017 box AP 37.8 on detectron2's proposals",
        source="detectron2's fast_rcnn_R_50_FPN_1x; the recipe is MMDetection's",
        detector=TwoStageSpec(image=_IMAGE, backbone=_BACKBONE, proposals=GivenProposalsSpec(), roi=_REGIONS),
        data=_DATA,
        train=_one_epoch_schedule(0.02),
    )


def cascade_rcnn_resnet50_fpn() -> Recipe:
    """Cascade R-CNN: three second stages of rising IoU, as MMDetection's cascade-rcnn_r50_fpn_1x."""
    head = RPNSpec(
        matcher=_RPN.matcher,
        coder=_CODER,
        box_loss=SmoothL1Spec(),
        border_px=0.0,
        border_ends="excluded",
        beyond_picture="left_out",
        loss_count="at_least_one_positive",
    )
    return Recipe(
        expected="COCO val2017 box AP 40.3",
        source=_MMDETECTION,
        detector=TwoStageSpec(
            image=_IMAGE,
            backbone=_BACKBONE,
            proposals=ProposalsSpec(
                head=head,
                train=ProposalCountSpec(pre_nms=2000, post_nms=2000),
                test=_PROPOSALS.test,
                min_side_px=_ANY_AREA,
            ),
            roi=CascadeSpec(
                pooling=_ALIGNED,
                box_loss=SmoothL1Spec(beta=1.0),
                min_side_px=0.0,
                stages=tuple(
                    CascadeStepSpec(
                        matcher=MatcherSpec(positive_iou=iou, negative_iou=iou),
                        # Inverses of MMDetection's stds.
                        coder=DeltaCoderSpec(weights=(1 / xy, 1 / xy, 1 / size, 1 / size), symmetric_clamp=True),
                        loss_weight=weight,
                    )
                    for iou, xy, size, weight in (
                        (0.5, 0.1, 0.2, 1.0),
                        (0.6, 0.05, 0.1, 0.5),
                        (0.7, 0.033, 0.067, 0.25),
                    )
                ),
                average="logits",
            ),
        ),
        data=_DATA,
        train=_one_epoch_schedule(0.02),
    )


# ----------------------------------------------------------------------------------------------------------- one stage


def retinanet_resnet50_fpn() -> Recipe:
    """RetinaNet, as MMDetection's retinanet_r50_fpn_1x."""
    neck = FPNSpec(first_map=1, extra="convs_on_c5", p7_activation="none")
    return _one_stage(RetinaNetSpec(), neck, "COCO val2017 box AP 36.5", nms_iou=0.5)


def atss_resnet50_fpn() -> Recipe:
    """ATSS, as MMDetection's atss_r50_fpn_1x."""
    return _one_stage(ATSSSpec(), _P3_TO_P7_PLAIN, "COCO val2017 box AP 39.4", nms_iou=0.6)


def gfl_resnet50_fpn() -> Recipe:
    """Generalised focal loss, as MMDetection's gfl_r50_fpn_1x."""
    return _one_stage(GFLSpec(), _P3_TO_P7_PLAIN, "COCO val2017 box AP 40.2", nms_iou=0.6)


def fcos_resnet50_caffe_fpn_gn() -> Recipe:
    """FCOS with group norm on a caffe-style ResNet, as MMDetection's fcos_r50-caffe_fpn_gn-head_1x.

    detector.backbone.weights names a file of Detectron's ImageNet weights; without one it starts from random numbers.
    """
    return Recipe(
        expected="COCO val2017 box AP 36.6",
        source=_MMDETECTION,
        detector=OneStageSpec(
            image=_CAFFE_IMAGE,
            backbone=_CAFFE_BACKBONE,
            neck=_P3_TO_P7,
            head=FCOSSpec(),
            nms_iou=0.5,
            min_side_px=_ANY_AREA,
        ),
        data=_DATA,
        train=TrainSpec(
            epochs=12,
            batch_size=16,
            optimizer=SGDSpec(lr=0.01, bias_lr_factor=2.0, bias_weight_decay=0.0),
            schedule=MultiStepSpec(milestones=(8 / 12, 11 / 12)),
            warm_up=WarmUpSpec(steps=500, factor=1 / 3),
            clip_norm=35.0,
        ),
    )


def _one_stage(head: DenseHeadSpec, neck: FPNSpec, expected: str, *, nms_iou: float) -> Recipe:
    return Recipe(
        expected=expected,
        source=_MMDETECTION,
        detector=OneStageSpec(
            image=_IMAGE, backbone=_BACKBONE, neck=neck, head=head, nms_iou=nms_iou, min_side_px=_ANY_AREA
        ),
        data=_DATA,
        train=_one_epoch_schedule(0.01),
    )


# --------------------------------------------------------------------------------------- one-stage heads as first stage


def _proposals(head: DenseHeadSpec, init_from: str | None = None) -> ProposalsSpec:
    """As MMDetection has them: one NMS for all levels, whatever the level a box comes from."""
    return ProposalsSpec(
        init_from=init_from,
        head=head,
        train=ProposalCountSpec(pre_nms=2000, post_nms=1000),
        test=ProposalCountSpec(pre_nms=1000, post_nms=1000),
        scope="joint",
        min_side_px=_ANY_AREA,
    )


# "Slowly increase lr, otherwise loss becomes NAN", says MMDetection's config; the norm is FCOS's own.
_CAREFUL = _one_epoch_schedule(0.02, WarmUpSpec(steps=1000), clip_norm=35.0)


def faster_rcnn_resnet50_fpn_fcos_rpn() -> Recipe:
    """FCOS as the first stage, as MMDetection's how-to; regions from the level that the FPN paper has for them."""
    return Recipe(
        expected="not measured",
        source=_NONE_PUBLISHED,
        detector=TwoStageSpec(
            image=_IMAGE, backbone=_BACKBONE, neck=_P3_TO_P7, proposals=_proposals(FCOSSpec()), roi=_REGIONS
        ),
        data=_DATA,
        train=_CAREFUL,
    )


def fcos_rpn_resnet50_fpn() -> Recipe:
    """FCOS of one class as proposals alone, as MMDetection's how-to."""
    return Recipe(
        expected="not measured",
        source=_NONE_PUBLISHED,
        detector=FirstStageSpec(image=_IMAGE, backbone=_BACKBONE, neck=_P3_TO_P7, proposals=_proposals(FCOSSpec())),
        data=_DATA,
        train=_CAREFUL,
        evaluate=_PROPOSAL_RECALL,
    )


def faster_rcnn_resnet50_caffe_fpn_fcos_rpn() -> Recipe:
    """FCOS as the first stage, started from a trained FCOS: train fcos_resnet50_caffe_fpn_gn first, or bring one."""
    return Recipe(
        expected="not measured",
        source=_NONE_PUBLISHED,
        detector=TwoStageSpec(
            # The how-to has another mean here than the FCOS that it starts from.
            image=edit(_CAFFE_IMAGE, {"mean": [103.53, 116.28, 123.675]}),
            backbone=_CAFFE_BACKBONE,
            neck=_P3_TO_P7,
            proposals=_proposals(FCOSSpec(), init_from="fcos_resnet50_caffe_fpn_gn.safetensors"),
            roi=_REGIONS,
        ),
        data=_DATA,
        train=_CAREFUL,
    )


# CenterNet2's second stage: higher IoUs than Cascade R-CNN's, since its proposals are better.
_PROBABILISTIC_CASCADE = CascadeSpec(
    pooling=_ALIGNED,
    fusion="sqrt",
    nms_iou=0.7,
    min_side_px=0.0,
    gradient_share=1 / 3,
    box_loss=L1Spec(),
    stages=resampling_steps(0.6, 0.7, 0.8),
)


def centernet2_resnet50_fpn() -> Recipe:
    """CenterNet2: CenterNet's heat map as the first stage, a cascade as the second, the root of both scores."""
    return Recipe(
        expected="COCO val2017 box AP 42.9",
        source="CenterNet2's README: R50, 1x, with its probabilistic score",
        detector=TwoStageSpec(
            image=ImageSpec(
                rounding="round_half_up",
                kernel="bilinear_uint8_antialias",
                channel_order="bgr",
                mean=(103.53, 116.28, 123.675),
                std=(1.0, 1.0, 1.0),
            ),
            # CenterNet2 starts from MSRA's caffe-style weights: give their file, or take torchvision's style and mean.
            backbone=ResNetSpec(depth=50, style="caffe", norm="frozen", weights=None),
            neck=_P3_TO_P7,
            proposals=ProposalsSpec(
                head=CenterNetSpec(),
                train=ProposalCountSpec(pre_nms=4000, post_nms=2000),
                test=ProposalCountSpec(pre_nms=1000, post_nms=256),
                nms_iou=0.9,
                scope="joint",
                # The original's 1e-4 is of the heat, this of its root.
                score_threshold=0.01,
                min_side_px=0.0,
            ),
            roi=_PROBABILISTIC_CASCADE,
        ),
        data=DataSpec(skip_empty=True, short_sides=(640, 672, 704, 736, 768, 800)),
        train=TrainSpec(
            epochs=12,
            batch_size=16,
            optimizer=SGDSpec(lr=0.02),
            schedule=MultiStepSpec(milestones=(60 / 90, 80 / 90)),
            warm_up=WarmUpSpec(steps=4000, factor=0.00025),
            clip_norm=35.0,
        ),
    )


# ------------------------------------------------------------------------------------------------------ small machines


_SMALL_IMAGE = ImageSpec(short_side=480, max_long_side=800)
_SMALL_TRAINING = TrainSpec(
    epochs=12,
    batch_size=2,
    optimizer=SGDSpec(lr=0.01),
    schedule=CosineSpec(),
    warm_up=WarmUpSpec(steps=100),
    clip_norm=10.0,
)


def faster_rcnn_resnet18_fpn_fcos_rpn() -> Recipe:
    """FCOS as the first stage on ResNet-18, with a narrow head of two convolutions, for small machines."""
    head = FCOSSpec(
        num_convs=2,
        channels=128,
        centerness_branch="boxes",
        distances="relu",
        box_loss="giou",
        matcher=CentreMatcherSpec(radius_strides=1.5),
    )
    return Recipe(
        expected="not measured",
        source=_NONE_PUBLISHED,
        detector=TwoStageSpec(
            image=_SMALL_IMAGE,
            backbone=ResNetSpec(depth=18),
            neck=_P3_TO_P7,
            proposals=_proposals(head),
            roi=RoISpec(pooling=RoIAlignSpec(aligned=True), box_loss=L1Spec()),
        ),
        train=_SMALL_TRAINING,
    )


def centernet2_resnet18_fpn() -> Recipe:
    """CenterNet2 on ResNet-18, with a narrow head of two convolutions, for small machines."""
    return Recipe(
        expected="not measured",
        source=_NONE_PUBLISHED,
        detector=TwoStageSpec(
            image=_SMALL_IMAGE,
            backbone=ResNetSpec(depth=18),
            neck=_P3_TO_P7,
            proposals=ProposalsSpec(
                head=CenterNetSpec(num_convs=2, channels=128),
                train=ProposalCountSpec(pre_nms=2000, post_nms=1000),
                test=ProposalCountSpec(pre_nms=1000, post_nms=256),
                nms_iou=0.9,
                scope="joint",
                # The original's 1e-4 is of the heat, this of its root.
                score_threshold=0.01,
                min_side_px=0.0,
            ),
            roi=edit(_PROBABILISTIC_CASCADE, {"pooling.sampling_ratio": 2}),
        ),
        train=_SMALL_TRAINING,
    )
