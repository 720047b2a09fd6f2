#!/usr/bin/env bash
# Environments with the published aimnet package, for the tests of the group `interop`:
#
#     eval "$(tests/interop/environments.sh DIR [PYTHON])"
#     pytest tests/interop
#
# DIR gets two virtual environments: `published` with the present aimnet, `legacy` with the one that wrote TorchScript
# files. Both see the packages of PYTHON (default: python3), so that torch is there once; nothing is installed into
# PYTHON, which must have this package's extra `all` and be of version 3.11 or later. Takes less than a minute and
# 600 MB. The two lines that are printed tell the tests where the environments are; everything else goes to stderr.
set -euo pipefail

DIR=${1:?usage: environments.sh DIR [PYTHON]}
PYTHON=${2:-python3}
mkdir -p "$DIR"
DIR=$(cd "$DIR" && pwd)
PACKAGES=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

# environment NAME REQUIREMENT...: without dependencies, which PYTHON has.
environment() {
    local python=$DIR/$1/bin/python
    shift
    "$PYTHON" -m venv --without-pip "$(dirname "$(dirname "$python")")"
    echo "$PACKAGES" > "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/base.pth"
    "$PYTHON" -m pip --python "$python" install --quiet --no-deps "$@" >&2
    # Says so here if something is missing, and builds what is built at the first import.
    "$python" -W ignore -c 'import aimnet.calculators.calculator' >&2
}

environment published aimnet==0.2.5 nvalchemi-toolkit-ops==0.5.0 warp-lang==1.19.0
environment legacy aimnet==0.0.1 numba==0.68.1 llvmlite==0.50.0

echo "export AIMNET_PYTHON=$DIR/published/bin/python"
echo "export AIMNET_LEGACY_PYTHON=$DIR/legacy/bin/python"
