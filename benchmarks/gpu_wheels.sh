#!/usr/bin/env bash
# Collects the wheels that `python -m benchmarks.gpu` needs on a GPU node without a package index.
#
# usage: bash benchmarks/gpu_wheels.sh [FOLDER]        (default: gpu_wheels)
#        PYTHON_VERSION=3.12 MACHINE=x86_64            (of the node)
#
# The node must have torch, accelerate, numpy, pandas, scipy, matplotlib and h5py. On it, from the repository's folder:
#
#     python -m venv --system-site-packages gpu_venv
#     gpu_venv/bin/pip install --no-index --no-deps gpu_wheels/*.whl
#     gpu_venv/bin/python -m benchmarks.gpu --json gpu.json
#
# DeepSpeed, MLflow, OpenSlide, imagecodecs and timm are not collected: the parts that need them are skipped by name.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${1:-gpu_wheels}
version=${PYTHON_VERSION:-3.12}
machine=${MACHINE:-x86_64}
most_mb=60

packages=(
    annotated-types autograd donfig ecos formulaic google-crc32c interface-meta isal jaxtyping joblib lifelines
    markdown-it-py mdurl narwhals numcodecs numexpr osqp pydantic pydantic-core pygments rich scikit-learn
    scikit-survival threadpoolctl typing-inspection wadler-lindig wrapt zarr
)
sources=(autograd-gamma)    # pure Python, published without a wheel

platforms=()
for glibc in 2_34 2_31 2_28 2_27 2_24 2_17 2_12 2_5; do platforms+=(--platform "manylinux_${glibc}_$machine"); done
platforms+=(--platform "manylinux2014_$machine")

mkdir -p "$folder"
pip=("${PYTHON:-python3}" -m pip --disable-pip-version-check)
"${pip[@]}" download -q --no-deps --only-binary=:all: -c constraints.txt -d "$folder" \
    --python-version "$version" --implementation cp --abi "cp${version/./}" --abi abi3 --abi none "${platforms[@]}" \
    "${packages[@]}"
"${pip[@]}" wheel -q --no-deps -c constraints.txt -w "$folder" "${sources[@]}"

size_mb=$(du -cm "$folder"/*.whl | tail -n 1 | cut -f 1)
echo "$folder: $(find "$folder" -name '*.whl' | wc -l) wheels, $size_mb MB"
[ "$size_mb" -le "$most_mb" ] || { echo "error: expected at most $most_mb MB" >&2; exit 1; }
