"""Proposals of a detector as a file, and what they are worth: from a checkpoint or from such a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rcnn.atomic_file import refuse_unwritable
from rcnn.config.text import from_yaml, to_yaml
from rcnn.data.folder import describe
from rcnn.data.proposals import (
    KIND,
    ProposalFile,
    ProposalOrigin,
    StoredProposals,
    TableProposals,
    pictures_of_file,
    write_proposals,
)
from rcnn.data.table import AnnotationTable
from rcnn.data.tensor_file import TensorFile
from rcnn.detectors.candidates import OneStageProposer
from rcnn.detectors.first_stage import ProposalDetector
from rcnn.detectors.one_stage import OneStageDetector
from rcnn.detectors.preparation import prepared_detector
from rcnn.detectors.pyramid import AbstractPyramidDetector
from rcnn.detectors.two_stage import TwoStageDetector
from rcnn.engine.accelerator import Device, build_accelerator
from rcnn.engine.evaluate import propose_all
from rcnn.engine.progress import AbstractProgress, PredictionCounter, SilentProgress
from rcnn.errors import DataError, ImageError, Problem, RecipeError, SetupError
from rcnn.evaluation.overlaps import PictureOverlaps
from rcnn.evaluation.recall import PROPOSAL_COUNTS, Pairing, RecallCounter, RecallResult
from rcnn.evaluation.second_stage import PerfectSecondStage, PerfectSecondStageCounter
from rcnn.proposals import ProposalFilter
from rcnn.recipes.checkpoints import read_detector
from rcnn.recipes.datasets import read_evaluation
from rcnn.recipes.loaders import build_loader_for_evaluation
from rcnn.recipes.recipe import Recipe
from rcnn.recipes.resolve import resolve_recipe
from rcnn.records import ImageBatch, Proposals

# A one-stage detector's recipe has no first stage: RPN's usual choices. Its levels may see the same object.
ONE_STAGE_FILTER = ProposalFilter(pre_nms=1000, post_nms=1000, nms_iou=0.7, scope="joint")


@dataclass(frozen=True, kw_only=True)
class Dumped:
    """What was written."""

    path: Path
    pictures: int
    proposals: int


@dataclass(frozen=True, kw_only=True)
class ProposalEvaluation:
    """What proposals are worth: how many true boxes they reach, and what a perfect second stage would make of them."""

    truth: AnnotationTable
    recall: RecallResult
    perfect: tuple[PerfectSecondStage, ...]  # one for each count of `recall`
    most_proposals: int  # of a picture


def dump_proposals(
    checkpoint: Path,
    out: Path | None = None,
    *,
    data: str,
    split: str | None = None,
    overrides: Sequence[str] = (),
    device: Device = "auto",
    progress: AbstractProgress | None = None,
) -> Dumped:
    """Writes the proposals of a detector for a split; shared among processes under torchrun, the first one writes.

    `out` defaults to proposals-SPLIT.safetensors in the working folder. Raises `DataError`, `ImageError`,
    `CheckpointError`, `RecipeError`, `SetupError`, `RunError`.
    """
    run = _Run(checkpoint, data=data, split=split, overrides=overrides, device=device, progress=progress)
    path = out or Path(f"proposals-{run.truth.split}.safetensors")
    if run.accelerator.is_main_process:
        refuse_unwritable([path])
        origin = ProposalOrigin(detector=checkpoint.name, recipe=run.recipe)
        with write_proposals(path, run.truth, origin=origin) as writer:
            run.through(writer.add)
    else:
        run.through(lambda found: None)
    return Dumped(path=path, pictures=len(run.truth), proposals=run.num_proposals)


def evaluate_proposals(
    source: Path,
    *,
    data: str,
    split: str | None = None,
    overrides: Sequence[str] = (),
    device: Device = "auto",
    counts: Sequence[int] = PROPOSAL_COUNTS,
    pairing: Pairing = Pairing.OVERLAP,
    progress: AbstractProgress | None = None,
) -> ProposalEvaluation:
    """Judges the proposals of a file, or those that a checkpoint makes; under torchrun every process has the result.

    A file is judged on the pictures that it is about, or on those of `split`, all of which it must have; `overrides`
    say there how the data are read. Raises `DataError`, `ImageError`, `CheckpointError`, `RecipeError`, `SetupError`.
    """
    if not is_proposal_file(source):
        run = _Run(source, data=data, split=split, overrides=overrides, device=device, progress=progress)
        judge = _Judge(run.truth, counts=counts, pairing=pairing)
        run.through(judge.add)
        return judge.result()
    shown = progress or SilentProgress()
    file = ProposalFile(source)
    truth = _truth_for(file, data, split, overrides, shown)
    proposals = TableProposals(file, truth)
    file.verify()
    judge = _Judge(truth, counts=counts, pairing=pairing)
    for index in range(len(truth)):
        judge.add(proposals[index])
    return judge.result()


def is_proposal_file(path: Path) -> bool:
    """Whether it is one, and not a checkpoint. Raises `DataError` for what is neither."""
    try:
        kind = TensorFile(path).metadata.get("kind", "")
    except DataError as error:
        allowed = "a file of proposals (rcnn proposals dump), or a checkpoint of ours (rcnn train, rcnn convert)"
        raise DataError(
            Problem(where=one.where, given=one.given, allowed=allowed, remedy=one.remedy) for one in error.problems
        ) from error
    if kind not in (KIND, "detector"):
        ProposalFile(path)  # says what it is
    return kind == KIND


def proposer_of(detector: AbstractPyramidDetector) -> Callable[[ImageBatch], list[Proposals]]:
    """What makes a detector's proposals: its first stage, or all candidates of a one-stage detector."""
    match detector:
        case TwoStageDetector() | ProposalDetector():
            return detector.propose
        case OneStageDetector():
            return OneStageProposer(detector, proposal_filter=ONE_STAGE_FILTER)
    raise SetupError(Problem(where="detector", given=f"a {type(detector).__name__}, which has no proposals"))


