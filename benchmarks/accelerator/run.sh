#!/usr/bin/env bash
# What one accelerator shows of this project, stage by stage, in order of worth: right, fast, many, demo, kaplan.
#
#   benchmarks/accelerator/run.sh OUT [--minutes 10] [--stages right,fast,…] [--rehearse]
#
# Made for a machine with a GPU, Python and JAX, but no network: all else comes in the folder LUGGAGE, else luggage/
# beside this file, which pack.sh fills. Each figure is in OUT/<stage>.json the moment it is known, so being cut off loses only what comes later.
# A later run continues the scan of stage kaplan from luggage/kaplan.tar.xz, if OUT/kaplan.tar.xz was put there.
# --rehearse does the same at toy size on a CPU, in a few minutes.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
export LUGGAGE=${LUGGAGE:-$here/luggage}
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
if compgen -G "$LUGGAGE/wheels/*.whl" >/dev/null; then
    "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$site" "$LUGGAGE"/wheels/*.whl
fi
PYTHONPATH="$site:$here/../..:$here/..:$here${PYTHONPATH:+:$PYTHONPATH}" "$python" "$here/stages.py" "$@"
