from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools.coco import COCO

from rcnn.data.folder import read_dataset, splits
from rcnn.errors import DataError
from rcnn.plain_records import ClassTable


def messages(folders: Any, content: Any) -> list[str]:
    with pytest.raises(DataError) as raised:
        read_dataset(folders.coco(content))
    return [str(problem) for problem in raised.value.problems]


def test_reading_by_hand(folders: Any) -> None:
    table = read_dataset(folders.coco())
    assert table.format == "COCO"
    assert table.split == "train"
    assert table.classes == ClassTable(names=("cat", "dog"), category_ids=(5, 20))
    assert table.image_ids.tolist() == [7, 3]
    assert [table.path(index).name for index in range(2)] == ["a.jpg", "b.jpg"]
    assert table.path(0).is_file()
    assert table.sizes.tolist() == [[80, 100], [80, 100]]
    assert table.starts.tolist() == [0, 2, 2]  # the empty picture is kept
    assert table.boxes_xyxy.tolist() == [[10, 20, 40, 60], [0, 0, 100, 80]]
    assert table.labels.tolist() == [1, 0]
    assert table.ignored.tolist() == [False, True]
    assert table.areas.tolist() == [600.5, 8000]  # stated; else width times height
    assert not table.findings


def test_against_pycocotools(shared: Path) -> None:
    root = shared / "data/coco_mini"
    table = read_dataset(root)
    peer = COCO(root / "annotations/instances_val2017.json")
    assert len(table) == 188
    assert len(table.labels) == 1692
    assert table.ignored.sum() == 20
    assert len(table.classes) == 80
    assert table.classes.category_ids == tuple(sorted(peer.cats))
    for index, image_id in enumerate(table.image_ids.tolist()):
        image, annotations = peer.imgs[image_id], peer.imgToAnns[image_id]
        rows = table.rows(index)
        assert table.path(index).name == image["file_name"]
        assert table.size(index) == (image["height"], image["width"])
        boxes = np.array([annotation["bbox"] for annotation in annotations]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        assert np.array_equal(table.boxes_xyxy[rows], boxes)
        names = [peer.cats[annotation["category_id"]]["name"] for annotation in annotations]
        assert [table.classes.names[label] for label in table.labels[rows]] == names
        assert table.ignored[rows].tolist() == [bool(annotation["iscrowd"]) for annotation in annotations]
        assert table.areas[rows].tolist() == [annotation["area"] for annotation in annotations]


def test_outlines_are_passed_over_and_texts_that_look_like_them_kept(folders: Any) -> None:
    content = folders.coco_content()
    content["annotations"][0]["segmentation"] = [[1.5, 2, 3e1, -4], [5, 6]]
    content["annotations"][1]["segmentation"] = {"counts": [1, 2], "size": [80, 100]}
    content["categories"][0]["name"] = '"segmentation": [1, 2]'
    table = read_dataset(folders.coco(content))
    assert table.classes.names == ("cat", '"segmentation": [1, 2]')
    assert len(table.labels) == 2


def test_sizes_that_are_not_stated_come_from_the_pictures(folders: Any) -> None:
    content = folders.coco_content()
    del content["images"][0]["width"]
    content["images"][1]["height"] = 0
    assert read_dataset(folders.coco(content)).sizes.tolist() == [[80, 100], [80, 100]]


def test_classes_of_a_checkpoint_are_matched_by_name(folders: Any) -> None:
    root = folders.coco()
    table = read_dataset(root, classes=ClassTable(names=("bird", "dog", "cat")))
    assert table.labels.tolist() == [1, 2]
    assert table.classes.names == ("bird", "dog", "cat")
    with pytest.raises(DataError, match=r'instances_train\.json: the class "dog" is not one .*allowed: cat, bird'):
        read_dataset(root, classes=ClassTable(names=("cat", "bird")))


def test_a_class_that_is_only_listed_need_not_be_known(folders: Any) -> None:
    content = folders.coco_content()
    content["categories"].append({"id": 30, "name": "zebra"})
    assert read_dataset(folders.coco(content), classes=ClassTable(names=("cat", "dog"))).labels.tolist() == [1, 0]


def test_structural_mistakes_are_reported_together(folders: Any) -> None:
    content = folders.coco_content()
    content["images"].append({"id": 7, "file_name": "c.jpg"})
    content["images"].append({"id": "x", "file_name": "c.jpg"})
    content["categories"] += [{"id": 5, "name": "cow"}, {"id": 6, "name": "dog"}]
    found = messages(folders, content)
    assert len(found) == 4
    assert any("2 of them have the id 7" in message for message in found)
    assert any("has the id 'x'; allowed: a whole number" in message for message in found)
    assert any("2 of them have the id 5" in message for message in found)
    assert any(
        'the name "dog" belongs to the categories 20, 6' in message
        and "delete the one without annotations (id 6)" in message
        for message in found
    )


def test_annotations_of_unknown_things_and_wrong_boxes_are_reported_together(folders: Any) -> None:
    content = folders.coco_content()
    content["annotations"] += [
        {"id": 11, "image_id": 99, "category_id": 5, "bbox": [1, 1, 2, 2]},
        {"id": 12, "image_id": 7, "category_id": 6, "bbox": [1, 1, 2, 2]},
        {"id": 13, "image_id": 7, "category_id": 5, "bbox": [1, 1, 2]},
        {"id": 14, "image_id": 7, "category_id": 5},
        {"id": 15, "image_id": 7, "category_id": 5, "bbox": [1, 1, "2", 2]},
    ]
    found = messages(folders, content)
    expected = ["11: image_id is 99", "12: category_id is 6", "13: bbox is", "14: bbox is None", "15: bbox is"]
    assert all(f"annotation {text}" in message for text, message in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ([5, 5, 0, 10], "zero width or height"),
        ([5, 5, -3, 10], "is reversed"),
        ([200, 5, 10, 10], "lies outside the picture of 100 x 80"),
        ([float("nan"), 5, 10, 10], "no finite number"),
        ([5, 5, float("inf"), 10], "no finite number"),
        ([5, 5, None, 10], "no finite number"),
    ],
)
def test_bad_boxes_are_left_out_and_said(folders: Any, box: list, reason: str) -> None:
    content = folders.coco_content()
    content["annotations"].append({"id": 42, "image_id": 3, "category_id": 5, "bbox": box})
    root = folders.coco(content)
    table = read_dataset(root)
    assert len(table.labels) == 2
    assert len(table.findings.left_out) == 1
    assert "instances_train.json: annotation 42" in table.findings.left_out[0].where
    assert reason in table.findings.left_out[0].given
    assert "1 of 3 boxes was left out" in table.findings.summary()
    assert "lists them all" not in table.findings.summary()
    with pytest.raises(DataError, match=r"annotation 42"):
        read_dataset(root, bad_boxes="error")


