"""The commands' register, to which each module of this package adds its own."""

from pathlib import Path
from typing import Annotated

import tyro

app = tyro.extras.SubcommandApp()
Folder = Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")]
