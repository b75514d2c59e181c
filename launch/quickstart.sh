#!/usr/bin/env bash
# From a fresh clone to the demo's report: makes .venv if need be, then runs `cfusion demo` with the given options.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh
echo "quickstart: installs .venv if it is not there (a few minutes; 3.1 GB, several more with CUDA's libraries), then runs"
echo "the demo (about 3 minutes on two cores, 0.4 GB)"
setup_environment ""
exec .venv/bin/cfusion demo "$@"
