#!/usr/bin/env bash
# From a fresh clone to a checked one: lint, types and tests. Options go to pytest; --slow adds the slow tests, --long
# these and the long ones, --coverage reports the share of lines that the tests run.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh
setup_environment dev
marker="not slow and not long"
options=()
for option in "$@"; do
    case "$option" in
        --slow) marker="not long" ;;
        --long) marker="" ;;
        --coverage) options+=(--cov --cov-report=term) ;;
        *) options+=("$option") ;;
    esac
done
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# A file's tests share what they set up, so they run on one worker.
exec .venv/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder -m "$marker" "${options[@]}"
