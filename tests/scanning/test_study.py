import dataclasses
import json
import math
import random
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from scaling_jax.io import UserError
from scaling_jax.report import write_figures
from scaling_jax.results import analyse, read_results
from scaling_jax.scanning import Study, Subject, scan
from scaling_jax.scanning.search import search_all
from scaling_jax.tasks import OtherModel, model_config
from scaling_jax.training.metrics import SquaredNorms
from tests.scanning.told import B_CRIT, EXPERIMENT, SUBJECT, least_steps, loss_after, train, work


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study that one worker told, and its fit."""
    folder = tmp_path_factory.mktemp("study")
    work(folder)
    return folder, analyse(folder).fit


def records(folder):
    return {path.relative_to(folder): path.read_bytes() for path in (folder / "runs").rglob("*.json*")}


def test_the_planted_critical_batch_size_is_found(whole):
    _, fit = whole
    assert [point.loss for point in fit.points] == list(SUBJECT.target_losses)
    for point in fit.points:
        assert point.tradeoff.b_crit == pytest.approx(B_CRIT, rel=0.03)
        assert point.tradeoff.s_min == pytest.approx(least_steps(point.loss), rel=0.03)


def test_the_runs_are_those_of_the_search(whole):
    """The search of a scan wants the same runs, given their outcomes, and no other."""
    folder, _ = whole
    results, asked = read_results(folder), []

    def outcome(run):
        asked.append(run.run_id)
        return results.find(run).outcome

    search_all(EXPERIMENT, outcome)
    assert sorted(asked) == sorted(results.curves)


def test_told_runs_are_records_like_any_other(whole):
    folder, _ = whole
    results = read_results(folder)
    assert results.experiment == EXPERIMENT
    for record in results.runs:
        steps, losses = results.curves[record.run_id]
        assert losses == pytest.approx(
            [loss_after(s, record.run.batch_tokens, record.run.learning_rate) for s in steps]
        )
        assert record.noise == []
        assert record.noise_by_part == {}
    assert results.noise_scale == []
    assert {"reached", "given up"} <= {record.result.status for record in results.runs}


def test_a_finished_study_asks_for_nothing(whole):
    folder, _ = whole
    study = Study(EXPERIMENT, folder)
    assert study.done
    assert study.ask() is None


def test_a_study_goes_on_where_it_was_left(whole, tmp_path):
    for _ in range(3):
        study = Study(EXPERIMENT, tmp_path)
        setting = study.ask()
        study.tell(setting, *train(setting, study))
        lost = study.ask()  # asked for, and its worker is gone
        assert lost != setting
        study.give_back(lost)
    work(tmp_path)
    assert records(tmp_path) == records(whole[0])


def test_no_two_workers_get_one_setting(tmp_path):
    first, second = Study(EXPERIMENT, tmp_path), Study(EXPERIMENT, tmp_path)
    given = [study.ask(wait=False) for study in (first, second) * 5]
    names = [setting.name for setting in given if setting is not None]
    assert len(names) == len(set(names)) == len(EXPERIMENT.cells)  # a search wants one run at a time
    assert not first.done
    first.give_back(given[0])
    assert second.ask(wait=False) == given[0]


def test_ask_waits_for_what_another_worker_trains(tmp_path):
    cells = dataclasses.replace(EXPERIMENT, batch_tokens=(8, 64, 512))
    study = Study(cells, tmp_path)
    out = [study.ask() for _ in range(3)]
    later = []
    waiting = threading.Thread(target=lambda: later.append(Study(cells, tmp_path).ask()))
    waiting.start()
    time.sleep(0.2)
    assert not later
    study.tell(out[1], *train(out[1], study))
    waiting.join(20)
    assert later[0].batch == 64
    assert later[0].learning_rate != out[1].learning_rate


@pytest.mark.parametrize("seed", [0, *(pytest.param(k, marks=pytest.mark.long) for k in range(1, 200))])
def test_four_workers_that_crash_at_random_lose_nothing(whole, tmp_path, seed):
    draws, told, lock = random.Random(seed), [], threading.Lock()

    def worker():
        study = Study(EXPERIMENT, tmp_path)
        while (setting := study.ask()) is not None:
            with lock:
                crashes = draws.random() < 0.3
            if crashes:  # what a lost process leaves: a freed lock and no record
                study.give_back(setting)
                study = Study(EXPERIMENT, tmp_path)
                continue
            study.tell(setting, *train(setting, study))
            with lock:
                told.append(setting.name)

    workers = [threading.Thread(target=worker) for _ in range(4)]
    for thread in workers:
        thread.start()
    for thread in workers:
        thread.join()
    folder, fit = whole
    assert sorted(told) == sorted(path.name for path in (folder / "runs").iterdir())
    assert records(tmp_path) == records(folder)
    assert repr(analyse(tmp_path).fit) == repr(fit)


WORKER = """
import sys, time, pathlib
from tests.scanning.told import EXPERIMENT, Study
study = Study(EXPERIMENT, pathlib.Path(sys.argv[1]))
setting = study.ask()
print(setting.name, flush=True)
time.sleep(100)
"""


def test_a_setting_of_a_killed_process_is_asked_for_again(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    name = process.stdout.readline().strip()
    study = Study(EXPERIMENT, tmp_path)
    before = [study.ask(wait=False) for _ in EXPERIMENT.cells]
    assert name not in {setting.name for setting in before if setting is not None}
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert study.ask(wait=False).name == name


def test_a_run_stops_where_it_reached_its_target_or_has_no_chance(tmp_path):
    study = Study(EXPERIMENT, tmp_path)
    setting = study.ask()
    assert setting.target_loss == 2.0
    assert not study.should_stop(setting, 10, 2.5)
    assert not study.should_stop(setting, 20, 1.99)  # one evaluation could be chance
    assert study.should_stop(setting, 30, 1.98)
    study.tell(setting, [10, 20, 30], [2.5, 1.99, 1.98])
    other = next(s for s in iter(study.ask, None) if s.batch == setting.batch)
    assert not study.should_stop(other, 10, 2.7)
    assert study.should_stop(other, other.max_steps, 2.7)
    study.tell(other, [10], [math.nan])
    assert read_results(tmp_path).find(other.run).result.status == "diverged"


@pytest.mark.parametrize(
    ("steps", "losses", "what"),
    [
        ([], [], "one or more steps"),
        ([1, 2], [3.0], "1 for 2"),
        ([2, 2], [3.0, 2.0], "step 2 must be a whole number above the one before, 2"),
        ([0], [3.0], "step 0 must be"),
        ([1.5], [3.0], "step 1.5 must be"),
        ([1], [0.0], "loss 0.0 at step 1 must be positive"),
        ([1], [-1.0], "must be positive"),
    ],
)
def test_what_is_no_curve_is_refused_and_may_be_told_again(tmp_path, steps, losses, what):
    study = Study(EXPERIMENT, tmp_path)
    setting = study.ask()
    with pytest.raises(UserError, match=what):
        study.tell(setting, steps, losses)
    study.tell(setting, *train(setting, study))
    with pytest.raises(UserError, match="isn't out"):
        study.tell(setting, [1], [2.0])


def test_the_noise_scale_is_that_of_the_norms_that_were_told(tmp_path):
    """|G|² = 2 and tr(Σ) = 600 images in each measurement, up to noise: the noise scale is 300 images."""
    draws, study = np.random.default_rng(0), Study(EXPERIMENT, tmp_path)
    while (setting := study.ask()) is not None:
        steps, losses = train(setting, study)
        small = setting.batch // 4
        norms = [
            SquaredNorms(small, *(2 + 600 / batch * draws.normal(1, 0.02) for batch in (small, setting.batch)))
            for _ in steps
        ]
        study.tell(setting, steps, losses, norms=norms)
    analysis = analyse(tmp_path)
    assert len(analysis.noise) > 8
    held = [noise.low <= 300 <= noise.high for noise in analysis.noise if noise.resolved]
    assert np.mean(held) > 0.8
    large = [noise.b_simple for noise in analysis.noise if noise.batch_tokens == 512]
    assert large == pytest.approx([300] * len(large), rel=0.15)
    windows = next(record.noise for record in read_results(tmp_path).runs if record.run.batch_tokens == 512)
    assert windows[0].noise.value == pytest.approx(300, rel=0.15)
    assert any("noise_scale" in path.name for path in write_figures(analysis))


@pytest.mark.parametrize(
    ("norms", "what"),
    [
        ([None], "norms or None for each of 2 steps, not 1"),
        ([(8, 1.0, 0.5), None], "small_batch = 8 at step 10 must be a whole number from 1 to 7"),
        ([(0, 1.0, 0.5), None], "small_batch = 0"),
        ([(4, math.nan, 0.5), None], "must be finite"),
        ([(4, 1.0, -0.5), None], "must be finite, and 0 or more"),
    ],
)
def test_norms_that_cannot_be_are_refused(tmp_path, norms, what):
    study = Study(dataclasses.replace(EXPERIMENT, batch_tokens=(8, 9, 10)), tmp_path)
    setting = next(s for s in iter(study.ask, None) if s.batch == 8)
    with pytest.raises(UserError, match=what):
        study.tell(setting, [10, 20], [3.0, 2.9], norms=norms)


def test_a_model_of_this_package_has_no_study_and_another_one_no_scan(tmp_path):
    ours = dataclasses.replace(
        EXPERIMENT,
        subjects=(Subject(model_config("1x16"), (2.0,), SUBJECT.learning_rates),),
        batch_tokens=(128, 256, 512),
    )
    with pytest.raises(UserError, match="1x16 is a model of this package"):
        Study(ours, tmp_path)
    with pytest.raises(UserError, match="net is a model of another trainer"):
        scan(EXPERIMENT, tmp_path)


def test_a_folder_of_another_study_is_refused(whole):
    with pytest.raises(UserError, match="other data"):
        Study(dataclasses.replace(EXPERIMENT, text="other data"), whole[0])


def test_models_of_one_study_count_the_same_unit():
    tokens = dataclasses.replace(SUBJECT, model=OtherModel("text", 1_000, "tokens"))
    with pytest.raises(UserError, match="images and tokens"):
        dataclasses.replace(EXPERIMENT, subjects=(SUBJECT, tokens))


@pytest.mark.parametrize("wrong", [{"name": "a/b"}, {"name": ""}, {"unit": "two words"}, {"num_params": 0}])
def test_a_description_that_cannot_be_is_refused(wrong):
    with pytest.raises(UserError):
        OtherModel(**({"name": "net", "num_params": 1} | wrong))


def test_an_experiment_of_other_models_survives_its_file(whole):
    folder, _ = whole
    assert json.loads((folder / "experiment.json").read_text())["subjects"][0]["model"] == {
        "name": "net",
        "num_params": 1_000,
        "unit": "images",
    }
