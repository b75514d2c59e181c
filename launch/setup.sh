#!/usr/bin/env bash
# Creates .venv with pinned packages, or only what is missing; fetches OpenSeadragon for the viewer if npm is available.
# Sourced by quickstart.sh and test.sh.
# usage: setup_environment EXTRA     (EXTRA: "" or "dev")
#
# torch is installed first, by a separate command, so that pip takes one build of it: PyPI's, which is the CUDA build on
# Linux, or that of CFUSION_TORCH_INDEX (an index URL such as PyTorch's CPU index) if it is set.

fetch_viewer() {
    if command -v npm > /dev/null; then
        .venv/bin/cfusion view --fetch || echo "until that works, cfusion view shows still pictures" >&2
    else
        echo "npm is not installed: cfusion view shows still pictures instead of deep zoom" >&2
    fi
}

setup_environment() {
    local extra=$1 python=${PYTHON:-python3} want have
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: $("$python" --version) is too old; set PYTHON to a Python of 3.11 or newer" >&2
        return 2
    }
    want=$(cat constraints.txt pyproject.toml | sha256sum | cut -d' ' -f1)-$extra
    have=$(cat .venv/.installed 2>/dev/null || true)
    case "$have" in "$want"|"${want%-*}-dev") return 0 ;; esac
    echo "setting up .venv (a few minutes, once)"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    local pip=(.venv/bin/python -m pip --disable-pip-version-check -q)
    "${pip[@]}" install ${CFUSION_TORCH_INDEX:+--index-url "$CFUSION_TORCH_INDEX"} -c constraints.txt torch
    "${pip[@]}" install -c constraints.txt -e ".${extra:+[$extra]}"
    fetch_viewer
    printf '%s\n' "$want" > .venv/.installed
}
