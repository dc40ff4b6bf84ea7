#!/bin/sh
# Build the native library with AddressSanitizer and UndefinedBehaviorSanitizer and name the file: scripts/build_sanitized.sh [FOLDER],
# by default build/sanitized. Only what is older than its sources is compiled; the first time takes minutes. `make attack` runs it.
set -e
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$root/build/sanitized}
python=${PYTHON:-$root/.venv/bin/python}
log=$folder/build.log
mkdir -p "$folder"
{
    cmake -S "$root" -B "$folder" -DBITPRESS_SANITIZE=ON -DPython_EXECUTABLE="$python" \
        -Dnanobind_DIR="$("$python" -m nanobind --cmake_dir)" \
        -DCMAKE_CXX_COMPILER=g++ -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCMAKE_CXX_FLAGS_RELWITHDEBINFO="-O1 -g1 -DNDEBUG" &&
        cmake --build "$folder" --parallel "${JOBS:-$(nproc)}"
} >"$log" 2>&1 || {
    tail -40 "$log" >&2
    exit 1
}
ls "$folder"/_native*.so
