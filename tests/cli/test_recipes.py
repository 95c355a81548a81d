"""`rcnn recipes` on the real catalogue."""

from __future__ import annotations

import pytest

from rcnn.cli.main import main
from rcnn.config.edit import edit
from rcnn.config.text import from_yaml
from rcnn.recipes.catalogue import RECIPES
from rcnn.recipes.recipe import Recipe
from rcnn.recipes.resolve import MMDETECTION_KEYS, resolve_recipe

NAME = "faster_rcnn_resnet50_fpn"


@pytest.fixture
def rcnn(capsys):
    """`rcnn(*arguments)`: exit code, standard output, standard error."""

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["recipes", *arguments])
        streams = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, streams.out, streams.err

    return call


def test_the_list_names_each_recipe_its_number_and_where_it_is_from(rcnn) -> None:
    code, out, _ = rcnn()
    words = " ".join(out.split())
    assert code == 0
    for name, function in RECIPES.items():
        assert name in out.splitlines()
        assert (function.__doc__ or "").partition("\n")[0] in words
    assert "COCO val2017 box AP 37.0" in words


def test_show_is_the_recipe_with_the_origins_of_what_is_no_default(rcnn, tmp_path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(f"base: {NAME}\nset:\n  train.optimizer: {{type: adamw, lr: 1e-3}}\n")
    code, out, _ = rcnn("show", str(path), "train.epochs=3")
    assert code == 0
    changes = {"train.optimizer": {"type": "adamw", "lr": 1e-3}, "train.epochs": 3}
    assert from_yaml(out, Recipe) == edit(RECIPES[NAME](), changes)
    lines = [line.strip() for line in out.splitlines()]
    assert "epochs: 3  # command line" in lines
    assert f"type: adamw  # {path}" in lines
    assert f"lr: 0.001  # {path}" in lines
    assert "betas: [0.9, 0.999]" in lines
    assert "# default" not in out


def test_show_all_says_what_is_default_and_what_settings_mean(rcnn) -> None:
    _, out, _ = rcnn("show", NAME, "--all")
    lines = [line.strip() for line in out.splitlines()]
    assert "flip: 0.5  # default: Probability of a horizontal flip in training." in lines
    assert all("  # " in line for line in lines if not line.endswith(":"))
    assert from_yaml(out, Recipe) == RECIPES[NAME]()


def test_show_origins_is_only_what_is_no_default(rcnn) -> None:
    _, out, _ = rcnn("show", NAME, "train.epochs=3", "--origins")
    lines = out.splitlines()
    assert "train.epochs=3  # command line" in lines
    assert len(lines) == len(resolve_recipe(NAME, ["train.epochs=3"]).changes)


def test_show_reads_what_it_wrote(rcnn, tmp_path) -> None:
    _, out, _ = rcnn("show", NAME)
    path = tmp_path / "recipe.yaml"
    path.write_text(out)
    assert rcnn("diff", NAME, str(path))[1] == "no difference\n"


def test_diff(rcnn, tmp_path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(f"base: {NAME}\nset:\n  detector.roi.pooling: {{type: roi_pool}}\n  train.epochs: 3\n")
    code, out, _ = rcnn("diff", NAME, str(path))
    assert code == 0
    assert out.splitlines() == [
        "detector.roi.pooling.type: roi_align -> roi_pool",
        "detector.roi.pooling.sampling_ratio: 2 -> (absent)",
        "detector.roi.pooling.aligned: false -> (absent)",
        "train.epochs: 26 -> 3",
    ]


def test_check_says_ok(rcnn, tmp_path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(f"base: {NAME}\n")
    code, out, _ = rcnn("check", str(path), "train.epochs=3")
    assert code == 0
    assert out.startswith(f"ok: {path}")


def test_check_lists_all_problems(rcnn, tmp_path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(f"base: {NAME}\nset:\n  train.epoch: 3\n  detector.proposals.head.nms_thr: 0.7\n")
    code, out, err = rcnn("check", str(path), "train.optimizer.type=sdg")
    assert code == 1
    assert out == ""
    assert "(3 problems)" in err
    assert f"train.epoch ({path}:3)" in err
    assert 'did you mean "epochs"?' in err
    assert "here it is detector.proposals.nms_iou" in err
    assert 'did you mean "sgd"?' in err


def test_check_says_what_a_config_of_mindspore_rcnn_holds_for_nothing(rcnn, tmp_path) -> None:
    """Of the file that is named, of its base, and where a patch of ours stands on top."""
    (tmp_path / "base.yml").write_text("net: FasterRCNN\nbackbone: {name: det_resnet50}\nrpn_head: {}\nrank: 0\n")
    config = tmp_path / "config.yml"
    config.write_text("__BASE__: base.yml\nepochs: 3\nclip_grads: true\ninfer:\n  max_box_num: 100\n")
    patch = tmp_path / "my.yaml"
    patch.write_text("base: config.yml\nset:\n  train.epochs: 4\n")
    code, _, err = rcnn("check", str(config))
    assert (code, f"{config}:3: clip_grads" in err) == (1, True)
    for source in (config, patch):
        code, out, _ = rcnn("check", str(source), "--allow-unmapped")
        assert code == 0
        *left_out, last = out.splitlines()
        assert any(line.startswith(f"no counterpart: {config}:3: clip_grads") for line in left_out)
        assert f"ignored: {config}:5: infer.max_box_num (read there, but not applied)" in left_out
        assert any(line.startswith(f"ignored: {tmp_path / 'base.yml'}:4: rank ") for line in left_out)
        assert last.startswith(f"ok: {source} is a recipe")


def test_an_unknown_recipe_gets_the_nearest_name(rcnn) -> None:
    code, _, err = rcnn("show", "faster_rcnn_resnet50_fnp")
    assert code == 1
    assert 'did you mean "faster_rcnn_resnet50_fpn"?' in err


@pytest.mark.parametrize("key", ["nms_thr", "max_num", "nms_across_levels"])
def test_old_mmdetection_names_are_recognised(rcnn, key) -> None:
    _, _, err = rcnn("check", NAME, f"model.test_cfg.rpn.{key}=1")
    assert f'"{key}" is the name of another system; here it is {MMDETECTION_KEYS[key]}' in err


def test_the_names_in_hints_exist() -> None:
    """Each dotted name in a hint is a path of a recipe."""
    recipe = RECIPES[NAME]()
    for hint in MMDETECTION_KEYS.values():
        for word in hint.replace(",", " ").split():
            if "." in word.strip(".") and not word.startswith("."):
                found: object = recipe
                for part in word.split("."):
                    found = getattr(found, part)
