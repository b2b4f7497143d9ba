"""A set that is there, whole or in part: what is kept, what is built again, and what must not be mixed in."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.dataset.annotation import ShardError
from pipeline.dataset.info import read_dataset, write_json
from pipeline.sharding.set_folder import claim_folder, is_left_over, remove_passing, with_encoder_of
from pipeline.sharding.shard_plan import SetPlan, inputs_digest
from pipeline.sharding.shard_set import ShardSetError, find_finished, finish, tidy
from tests.damage import flip_bit
from tests.photographs import encoded, photograph
from tests.shard_sets import build_all, build_shard, contents, make, planned, tars


@pytest.fixture(scope="module")
def unfinished(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every shard is there, and no `dataset.json`."""
    root = tmp_path_factory.mktemp("unfinished") / "set"
    build_all(root, planned(images))
    return root


@pytest.fixture
def output(whole: Path, tmp_path: Path) -> Path:
    """A copy of the finished set."""
    return Path(shutil.copytree(whole, tmp_path / "out"))


def test_the_same_command_leaves_a_finished_set_and_mends_a_holed_one(
    images: Path, whole: Path, output: Path, tmp_path: Path
) -> None:
    plan = planned(images)
    assert find_finished(tmp_path / "nowhere", plan) is None
    assert find_finished(output, plan) == read_dataset(output)
    tars(output, "train")[2].unlink()
    assert find_finished(output, plan) is None
    build_all(output, plan)
    # Killed here, every tar is there, and the annotation of one says nothing of the set.
    assert find_finished(output, plan) is None
    assert contents(make(output, plan)) == contents(whole)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": lambda shard: flip_bit(shard.with_suffix(".tar"), 3000),
    "a cut tar": lambda shard: os.truncate(shard.with_suffix(".tar"), 5000),
    "no annotation": lambda shard: shard.with_suffix(".json").unlink(),
    "a spoiled annotation": lambda shard: shard.with_suffix(".json").write_text("{"),
    "no index": lambda shard: shard.with_suffix(".idx").unlink(),
    "a spoiled index": lambda shard: shard.with_suffix(".idx").write_text("v1.2 0\n"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_only_a_damaged_shard_is_built_again(images: Path, unfinished: Path, tmp_path: Path, damage: str) -> None:
    plan, output = planned(images), Path(shutil.copytree(unfinished, tmp_path / "out"))
    (output / "train" / ".train-000002.tar.0123.tmp").write_bytes(b"half a shard")
    DAMAGE[damage](output / "train" / "train-000001")
    built = build_all(output, plan)
    assert [shard.name for shard, result in zip(plan.shards, built, strict=True) if not result.kept] == ["train-000001"]
    assert contents(output) == contents(unfinished)


@pytest.mark.parametrize("last", ["write_json", "write_contact_sheet"])
def test_a_job_that_is_killed_while_it_finishes_goes_on(
    images: Path, whole: Path, unfinished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: str
) -> None:
    """Before `dataset.json` is there, the same command finishes the set; after that, it tidies up."""
    plan, output = planned(images), Path(shutil.copytree(unfinished, tmp_path / "out"))

    def die(place: Path | str, value: object) -> None:
        if last == "write_json" and not str(place).endswith("dataset.json"):
            return write_json(place, value)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(f"pipeline.sharding.shard_set.{last}", die)
        with pytest.raises(KeyboardInterrupt):
            make(output, plan)
    assert is_left_over(output)
    info = find_finished(output, plan)
    assert (info is None) == (last == "write_json")
    if info is None:
        make(output, plan)
    else:
        tidy(output, info, print)
    assert contents(output) == contents(whole)
    assert not is_left_over(output)


def test_a_damaged_index_is_written_again(images: Path, output: Path, whole: Path) -> None:
    """Though Arrow calls this damage a KeyError."""
    index = output / "train.arrow"
    index.write_bytes(index.read_bytes().replace(b"label", b"labek"))
    assert find_finished(output, planned(images)) is None
    assert contents(make(output, planned(images))) == contents(whole)


def test_a_contact_sheet_that_cannot_be_drawn_costs_a_warning(
    images: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no font\nat all")

    plan, output, lines = planned(images), tmp_path / "out", list[str]()
    built = build_all(output, plan)
    with monkeypatch.context() as patched:
        patched.setattr("pipeline.sharding.contact_sheet.contact_sheet", fail)
        info = finish(output, plan, built, lines.append)
    (line,) = lines
    assert line.startswith("warning: the set is finished, without contact_sheet.jpg, which")
    assert line.endswith("(RuntimeError: no font at all)")
    assert find_finished(output, plan) == info
    assert not is_left_over(output)
    tidy(output, info, lines.append)
    assert contents(output) == contents(whole)


def test_a_temporary_file_may_get_its_name_while_those_that_were_left_are_removed(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "glob", lambda folder, _: [folder / ".renamed.tmp"])
    remove_passing(output)


# Another source or other settings.


def test_a_changed_source_leaves_nothing_old_behind(source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    build_all(output, planned(source))
    assert len(tars(output, "train")) == 4
    # Fewer images, one of them another: the order changes, the last shard goes.
    for number in range(2):
        (source / f"n{number}" / f"n{number}_0.JPEG").unlink()
        (source / f"n{number}" / f"n{number}_1.JPEG").unlink()
    (source / "n2" / "n2_0.JPEG").write_bytes(encoded(photograph(99, 280, 270)))
    assert contents(make(output, planned(source))) == contents(make(tmp_path / "fresh", planned(source)))
    assert len(tars(output, "train")) == 3


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"quality": 80}, r"quality \(90, not 80\)"),
        ({"seed": 1}, r"seed \(0, not 1\)"),
        ({"per_shard": 5}, "samples per shard"),
        ({}, "source or --val-fraction"),
    ],
)
def test_another_set_is_refused_by_name(
    source: Path, unfinished: Path, whole: Path, other: dict[str, int], named: str
) -> None:
    if not other:
        (source / "n0" / "n0_0.JPEG").unlink()
    before = contents(unfinished), contents(whole)
    with pytest.raises(ShardSetError, match=f"unfinished set of another {named}.*another --output"):
        # Elsewhere and otherwise: an image less where the first set was made is a change that may be gone on with.
        claim_folder(unfinished, planned(source, **other))
    with pytest.raises(ShardSetError, match=f"finished set of another {named}.*another --output, or delete"):
        find_finished(whole, planned(source, **other))
    assert (contents(unfinished), contents(whole)) == before


