#!/bin/sh
# Build llama.cpp from the source package of llama-cpp-python, once for each environment:
#
#     .peers/llamacpp      compiled for this processor, without AMX
#     .peers/llamacpp-amx  compiled for this processor, AMX included; only where the processor has it
#
# A build takes 4 to 20 minutes on two cores and is skipped where its library already loads.
#
#     sh benchmarks/peers/llamacpp.sh [llamacpp] [llamacpp-amx]
set -eu

VERSION=0.3.36
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
JOBS=${JOBS:-$(nproc)}
NOT_NEEDED="-DCMAKE_BUILD_TYPE=Release -DLLAVA_BUILD=OFF"

has_amx() { grep -qw amx_int8 /proc/cpuinfo 2>/dev/null; }

# GCC 12's _tile_loadconfig names only 8 of the 64 bytes as an input: the stores that fill the configuration are dropped
# as dead and ldtilecfg faults. A memory barrier before it keeps them. The common library, which the bindings do not use, is
# left out.
repair() {
    tiles=$1/vendor/llama.cpp/ggml/src/ggml-cpu/amx/mmq.cpp
    sed -i.orig 's|^    _tile_loadconfig(&tc);|    asm volatile("" ::: "memory"); &|' "$tiles"
    grep -q 'asm volatile.*_tile_loadconfig' "$tiles"
    sed -i.orig 's|set(LLAMA_BUILD_COMMON ON |set(LLAMA_BUILD_COMMON OFF |' "$1/CMakeLists.txt"
}

build() { # environment, further CMake options
    target=.peers/$1
    if "$target/bin/python" -c "import gguf, llama_cpp; assert llama_cpp.__version__ == '$VERSION'" 2>/dev/null; then
        echo "$target: already built"
        return
    fi
    test -x "$target/bin/python" || "$PYTHON" -m venv "$target"
    pip="$target/bin/python -m pip --disable-pip-version-check"
    $pip install -q -r benchmarks/peers/llamacpp.txt
    source=$(mktemp -d)
    trap 'rm -rf "$source"' EXIT
    $pip download -q --no-deps --no-binary llama-cpp-python -d "$source" "llama-cpp-python==$VERSION"
    tar -xzf "$source"/llama_cpp_python-*.tar.gz -C "$source" # unpacked anew: a build leaves its libraries in the source folder
    repair "$source/llama_cpp_python-$VERSION"
    echo "$target: building"
    CMAKE_ARGS="$NOT_NEEDED $2" CMAKE_BUILD_PARALLEL_LEVEL=$JOBS \
        $pip install -q --no-deps --force-reinstall "$source/llama_cpp_python-$VERSION"
    rm -rf "$source"
    "$target/bin/python" -c "import llama_cpp; print('$target:', llama_cpp.llama_print_system_info().decode())"
}

for name in ${*:-llamacpp llamacpp-amx}; do
    case $name in
    llamacpp)
        off=""
        if has_amx; then off="-mno-amx-tile -mno-amx-int8 -mno-amx-bf16"; fi
        build llamacpp "-DCMAKE_C_FLAGS='$off' -DCMAKE_CXX_FLAGS='$off'"
        ;;
    llamacpp-amx)
        if has_amx; then build llamacpp-amx ""; else echo ".peers/llamacpp-amx: skipped, no AMX here"; fi
        ;;
    *)
        echo "error: $name is not an environment; choose llamacpp or llamacpp-amx." >&2
        exit 2
        ;;
    esac
done
