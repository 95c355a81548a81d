"""The page: whole, self-contained, every section that was asked for and none that was not."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from rcnn.errors import RunError
from rcnn.evaluation.charts import Series, line_chart, standalone, tick_text, ticks
from rcnn.evaluation.coco import coco_metrics, error_kinds
from rcnn.evaluation.report import ReportPicture, number_text, write_report
from rcnn.evaluation.voc import Interpolation, voc_metrics

VOID = {"meta", "img", "br", "link"}
HISTORY = [
    *({"kind": "train", "step": step, "lr": 0.01, "loss": 2.0 / step, "loss/rpn_box": 0.1} for step in (1, 2, 3)),
    *({"kind": "evaluation", "step": step, "AP": 0.1 * step, "AP50": 0.2 * step} for step in (1, 2, 3)),
]


class Page(HTMLParser):
    """The ids, attributes and text of a page; fails where elements are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data

    @property
    def ids(self) -> set[str | None]:
        return {value for name, value in self.attributes if name == "id"}


@pytest.fixture
def tables(make_truth, make_found):
    truth = make_truth(
        [(1, (10, 10, 50, 50), 0, False), (2, (0, 0, 20, 20), 1, False)], image_ids=[1, 2], names=("<b>cat</b>", "dog")
    )
    return truth, make_found([(1, (10, 10, 50, 50), 0, 0.9), (2, (0, 0, 20, 19), 0, 0.8)])


def test_whole_page(tmp_path, tables) -> None:
    truth, found = tables
    path = tmp_path / "run" / "report.html"
    write_report(
        path,
        title="a <title>",
        facts={"data": "a & b", "pictures": "2"},
        coco=coco_metrics(truth, found),
        voc=[voc_metrics(truth, found), voc_metrics(truth, found, interpolation=Interpolation.AREA)],
        errors=error_kinds(truth, found),
        history=HISTORY,
        pictures=[ReportPicture(caption="one.jpg", picture=Image.new("RGB", (3000, 30), (200, 10, 10)))],
    )
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.ids == {"coco", "classes", "curves", "errors", "training", "pictures"}
    for words in (
        "a <title>",
        "a & b",
        "<b>cat</b>",
        "AP_medium",
        "VOC 11-point",
        "VOC area",
        "wrong class",
        "rpn_box",
    ):
        assert words in page.text
    assert "<b>cat" not in text, "names are text, not markup"
    assert "0.500" in page.text, "AP50: one class found, one not"
    source = next(value for name, value in page.attributes if name == "src")
    assert source is not None
    assert source.startswith("data:image/jpeg;base64,")
    picture = Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))
    assert picture.size == (1400, 14)
    assert abs(picture.getpixel((700, 7))[0] - 200) < 6


def test_nothing_is_loaded_from_elsewhere(tmp_path, tables) -> None:
    write_report(tmp_path / "r.html", title="t", facts={}, coco=coco_metrics(*tables), history=HISTORY)
    text = (tmp_path / "r.html").read_text()
    assert not re.search(r"https?://|<script|<link|@import|url\(", text)


def test_only_what_was_given(tmp_path, tables) -> None:
    write_report(tmp_path / "r.html", title="t", facts={}, coco=coco_metrics(*tables))
    assert Page((tmp_path / "r.html").read_text()).ids == {"coco", "classes", "curves"}


def test_page_of_nothing_found_and_nothing_there(tmp_path, make_truth, make_found) -> None:
    truth, found = make_truth([], image_ids=[1]), make_found([])
    write_report(
        tmp_path / "r.html",
        title="t",
        facts={},
        coco=coco_metrics(truth, found),
        voc=[voc_metrics(truth, found)],
        errors=error_kinds(truth, found),
        history=[{"kind": "train", "step": 1, "epoch": 0, "loss": float("nan")}] * 2,
    )
    page = Page((tmp_path / "r.html").read_text())
    assert "–" in page.text
    assert "nan" not in page.text


def test_many_classes_have_no_matrix_and_few_curves(tmp_path, make_truth, make_found) -> None:
    rows = [(1, (10 * i, 0, 10 * i + 9, 9), i, False) for i in range(30)]
    truth = make_truth(rows, image_ids=[1], names=[f"class {i}" for i in range(30)])
    found = make_found([(1, box, label, 0.9) for _, box, label, _ in rows])
    coco, errors = coco_metrics(truth, found), error_kinds(truth, found)
    write_report(tmp_path / "r.html", title="t", facts={}, coco=coco, errors=errors)
    text = (tmp_path / "r.html").read_text()
    assert "the 10 most frequent classes" in text
    assert "taken for what" not in text


def test_unwritable_place_is_said(tmp_path, tables) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        write_report(tmp_path / "file" / "r.html", title="t", facts={}, coco=coco_metrics(*tables))


def test_numbers_as_text() -> None:
    assert [number_text(value) for value in (0.12349, 1.0, -1.0, float("nan"))] == ["0.123", "1.000", "–", "–"]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 600, [0, 200, 400, 600]),
        (0, 1000, [0, 200, 400, 600, 800, 1000]),
        (3.1, 4.2, [3.5, 4]),
        (-2e-4, 3e-4, [-2e-4, -1e-4, 0, 1e-4, 2e-4, 3e-4]),
    ],
)
def test_ticks_are_round(low, high, expected) -> None:
    np.testing.assert_allclose(ticks(low, high), expected, atol=1e-12)


def test_tick_texts_are_short() -> None:
    assert [tick_text(value) for value in (0.1 + 0.2, 20000, 0.0, 1e-5, 1500)] == ["0.3", "20k", "0", "1e-05", "1500"]


def test_chart_is_well_formed_and_gaps_split_lines() -> None:
    nan = float("nan")
    series = [Series(name="a<b", x=[0, 1, 2, 3], y=[1, nan, 3, 4]), Series(name="flat", x=[0, 3], y=[2, 2])]
    root = ElementTree.fromstring(line_chart(series, x_label="x & y", y_label='"y"'))
    lines = root.findall("polyline")
    assert [len(line.attrib["points"].split()) for line in lines] == [1, 2, 2]
    texts = [text.text for text in root.findall("text")]
    assert "a<b" in texts
    assert "x & y" in texts


def test_chart_places_points_by_hand() -> None:
    """The plot spans x 56..546 and y 12..258 (top to bottom): the middle of both is (301, 135)."""
    root = ElementTree.fromstring(
        line_chart(
            [Series(name="one", x=[0, 5, 10], y=[0, 50, 999])],
            x_label="x",
            y_label="y",
            x_range=(0, 10),
            y_range=(0, 100),
        )
    )
    assert root.findall("polyline")[0].attrib["points"] == "56.0,258.0 301.0,135.0 546.0,12.0"


@pytest.mark.parametrize("y", [[5.0, 5.0], [0.0, 0.0], [float("nan")] * 2])
def test_chart_of_flat_or_no_data(y) -> None:
    ElementTree.fromstring(line_chart([Series(name="one", x=[1, 1], y=y)], x_label="x", y_label="y"))


def test_a_chart_as_a_file_of_its_own() -> None:
    lines = [Series(name="a < b", x=[0, 1], y=[0, 1]), Series(name="c", x=[0, 1], y=[1, 0])]
    text = standalone(line_chart(lines, x_label="x", y_label="y"))
    root = ElementTree.fromstring(text)
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{space}svg"
    assert root[0].tag == f"{space}style"
    assert len(root.findall(f"{space}polyline")) == 2
