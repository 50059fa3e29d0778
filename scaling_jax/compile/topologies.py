"""TPU slices as targets for compilation, on machines without a TPU: their chips, hosts and memory."""

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
    """A kind of TPU chip."""

    memory_bytes: int  # HBM of a device for a program, as libtpu 0.0.42 names it when a program is too large
    num_cores: int  # TensorCores
    num_devices: int  # that JAX sees; the two cores of a chip are one device, or two
    cloud_name: str  # Google Cloud calls a slice by this name, a dash and the number of cores


CHIPS = {
    "v4": Chip(round(30.75 * 2**30), 2, 1, "v4"),
    "v5e": Chip(round(15.75 * 2**30), 1, 1, "v5litepod"),
    "v5p": Chip(round(95.74 * 2**30), 2, 1, "v5p"),
    "v6e": Chip(round(31.25 * 2**30), 1, 1, "v6e"),
    "tpu7x": Chip(round(94.75 * 2**30), 2, 2, "tpu7x"),
}


class Topology(NamedTuple):
    """A TPU slice; programs can be compiled for its devices, but not run on them."""

    name: str
    chip: Chip
    devices: tuple[jax.Device, ...]
    num_hosts: int

    @property
    def size_in_words(self) -> str:
        """The number of devices, such as "16 chips"."""
        return f"{len(self.devices)} {'chips' if self.chip.num_devices == 1 else 'half chips'}"

    def halved(self) -> "Topology":
        """The next smaller slice: half of the chips, or one chip instead of four, or one of two devices of a chip.

        Raises:
          UserError: if there is none.
        """
        generation, _, shape = self.name.partition(":")
        sizes = [int(size) for size in shape.split("x")]
        num_chips = len(self.devices) // self.chip.num_devices
        if num_chips == 1 and len(self.devices) > 1:
            return self._replace(devices=self.devices[:1])
        if num_chips == 4:
            sizes = [1] * len(sizes)
        else:
            longest = 2 if sizes == [2, 2, 2] else sizes.index(max(sizes))  # the chips of a host are 2 × 2 × 1
            sizes[longest] //= 2
        return topology(f"{generation}:{'x'.join(map(str, sizes))}")


@functools.cache
def topology(name: str) -> Topology:
    """The slice with a name such as v5e:16x16 or v4:4x4x4. Needs libtpu (the extra `tpu`), but no TPU.

    Raises:
      UserError: if there is no such slice, or libtpu isn't installed.
    """
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+){1,2})", name)
    if not match or match[1] not in CHIPS:
        raise UserError(f"unknown topology {name!r}: use {', '.join(CHIPS)} and a shape, such as v5e:4x4 or v4:4x4x4")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("compiling for TPUs needs the package libtpu: pip install 'scaling-jax[tpu]'")
    chip, num_chips = CHIPS[match[1]], math.prod(map(int, match[2].split("x")))
    _tell_libtpu_that_no_tpu_is_here(f"{chip.cloud_name}-{num_chips * chip.num_cores}")
    options: dict[str, Any] = {"chip_config_name": "megacore"} if chip.num_cores > chip.num_devices else {}
    if num_chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        devices: Any = topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"there is no slice {name!r} ({str(error).splitlines()[0]}): use another shape, such as v5e:4x4"
        ) from None
    in_order = sorted(devices, key=lambda device: (device.process_index, device.id))
    return Topology(name, chip, tuple(in_order), len({device.process_index for device in devices}))


def _tell_libtpu_that_no_tpu_is_here(accelerator_type: str) -> None:
    """Without these variables, libtpu would ask the metadata server of a cloud machine, and log that it fails."""
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", accelerator_type)
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_LOG_DIR", "disabled")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # libtpu's lock matters only for processes that use chips
