"""A config of MMDetection (3.x or 2.x) as a recipe of ours: read as data, every key accounted for.

What maps becomes the recipe. What has no effect on what is computed is ignored for a reason; what means something else
here is said; what has no counterpart is an error, unless it is allowed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rcnn.config.placed_values import Place
from rcnn.config.python_config import Section, read_python_config
from rcnn.errors import Problem, RecipeError
from rcnn.recipes.mmdetection.datasets import (
    Loader,
    Metric,
    batch_of_all_devices,
    data_spec,
    evaluator,
    loader,
    old_loaders,
    refuse_other_classes,
)
from rcnn.recipes.mmdetection.detectors import Surroundings, detector
from rcnn.recipes.mmdetection.ledger import Finding, Ledger, Part
from rcnn.recipes.mmdetection.pipelines import fixed_padding_px
from rcnn.recipes.mmdetection.schedules import (
    Loop,
    Schedule,
    Wrapper,
    clip_norm,
    learning_rate,
    optimizer,
    schedulers,
    train_spec,
    wrapper,
)
from rcnn.recipes.mmdetection.trunk import image
from rcnn.recipes.recipe import (
    DetectorSpec,
    EvaluateSpec,
    FirstStageSpec,
    ImageSpec,
    OneStageSpec,
    ProposalsSpec,
    Recipe,
    TrainSpec,
    TwoStageSpec,
)


@dataclass(frozen=True, kw_only=True)
class Translation:
    """The recipe that a config becomes, and what of the config did not become part of it."""

    recipe: Recipe
    ignored: tuple[Finding, ...]
    differing: tuple[Finding, ...]
    unmapped: tuple[Finding, ...]
    """Empty, unless what has no counterpart was allowed."""

    def lines(self) -> list[str]:
        """For people."""
        kinds = {"no counterpart": self.unmapped, "differs": self.differing, "ignored": self.ignored}
        return [f"{kind}: {finding}" for kind, findings in kinds.items() for finding in findings]


def read_mmdetection_config(path: Path, *, allow_unmapped: bool = False) -> Translation:
    """The recipe in a `.py` config. Nothing in it is executed.

    Errors: `RecipeError` with every problem of the file and its bases, or with every value that has no counterpart,
    each with its file and line.
    """
    config = read_python_config(path)
    ledger = Ledger()
    root = Part(config.root, "", Place(file=path, line=1), ledger)
    if not isinstance(root.peek("model"), Section):
        problem = Problem(
            where=str(path),
            given="there is no `model` in this config",
            allowed="a config of a detector of MMDetection",
            remedy=f"its names are {', '.join(list(config.root)[:8])}" if config.root else "",
        )
        raise RecipeError(problem)
    recipe = _recipe(root, path)
    if ledger.unmapped and not allow_unmapped:
        raise RecipeError([*(each.as_problem() for each in ledger.unmapped), _remedy(path, len(ledger.unmapped))])
    return Translation(
        recipe=recipe,
        ignored=tuple(ledger.ignored),
        differing=tuple(ledger.differing),
        unmapped=tuple(ledger.unmapped),
    )


def _remedy(path: Path, count: int) -> Problem:
    return Problem(
        where=str(path),
        given=f"{count} value{'s have' if count > 1 else ' has'} no counterpart here",
        remedy="--allow-unmapped takes the config without",
    )


def _recipe(root: Part, path: Path) -> Recipe:
    is_old = "data" in root and "train_dataloader" not in root
    train, evaluation = _loaders(root, is_old=is_old)
    model = _model(root)
    padding = fixed_padding_px(_augments(model))
    around = Surroundings(
        image=_image(model, evaluation, is_old=is_old),
        fixed_padding=padding is not None,
        train_limit=train.pipeline.num_proposals,
        test_limit=evaluation.pipeline.num_proposals,
    )
    spec = detector(model, around)
    if padding is not None:
        _mind_padding(model, spec)
    _refuse_other_sizes(train, evaluation, around.image)
    refuse_other_classes(train, evaluation)
    trained = _training(root, train, is_old=is_old)
    metric, interpolation = _evaluation(root, is_old=is_old, first_stage=isinstance(spec, FirstStageSpec))
    spec, start = _start(root, spec)
    loop_every = trained.every_epochs
    _ignore_the_rest(root)
    root.close()
    return Recipe(
        expected="not stated in the config",
        source=f"MMDetection's config {path.name}",
        detector=spec,
        data=data_spec(train, train_divisor=padding),
        train=trained.spec.model_copy(update={"init_from": start}),
        evaluate=EvaluateSpec(metric=metric, voc_interpolation=interpolation, every_epochs=loop_every),
    )


# ----------------------------------------------------------------------------------------------------- model and image


def _model(root: Part) -> Part:
    """`model`, with the `train_cfg` and `test_cfg` that old configs have beside it."""
    section = root.section["model"].copy()
    for key in ("train_cfg", "test_cfg"):
        value = root.peek(key)
        if isinstance(value, Section) and not _is_loop(value):
            root.take(key)
            if key not in section:
                section.put(key, value, root.place_of(key))
    root.take("model")
    return Part(section, "model", root.place_of("model"), root.ledger)


def _is_loop(section: Section) -> bool:
    return bool({"type", "max_epochs", "max_iters", "by_epoch", "val_interval"} & set(section))


def _augments(model: Part) -> list[Part]:
    preprocessor = model.peek("data_preprocessor")
    if not isinstance(preprocessor, Section) or "batch_augments" not in preprocessor:
        return []
    without = preprocessor.copy()
    model.section.put("data_preprocessor", without, model.place_of("data_preprocessor"))
    augments = Part(preprocessor, "model.data_preprocessor", model.place_of("data_preprocessor"), model.ledger)
    del without["batch_augments"]
    return augments.parts("batch_augments")


def _mind_padding(model: Part, spec: DetectorSpec) -> None:
    """What pads a picture to the one size counts as background there; for the head of ATSS and GFL it cannot here."""
    head = spec.head if isinstance(spec, OneStageSpec) else getattr(getattr(spec, "proposals", None), "head", None)
    if head is not None and head.type in {"atss", "gfl"}:
        model.differs("data_preprocessor", "what pads a picture to the one size is left out of this head's training")


def _image(model: Part, evaluation: Loader, *, is_old: bool) -> ImageSpec:
    base = evaluation.pipeline.image
    if "data_preprocessor" in model:
        return image(model.part("data_preprocessor"), base)
    if not evaluation.pipeline.colours_given:
        model.refuse("data_preprocessor", "how pictures are normalised: data_preprocessor, or Normalize in a pipeline")
    return base


def _refuse_other_sizes(train: Loader, evaluation: Loader, wanted: ImageSpec) -> None:
    """In training the short side may vary; all else about a picture is one for training and evaluation."""
    given = train.pipeline
    if not given.resized or not evaluation.pipeline.resized:
        return
    ours = given.image
    of_all = ("kernel",) if given.jitter is not None else ("kernel", "max_long_side")
    for name in of_all:
        if getattr(ours, name) != getattr(wanted, name) and given.parts:
            reason = f"{name} is {getattr(ours, name)} in training and {getattr(wanted, name)} in evaluation"
            given.parts[0].refuse_whole(f"{reason}: here it is one")
    if given.jitter is None and given.short_sides is None and ours.short_side != wanted.short_side:
        given.short_sides = (ours.short_side,)


# ------------------------------------------------------------------------------------------------- data and evaluation


def _loaders(root: Part, *, is_old: bool) -> tuple[Loader, Loader]:
    if is_old:
        return old_loaders(root.part("data"))
    root.ignore("the evaluation of a run is that of val", "test_dataloader", "test_evaluator")
    return loader(root.part("train_dataloader")), loader(root.part("val_dataloader"))


def _evaluation(root: Part, *, is_old: bool, first_stage: bool) -> tuple[Metric, Any]:
    return evaluator(root.parts("evaluation" if is_old else "val_evaluator"), first_stage=first_stage)


def _start(root: Part, spec: DetectorSpec) -> tuple[DetectorSpec, str | None]:
    """`load_from`: the start of a first stage that is a one-stage detector's head, else of the whole detector."""
    name = root.take("load_from")
    if name is None or name == "":
        return spec, None
    if not isinstance(name, str):
        root.refuse("load_from", "the name of a file")
        return spec, None
    proposals = spec.proposals if isinstance(spec, TwoStageSpec | FirstStageSpec) else None
    if isinstance(proposals, ProposalsSpec) and proposals.head.type != "rpn":
        started = proposals.model_copy(update={"init_from": name})
        return spec.model_copy(update={"proposals": started}), None
    return spec, name