def test_a_box_that_reaches_out_is_cut_and_said(folders: Any) -> None:
    content = folders.coco_content()
    content["annotations"] += [
        {"id": 42, "image_id": 3, "category_id": 5, "bbox": [-10, 70, 30, 30]},
        {"id": 43, "image_id": 3, "category_id": 5, "bbox": [60, 10, 40.03125, 20]},  # rounding: COCO states 0.01
    ]
    table = read_dataset(folders.coco(content))
    assert table.boxes_xyxy[table.rows(1)].tolist() == [[0, 70, 20, 80], [60, 10, 100.03125, 30]]
    assert [finding.where.endswith("annotation 42") for finding in table.findings.cut] == [True]
    assert "1 of 4 boxes was cut to the picture" in table.findings.summary()


def test_missing_pictures_are_all_named(folders: Any) -> None:
    root = folders.coco(folders.coco_content())
    for name in ("a.jpg", "b.jpg"):
        (root / "train" / name).unlink()
    with pytest.raises(DataError) as raised:
        read_dataset(root)
    assert [Path(problem.where).name for problem in raised.value.problems] == ["a.jpg", "b.jpg"]
    assert all("the picture is missing" in str(problem) for problem in raised.value.problems)


def test_a_wrong_folder_is_one_mistake_not_one_per_picture(folders: Any) -> None:
    images = [{"id": n, "file_name": f"{n}.jpg", "width": 100, "height": 80} for n in range(100)]
    root = folders.coco(folders.coco_content(images=images, annotations=[]))
    (root / "train").rename(root / "pictures")
    with pytest.raises(
        DataError, match=r"none of the 100 pictures is there \(the first: 0\.jpg\).*images/train"
    ) as raised:
        read_dataset(root)
    assert len(raised.value.problems) == 1


