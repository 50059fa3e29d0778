import jax
import numpy as np
import pytest

from scaling_jax.parallel import replicate
from scaling_jax.training.checkpoints import Checkpoints
from scaling_jax.training.program import program_for
from tests.training.counting import RUN


def state_after(step: int, num_devices: int = 1):
    state = program_for(RUN).init(step)
    return replicate(state._replace(step=np.int32(step)), num_devices)


def saved(folder, steps, num_devices=1):
    checkpoints = Checkpoints(folder)
    for step in steps:
        checkpoints.save(state_after(step, num_devices), "")
    checkpoints.close()


def damage(folder):
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")


@pytest.mark.parametrize(("before", "after"), [(1, 8), (8, 1), (4, 2)])
def test_a_state_comes_back_on_another_number_of_devices(tmp_path, before, after):
    saved(tmp_path, [3], before)
    checkpoints = Checkpoints(tmp_path)
    restored = checkpoints.restore(state_after(0, after))
    checkpoints.close()
    jax.tree.map(np.testing.assert_array_equal, restored, state_after(3))
    assert all(len(leaf.sharding.device_set) == after for leaf in jax.tree.leaves(restored))


def test_a_damaged_state_is_passed_over_and_makes_room_for_new_ones(tmp_path, capfd):
    saved(tmp_path, [3, 5])
    damage(tmp_path / "5")
    checkpoints = Checkpoints(tmp_path)
    assert int(checkpoints.restore(state_after(0)).step) == 3
    (why,) = checkpoints.passed_over
    assert f"{tmp_path / '5'} is damaged" in why
    assert capfd.readouterr().err == ""
    checkpoints.save(state_after(4), "")
    checkpoints.close()
    checkpoints = Checkpoints(tmp_path)
    assert int(checkpoints.restore(state_after(0)).step) == 4
    checkpoints.close()


def test_where_nothing_was_saved_nothing_comes_back(tmp_path):
    checkpoints = Checkpoints(tmp_path / "new")
    assert checkpoints.restore(state_after(0)) is None
    checkpoints.close()