# ------------------------------------------------------------------------------------------------------------- training


@dataclass(frozen=True, kw_only=True)
class _Trained:
    spec: TrainSpec
    every_epochs: int


def _training(root: Part, train: Loader, *, is_old: bool) -> _Trained:
    loop = _old_loop(root, train) if is_old else _loop(root, train)
    if is_old:
        steps = root.part("optimizer")
        rule = steps.part("paramwise_cfg")
        optimizer_spec = optimizer(steps, rule)
        config = root.part("optimizer_config")
        around = _old_wrapper(root, config)
        schedule: Schedule = learning_rate(root.part("lr_config"), loop, optimizer_spec.lr)
    else:
        optimizer_spec, around = wrapper(root.part("optim_wrapper"))
        schedule = schedulers(root.parts("param_scheduler"), loop, optimizer_spec.lr)
    randomness = root.part("randomness")
    seed = randomness.whole("seed", root.whole("seed", 0))
    randomness.ignore("runs are repeatable here", "deterministic", "diff_rank_seed")
    randomness.close()
    batch = batch_of_all_devices(root.part("auto_scale_lr"), train)
    spec = train_spec(loop, optimizer_spec, schedule, batch=batch, wrapper=around, seed=max(seed, 0))
    return _Trained(spec=spec, every_epochs=loop.every_epochs)


