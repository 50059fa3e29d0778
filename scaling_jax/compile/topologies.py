"""TPU slices to compile for where no TPU is: chips, hosts and memory of one."""

import functools
import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax
from jax.experimental import topologies

from scaling_jax.io import UserError


class Chip(NamedTuple):
    """What a TPU chip offers a program."""

    memory_bytes: int  # HBM, less what the runtime keeps: libtpu 0.0.42 names it when a program is too large
    num_cores: int  # TensorCores; two of them work as one device
    cloud_name: str  # of a slice is this, a dash and its number of cores


CHIPS = {
    "v4": Chip(round(30.75 * 2**30), 2, "v4"),
    "v5e": Chip(round(15.75 * 2**30), 1, "v5litepod"),
    "v5p": Chip(round(95.74 * 2**30), 2, "v5p"),
    "v6e": Chip(round(31.25 * 2**30), 1, "v6e"),
}


class Topology(NamedTuple):
    """A slice: devices that programs can be compiled for but not run on."""

    name: str
    chip: Chip
    devices: tuple[jax.Device, ...]  # one a chip
    num_hosts: int

    def halved(self) -> "Topology":
        """The next smaller slice on offer: of half the chips, or one chip of a host's four.

        Raises:
          UserError: if there is none.
        """
        generation, _, shape = self.name.partition(":")
        sizes = [int(size) for size in shape.split("x")]
        if len(self.devices) == 4:
            sizes = [1] * len(sizes)
        else:
            longest = 2 if sizes == [2, 2, 2] else sizes.index(max(sizes))  # a host's chips are 2 × 2 × 1
            sizes[longest] //= 2
        return topology(f"{generation}:{'x'.join(map(str, sizes))}")


@functools.cache
def topology(name: str) -> Topology:
    """A slice by name, such as v5e:16x16 or v4:4x4x4; needs libtpu (the extra `tpu`) and no TPU.

    Raises:
      UserError: if there is no such slice, or no libtpu.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", name)
    if not match or match[1] not in CHIPS:
        raise UserError(f"unknown topology {name!r}: use {', '.join(CHIPS)} and a shape, such as v5e:4x4 or v4:4x4x4")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("libtpu compiles for TPUs and isn't installed here: pip install 'scaling-jax[tpu]'")
    chip, num_chips = CHIPS[match[1]], math.prod(map(int, match[2].split("x")))
    _tell_libtpu_that_no_tpu_is_here(f"{chip.cloud_name}-{num_chips * chip.num_cores}")
    options: dict[str, Any] = {"chip_config_name": "megacore"} if chip.num_cores == 2 else {}
    if num_chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        devices: Any = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(f"no slice {name!r}: {str(error).splitlines()[0]}") from None
    in_order = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Topology(name, chip, tuple(in_order), len({device.process_index for device in devices}))


def _tell_libtpu_that_no_tpu_is_here(accelerator_type: str) -> None:
    """Off-TPU, libtpu would ask the metadata server of a cloud machine, and log what it misses."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", accelerator_type)
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_LOG_DIR", "disabled")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # its lock file is for processes that share chips