def test_numbers_that_no_array_holds(folders: Any) -> None:
    content = folders.coco_content()
    content["images"].append({"id": 2**64, "file_name": "c.jpg"})
    content["categories"].append({"id": 6, "name": "dog"})
    content["annotations"][0]["category_id"] = [20]  # and a name that stands twice
    assert [message.partition(": ")[2] for message in messages(folders, content)] == [
        'images: {"id": 18446744073709551616, "file_name": "c.jpg"} has the id 18446744073709551616; '
        "allowed: a whole number",
        'categories: the name "dog" belongs to the categories 20, 6; allowed: a name of its own; '
        "delete the one without annotations (id 20, 6)",
    ]
    content = folders.coco_content()
    content["annotations"][0] |= {"image_id": 2**64, "bbox": [1, 1, 10**400, 2], "area": 10**400}
    found = messages(folders, content)
    assert ["image_id is" in found[0], "bbox is" in found[1], len(found)] == [True, True, 2]


def test_a_size_that_no_picture_has(folders: Any) -> None:
    content = folders.coco_content()
    content["images"][0]["width"] = 2**40
    content["images"][1]["width"] = 10**400
    assert read_dataset(folders.coco(content)).sizes.tolist() == [[80, 2**31 - 1], [80, 100]]


def test_a_name_that_is_no_text(folders: Any) -> None:
    """A name in Latin-1 on a disk: its bytes are no UTF-8, and half a letter stands for each of them."""
    content = folders.coco_content()
    content["images"][0]["file_name"] = "b\udce9.jpg"
    root = folders.coco(content)
    assert read_dataset(root).path(0).is_file()
    content["images"][0]["file_name"] = "\ud800/b.jpg"
    folders.text("annotations/instances_train.json", json.dumps(content))
    with pytest.raises(DataError, match="the picture is missing"):
        read_dataset(root)


@pytest.mark.parametrize("value", ["[" * 9000 + "]" * 9000, "9" * 5000], ids=["deep", "digits"])
def test_json_that_python_does_not_read(folders: Any, value: str) -> None:
    folders.text("annotations/instances_train.json", f'{{"images": {value}, "annotations": []}}')
    with pytest.raises(DataError, match=r"instances_train\.json: the JSON cannot be read"):
        read_dataset(folders.root)


def test_malformed_json_names_its_line(folders: Any) -> None:
    folders.text("annotations/instances_train.json", '{"images": [],\n "annotations": [}')
    with pytest.raises(DataError, match=r"instances_train\.json:2:18: malformed JSON"):
        read_dataset(folders.root)


@pytest.mark.parametrize("text", ["[]", "{}", '{"images": {}, "annotations": [1], "categories": []}'])
def test_a_json_that_is_no_coco(folders: Any, text: str) -> None:
    folders.text("annotations/instances_train.json", text)
    with pytest.raises(DataError, match=r"instances_train\.json"):
        read_dataset(folders.root)


def test_no_picture_at_all(folders: Any) -> None:
    with pytest.raises(DataError, match="there is no picture in it"):
        read_dataset(folders.coco({"images": [], "annotations": [], "categories": []}))


def test_layouts(folders: Any) -> None:
    text = json.dumps(folders.coco_content())
    layouts = {
        "coco/annotations/instances_train2017.json": ("coco/images/train2017", "train2017"),
        "plain/annotations/train.json": ("plain/images", "train"),
        "roboflow/train/_annotations.coco.json": ("roboflow/train", "train"),
        "beside/labels.json": ("beside", "labels"),
    }
    for file, (pictures, split) in layouts.items():
        folders.text(file, text)
        folders.picture(f"{pictures}/a.jpg")
        folders.picture(f"{pictures}/b.jpg")
        root = folders.root / file.partition("/")[0]
        assert splits(root) == (split,)
        assert len(read_dataset(root)) == 2
        assert len(read_dataset(folders.root / file)) == 2


def test_other_tasks_of_coco_are_passed_over(folders: Any) -> None:
    root = folders.coco()
    folders.text("annotations/captions_train.json", "{}")
    folders.text("annotations/person_keypoints_train.json", "{}")
    assert splits(root) == ("train",)