def _old_wrapper(root: Part, config: Part) -> Wrapper:
    """`optimizer_config` and `fp16` (2.x)."""
    config.only("type", "OptimizerHook", "Fp16OptimizerHook")
    half = [config] if config.peek("type") == "Fp16OptimizerHook" else root.parts("fp16")
    for part in half:
        if part.peek("loss_scale", "dynamic") != "dynamic":
            part.differs("loss_scale", "the scale of the loss is dynamic here")
        part.ignore("dynamic here as well", "loss_scale")
    around = Wrapper(clip_norm=clip_norm(config, "grad_clip"), precision="fp16" if half else "float32", accumulate=1)
    for part in (*half, config):
        part.close()
    return around


def _loop(root: Part, train: Loader) -> Loop:
    """`train_cfg` (3.x)."""
    part = root.part("train_cfg")
    kind = part.kind("EpochBasedTrainLoop")
    by_steps = kind == "IterBasedTrainLoop" or "max_iters" in part
    if kind not in {"EpochBasedTrainLoop", "IterBasedTrainLoop"}:
        part.refuse("type", "EpochBasedTrainLoop or IterBasedTrainLoop")
    part.only("by_epoch", not by_steps)
    length = part.whole("max_iters" if by_steps else "max_epochs", 0)
    if length < 1:
        raise part.fail("max_iters" if by_steps else "max_epochs", ("a whole number, at least 1",))
    every = part.count("val_interval", 1)
    part.ignore("evaluation begins with the first interval", "val_begin")
    part.close()
    return Loop(length=length, unit="steps" if by_steps else "epochs", evaluated_every=every, repeats=train.repeats)


def _old_loop(root: Part, train: Loader) -> Loop:
    """`runner` or `total_epochs` (2.x)."""
    part = root.part("runner")
    part.only("type", "EpochBasedRunner", "IterBasedRunner")
    by_steps = "max_iters" in part
    length = part.whole("max_iters" if by_steps else "max_epochs", root.whole("total_epochs", 0))
    if length < 1:
        raise part.fail("max_epochs", ("a whole number, at least 1",))
    part.close()
    judged = root.peek("evaluation")
    every = judged.get("interval", 1) if isinstance(judged, Section) else 1
    every = every if type(every) is int and every > 0 else 1
    return Loop(length=length, unit="steps" if by_steps else "epochs", evaluated_every=every, repeats=train.repeats)


# ------------------------------------------------------------------------------------------------------------- the rest

_LOOKS = "what is written and shown on the way is fixed here"
_MACHINE = "how processes are set up is the command's matter"
_IGNORED = {
    **dict.fromkeys(
        (
            "default_hooks",
            "log_config",
            "log_level",
            "log_processor",
            "vis_backends",
            "visualizer",
            "work_dir",
            "checkpoint_config",
            "workflow",
        ),
        _LOOKS,
    ),
    **dict.fromkeys(
        (
            "env_cfg",
            "dist_params",
            "default_scope",
            "launcher",
            "opencv_num_threads",
            "mp_start_method",
            "find_unused_parameters",
            "gpu_ids",
            "cudnn_benchmark",
        ),
        _MACHINE,
    ),
    **dict.fromkeys(("val_cfg", "test_cfg"), "evaluation has one loop here"),
    **dict.fromkeys(
        ("tta_model", "tta_pipeline"), "pictures are seen once in evaluation; this is used on demand alone"
    ),
}
_HARMLESS_HOOKS = ("NumClassCheckHook", "CheckInvalidLossHook", "MemoryProfilerHook")
# What MMDetection reads; all other names on the top level are variables of the file.
_READ = {"custom_imports", "custom_hooks", "resume", "resume_from", "fp16", "compile", "plugins", "data", "runner"}


def _ignore_the_rest(root: Part) -> None:
    for key, reason in _IGNORED.items():
        root.ignore(reason, key)
    for key in ("resume", "resume_from", "auto_resume"):
        if root.peek(key):
            root.refuse(key, "rcnn train --resume RUN goes on with a run")
        root.ignore("a new run", key)
    for hook in root.parts("custom_hooks"):
        if hook.peek("type") in _HARMLESS_HOOKS:
            hook.ignore("it only looks", *hook.section)
        else:
            hook.refuse_whole("there is no such hook here")
    for key in root.section:
        if key not in _READ:
            root.ignore("a variable of the file: what uses it counts", key)
