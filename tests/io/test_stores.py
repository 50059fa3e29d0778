import dataclasses
import json
import sys

import gcsfs
import pytest

from scaling_jax.io import UserError, stores
from scaling_jax.io.locks import locked
from scaling_jax.io.stores import address, claim, publish, working_copy
from scaling_jax.training import Interrupted, read_metrics, run_folder, train
from tests.training.counting import CORPUS, RUN
from tests.training.test_processes import Processes, assert_same_training, trained


def objects(bucket: str) -> dict[str, bytes]:
    files = gcsfs.GCSFileSystem(use_listings_cache=False)
    return {name.partition("/")[2]: files.cat_file(name) for name in files.find(bucket)}


def move_to_another_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("SCALING_JAX_CACHE", str(tmp_path / "another machine"))


def train_until(interruption: int, workdir, **options):
    answers = iter([False] * interruption + [True])
    with pytest.raises(Interrupted):
        train(RUN, workdir, corpus=CORPUS, num_devices=1, should_stop=lambda: next(answers), **options)


def test_a_run_that_goes_on_on_another_machine_ends_as_an_undisturbed_one_byte_for_byte(bucket, monkeypatch, tmp_path):
    """Records are there up to the newest state, also those of a machine that was lost after it."""
    train_until(3, f"{bucket}/x/res")
    copy = run_folder(working_copy(f"{bucket}/x/res"), RUN)
    assert [line.step for line in read_metrics(copy)] == [8, 10, 11, 12]
    move_to_another_machine(monkeypatch, tmp_path)
    result = train(RUN, f"{bucket}/x/res", corpus=CORPUS, num_devices=1, keep_checkpoint=False)
    assert result == train(RUN, tmp_path / "whole", corpus=CORPUS, num_devices=1)
    there = objects(bucket)
    for name in ("config.json", "metrics.jsonl", "result.json"):
        path = run_folder(tmp_path / "whole", RUN) / name
        assert there[f"x/res/runs/{RUN.run_id}/{name}"] == path.read_bytes()
    assert not any("checkpoints" in name for name in there)


def test_a_run_that_is_done_in_the_bucket_is_not_trained_again(bucket, monkeypatch, tmp_path):
    result = train(RUN, f"{bucket}/res", corpus=CORPUS, num_devices=1)
    move_to_another_machine(monkeypatch, tmp_path)
    monkeypatch.setattr("scaling_jax.training.loop.Attempt", pytest.fail)
    assert train(RUN, f"{bucket}/res", corpus=CORPUS, num_devices=1) == result


def test_whoever_had_a_run_before_another_machine_took_it_stops_and_changes_nothing(bucket, monkeypatch, tmp_path):
    mine = working_copy(f"{bucket}/res") / "runs" / "a"
    mine.mkdir(parents=True)
    (mine / "metrics.jsonl").write_text("1\n")
    claim(mine)
    publish(mine)
    move_to_another_machine(monkeypatch, tmp_path)
    theirs = working_copy(f"{bucket}/res") / "runs" / "a"
    claim(theirs)
    (theirs / "metrics.jsonl").write_text("1\n2\n")
    publish(theirs)
    (mine / "metrics.jsonl").write_text("1\n3\n")
    with pytest.raises(UserError, match=f"{bucket}/res/runs/a .* process .*: this process stops"):
        publish(mine)
    assert objects(bucket)["res/runs/a/metrics.jsonl"] == b"1\n2\n"


def test_a_copy_is_made_equal_to_the_bucket_but_for_what_is_being_trained_here(bucket, monkeypatch, tmp_path):
    copy = working_copy(f"{bucket}/res")
    for run in ("done", "training"):
        (copy / "runs" / run).mkdir(parents=True)
        (copy / "runs" / run / "metrics.jsonl").write_text("old\n")
    publish(copy)
    for run in ("done", "training"):
        (copy / "runs" / run / "metrics.jsonl").write_text("newer\n")
        (copy / "runs" / run / "result.json").write_text("of nobody")
    with locked(copy / "runs" / "training" / ".lock", "a run"):
        working_copy(f"{bucket}/res")
    assert {path.relative_to(copy).as_posix(): path.read_text() for path in copy.glob("runs/*/[!.]*")} == {
        "runs/done/metrics.jsonl": "old\n",
        "runs/training/metrics.jsonl": "newer\n",
        "runs/training/result.json": "of nobody",
    }


def test_nothing_is_brought_to_the_bucket_that_is_there_already(bucket, monkeypatch):
    copy = working_copy(f"{bucket}/res")
    (copy / "fit.json").write_text(json.dumps({}))
    publish(copy)
    monkeypatch.setattr("gcsfs.GCSFileSystem._pipe_file", pytest.fail)
    publish(copy)


def test_folders_that_belong_to_no_bucket_are_left_alone(tmp_path):
    assert working_copy(tmp_path) == tmp_path
    assert address(tmp_path / "x") == tmp_path / "x"
    publish(tmp_path)
    claim(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("results", ["gs://", "gs://bucket", "gs:/bucket/"])
def test_an_address_without_a_folder_is_refused(results):
    with pytest.raises(UserError, match="such as gs://bucket/demo"):
        working_copy(results)


def test_a_bucket_that_is_not_there_is_named(bucket):
    with pytest.raises(UserError, match=r"gs://no-such-bucket/res \(.*\): check"):
        working_copy("gs://no-such-bucket/res")


def test_where_gcsfs_lacks_what_to_install_is_said(bucket, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    stores._bucket.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'scaling-jax\[gcs\]'"):
        working_copy(f"{bucket}/res")


@pytest.mark.long
def test_two_machines_save_into_a_bucket_and_two_others_go_on(bucket, tmp_path):
    """As a pod's hosts do, which share nothing else."""
    changes = {"max_steps": 60}
    two = Processes(f"{bucket}/res", 2, 1, run=changes, caches=tmp_path / "before")
    two.wait_until_step(14)
    two.each[0].terminate()
    for process, output in zip(two.each, two.outputs(), strict=True):
        assert process.returncode == 0, output
        assert "interrupted" in output
    trained(f"{bucket}/res", 2, 1, run=changes, caches=tmp_path / "after")
    run = dataclasses.replace(RUN, **changes)
    train(run, tmp_path / "whole", corpus=CORPUS, num_devices=2)
    assert_same_training(working_copy(f"{bucket}/res"), tmp_path / "whole")