def test_a_lost_annotation_hides_no_other_samples_per_shard(images: Path, output: Path) -> None:
    shutil.rmtree(output / "train")
    with pytest.raises(ShardSetError, match="finished set of another samples per shard"):
        find_finished(output, planned(images, per_shard=3))
    assert find_finished(output, planned(images)) is None


def test_a_folder_of_other_things_is_left_alone(images: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "train").mkdir(parents=True)
    (tmp_path / "out" / "train" / "train-000000.tar").write_bytes(b"somebody's")
    with pytest.raises(ShardSetError, match="holds 'train' and no shard set of this program: give --output a new"):
        claim_folder(tmp_path / "out", planned(images))
    assert contents(tmp_path / "out") == {"train/train-000000.tar": b"somebody's"}


def test_a_claim_that_cannot_be_understood_is_named(images: Path, tmp_path: Path) -> None:
    (tmp_path / "unfinished.json").write_text(json.dumps({"settings": 1}))
    with pytest.raises(ShardSetError, match=r"unfinished\.json cannot be read .*start again"):
        claim_folder(tmp_path, planned(images))


def upgraded(plan: SetPlan) -> SetPlan:
    """The plan of a machine with another Pillow."""
    return dataclasses.replace(plan, image={**plan.image, "encoder": {**plan.image["encoder"], "pillow": "0.1"}})


def test_a_finished_set_outlives_an_upgrade_and_what_is_missing_wants_the_old_versions(
    images: Path, tmp_path: Path
) -> None:
    then, output = upgraded(planned(images)), tmp_path / "now"
    # Made by the encoder of today, and said to be of another.
    for shard in then.shards:
        built = build_shard(output, shard, planned(images).image)
        made = dataclasses.replace(built.annotation, inputs=inputs_digest(shard, then.image))
        write_json(output / shard.split / f"{shard.name}.json", made.to_json())
    then.claim.write(output)
    plan = with_encoder_of(output, planned(images))
    assert plan.image == then.image
    make(output, plan)
    plan = with_encoder_of(output, planned(images))
    assert find_finished(output, plan) == read_dataset(output)
    tars(output, "train")[2].unlink()
    assert find_finished(output, plan) is None
    with pytest.raises(ShardError, match=r"^train-000002 must be encoded by .*pillow 0\.1, .* can be kept") as found:
        build_shard(output, plan.shards[2], plan.image)
    assert "\n" not in str(found.value)
    assert build_shard(output, plan.shards[1], plan.image).kept


def test_images_that_are_stored_as_they_are_need_no_encoder(shard_set: Path, tmp_path: Path) -> None:
    plan = planned(shard_set)
    built = build_shard(tmp_path, plan.shards[0], upgraded(plan).image)
    assert built.annotation.samples == len(plan.shards[0].entries)