# How annotations are read, which is all that there is to choose where proposals are judged that were made before.
_OF_DATA = ("data.classes", "data.bad_boxes")


def _truth_for(
    file: ProposalFile, data: str, split: str | None, overrides: Sequence[str], shown: AbstractProgress
) -> AnnotationTable:
    """The pictures that a file is judged on, with the classes that were chosen."""
    problems = [
        Problem(
            where=override,
            given="a file of proposals has no recipe that could be changed",
            allowed=f"{' and '.join(_OF_DATA)}; with a checkpoint in its place any",
        )
        for override in overrides
        if override.partition("=")[0].strip() not in _OF_DATA
    ]
    if problems:
        raise RecipeError(problems)
    recipe = resolve_recipe(_recipe_behind(file, shown), overrides).spec
    judged = read_evaluation(data, split=split or file.split, classes=None, recipe=recipe)
    everything = judged.truth
    truth = everything if split else pictures_of_file(file, everything)
    for line in (describe(truth), *judged.notes):
        shown.noted(line)
    if len(truth) < len(everything):
        shown.noted(f"these are the pictures of the file; the split has {len(everything):,}")
    return truth


def _recipe_behind(file: ProposalFile, shown: AbstractProgress) -> Recipe:
    """That of the detector which made the proposals: a file is judged as its checkpoint is. Else an empty one."""
    text = file.origin.recipe
    try:
        return from_yaml(text, Recipe) if text else Recipe(expected="", source="")
    except RecipeError:
        shown.noted(
            f"the recipe in it, of rcnn {file.version}, is another version's: data.classes is not taken from it"
        )
        return Recipe(expected="", source="")


class _Run:
    """A checkpoint over a split of the data."""

    def __init__(
        self,
        checkpoint: Path,
        *,
        data: str,
        split: str | None,
        overrides: Sequence[str],
        device: Device,
        progress: AbstractProgress | None,
    ) -> None:
        self.accelerator = build_accelerator(device=device)
        loaded = read_detector(checkpoint, overrides)
        self.recipe = to_yaml(loaded.recipe)
        # The data's own classes: proposals have none, and the data need not have those of the checkpoint.
        judged = read_evaluation(data, split=split, classes=None, recipe=loaded.recipe)
        self.truth = judged.truth
        self.num_proposals = 0
        self._shown = progress if progress is not None and self.accelerator.is_main_process else SilentProgress()
        for line in (describe(self.truth), *judged.notes):
            self._shown.noted(line)
        self._data = data
        self._loader = build_loader_for_evaluation(
            self.truth,
            loaded.recipe,
            rank=self.accelerator.process_index,
            num_processes=self.accelerator.num_processes,
        )
        self._detector = prepared_detector(loaded.detector.eval().to(self.accelerator.device))

    def through(self, receive: Callable[[StoredProposals], None]) -> None:
        """`receive` gets the proposals of each picture of `truth`, in its order."""
        expected = iter(self.truth.image_ids.tolist())

        def in_turn(image_id: int, found: Proposals) -> None:
            assert image_id == next(expected), "pictures come in the order of the table"
            self.num_proposals += len(found)
            receive(_stored(found))

        with _naming_the_data(self._data):
            try:
                propose_all(
                    self._detector,
                    self._loader,
                    propose=proposer_of(self._detector),
                    receive=in_turn,
                    accelerator=self.accelerator,
                    on_batch=PredictionCounter(self._shown, total_images=len(self._loader)),
                )
            finally:
                self._shown.finished()


class _Judge:
    """Both verdicts, from one picture after the other in the order of the table."""

    def __init__(self, truth: AnnotationTable, *, counts: Sequence[int], pairing: Pairing) -> None:
        self._truth = truth
        self._recall = RecallCounter(truth.classes.names, counts=counts, pairing=pairing)
        self._perfect = PerfectSecondStageCounter(truth, counts=counts)
        self._index = self._most = 0

    def add(self, found: StoredProposals) -> None:
        picture = PictureOverlaps.of(self._truth, self._index, found.boxes_xyxy)
        self._recall.add(picture)
        self._perfect.add(self._index, picture)
        self._index += 1
        self._most = max(self._most, len(found))

    def result(self) -> ProposalEvaluation:
        return ProposalEvaluation(
            truth=self._truth,
            recall=self._recall.result(),
            perfect=self._perfect.result(),
            most_proposals=self._most,
        )


def _stored(found: Proposals) -> StoredProposals:
    scores = None if found.scores is None else found.scores.float().numpy()
    return StoredProposals(boxes_xyxy=found.boxes_xyxy.float().numpy(), scores=scores)


@contextmanager
def _naming_the_data(data: str) -> Iterator[None]:
    try:
        yield
    except ImageError as error:
        remedy = f"rcnn data check {data} --decode names all that cannot be used"
        problem = Problem(where=data, given="every picture is needed", remedy=remedy)
        raise ImageError((*error.problems, problem)) from error
