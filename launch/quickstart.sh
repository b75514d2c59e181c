#!/usr/bin/env bash
# From a fresh clone to the demo's report: makes .venv if need be, then runs `cfusion demo` with the given options.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh
setup_environment ""
exec .venv/bin/cfusion demo "$@"
