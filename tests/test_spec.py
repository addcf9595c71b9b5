"""What a sweep's record says of its images, and what one of the first version does not say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from data.dataset import DataSpec
from training.trial_run import Recipe, TrialRun
from tune.checks import check_views
from tune.search.recipes import dataset
from tune.search.space import Space
from tune.spec import FIELDS, make_spec
from tune.store.stored_sweep import Sweep

FIRST_VERSION = {"id": "0" * 16, "commit": "f27d56c", "data": ""}


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("NOISY_LABEL_CACHE", str(tmp_path / "cache"))
    for number in range(20):
        path = tmp_path / "pictures" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (number, 9, 9)).save(path)
    return f"folder:{tmp_path / 'pictures'}"


def recorded(folder: Path, spec: dict[str, Any]) -> Sweep:
    folder.mkdir()
    (folder / "sweep.yaml").write_text(yaml.safe_dump({"spec": spec, "provenance": FIRST_VERSION}))
    return Sweep.read(folder)


def test_a_launch_records_its_views_and_a_record_without_them_mirrors_as_before(pictures: str, tmp_path: Path) -> None:
    launched = make_spec({"data": pictures, "method": ("ce",)})
    assert launched.views == "shift"
    assert make_spec({"data": pictures, "views": "flip-crop"}).views == "flip-crop"
    assert make_spec({"data": "digits"}).views == "shift"
    before = recorded(tmp_path / "old", {"data": pictures, "method": ["ce"], "image_size": 16})
    assert before.spec.views == ""
    assert before.spec.source().views == "flip-crop"
    seen = []
    for spec in (launched, before.spec):
        _, values = Space(spec).read({"lr": 0.05, "weight_decay": 0.001})
        recipe = Recipe("ce", values, "mlp", 1, 0, **vars(DataSpec.of(spec)))
        dataset(spec)
        seen.append((values["views"], TrialRun(recipe).method))
    assert [views for views, _ in seen] == ["shift", "auto"]


def test_views_are_a_hyperparameter_that_a_search_may_draw(pictures: str) -> None:
    spec = make_spec({"data": pictures, "method": ("ce", "mixup"), "range": {"views": "shift,flip-crop"}})
    space = Space(spec)
    assert space.views() == {"shift", "flip-crop"}
    assert space.defaults("ce", spec)[0]["views"] == "shift"
    check_views(space, dataset(spec))
    fixed = Space(make_spec({"data": pictures, "set": {"views": "flip-crop"}}))
    assert fixed.views() == {"flip-crop"}


def test_views_that_cannot_be_made_of_such_images_are_refused_before_a_trial(pictures: str) -> None:
    spec = make_spec({"data": pictures, "method": ("ce",), "image_size": 70})
    assert spec.views == "crop"
    with pytest.raises(ValueError, match="views 'shift' keep the size of images, 80; input_size is 70"):
        check_views(Space(make_spec({**vars(spec), "views": "shift"})), dataset(spec))
    with pytest.raises(ValueError, match="unknown views 'flipped'; known are"):
        make_spec({"data": pictures, "views": "flipped"})


@pytest.mark.parametrize("flag", ["image_size", "resize", "background", "follow_links"])
def test_what_is_for_a_user_s_images_is_refused_for_published_ones(flag: str) -> None:
    value = {"image_size": 32, "resize": "pad", "background": "black", "follow_links": True}[flag]
    with pytest.raises(ValueError, match=rf"^--{flag.replace('_', '-')}: {value} is not allowed; images of digits have a size"):
        make_spec({"data": "digits", flag: value})


def test_every_field_of_a_data_set_can_be_said_of_a_sweep() -> None:
    assert {name for name in DataSpec.__dataclass_fields__ if name != "table"} <= set(FIELDS)
