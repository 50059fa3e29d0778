import importlib.util

import pytest

from scaling_jax.compile.topologies import topology
from scaling_jax.io import UserError

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu isn't installed")


@pytest.mark.parametrize("name", ["v5e", "v9:4x4", "v5e:4xfour", "v5e:16", "h100:8x8"])
def test_what_is_no_slice_is_refused_with_those_that_are(name):
    with pytest.raises(UserError, match=f"{name!r}.*v4, v5e, v5p, v6e, tpu7x .*v5e:4x4"):
        topology(name)


def test_without_libtpu_the_message_says_what_to_install(monkeypatch):
    topology.cache_clear()  # another test may have asked for it
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'scaling-jax\[tpu\]'"):
        topology("v5e:4x4")


@needs_libtpu
def test_a_shape_that_hosts_do_not_tile_is_refused():
    with pytest.raises(UserError, match="no slice 'v5e:3x3'"):
        topology("v5e:3x3")


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "chips", "hosts"),
    [("v5e:1x1", 1, 1), ("v5e:16x16", 256, 64), ("v4:4x4x4", 64, 16), ("v5p:2x2x2", 8, 2), ("v6e:4x8", 32, 8)],
)
def test_a_chip_is_one_device(name, chips, hosts):
    slice_ = topology(name)
    assert (len(slice_.devices), slice_.num_hosts) == (chips, hosts)


@needs_libtpu
def test_half_a_chip_of_tpu7x_is_one_device():
    slice_ = topology("tpu7x:2x2x1")
    assert (len(slice_.devices), slice_.num_hosts, slice_.size_in_words) == (8, 1, "8 half chips")
    chip = slice_.halved()
    assert (chip.name, len(chip.devices), len(chip.halved().devices)) == ("tpu7x:1x1x1", 2, 1)


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "smaller"),
    [
        ("v5e:16x16", ["v5e:8x16", "v5e:8x8", "v5e:4x8", "v5e:4x4", "v5e:2x4", "v5e:2x2", "v5e:1x1"]),
        ("v4:4x4x4", ["v4:2x4x4", "v4:2x2x4", "v4:2x2x2", "v4:2x2x1", "v4:1x1x1"]),
    ],
)
def test_smaller_slices_down_to_one_chip(name, smaller):
    slice_ = topology(name)
    for expected in smaller:
        slice_ = slice_.halved()
        assert slice_.name == expected
    assert len(slice_.devices) == 1
