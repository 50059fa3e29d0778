"""Where a result came from: its text, its versions, the command that makes it again."""

import dataclasses
import importlib.metadata
import platform
import re
import shlex
from pathlib import Path

from scaling_jax.scanning import Experiment
from scaling_jax.scanning.demo import DEMO, QUICK

_PACKAGES = ("scaling-jax", "jax", "jaxlib", "flax", "optax", "numpy", "scipy", "matplotlib")


def versions() -> dict[str, str]:
    """Of Python and of the packages that results depend on, here and now."""
    return {"Python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _PACKAGES}


def command(experiment: Experiment) -> str:
    """What makes the same results in a new folder, from anywhere that holds the report's experiment.json."""
    for demo, options in ((DEMO, ()), (QUICK, ("--quick",))):
        if dataclasses.replace(experiment, text=demo.text) == demo:
            text = () if experiment.text == demo.text else ("--text", experiment.text)
            return shlex.join(["scaling-jax", "demo", *options, *text, "--results", "again"])
    return "scaling-jax scan experiment.json --results again"


def without_home(text: str) -> str:
    """Home folders as ~, this user's and those of whoever made the results: reports get passed on."""
    home = str(Path.home())
    if home != "/":
        text = re.sub(re.escape(home) + r"(?![\w.-])", "~", text)
    return re.sub(r"(/home|/Users|[A-Za-z]:\\Users)[/\\][^/\\\s\"'<>|&]+", "~", text)
