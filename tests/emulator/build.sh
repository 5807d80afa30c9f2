#!/usr/bin/env bash
# Builds libcuda, libnvrtc, libcublasLt and libnccl of the emulator into a folder, with the headers that kernels are compiled with.
set -euo pipefail
[ $# -eq 1 ] || { echo "usage: build.sh OUT_DIR" >&2; exit 2; }
cd "$(dirname "$0")"
mkdir -p "$1"
rm -rf "$1/kernels"
out=$(cd "$1" && pwd)

# An old driver, with the functions of CUDA 12.0 alone, is for the folder before this one in the loader's path.
mkdir -p "$out/old"
flags="-std=c++20 -O2 -march=native -Wall -Wextra -Werror -fPIC -shared -fvisibility=hidden -Wl,-z,defs,-z,nodelete"
g++ $flags -Wl,-soname,libnvrtc.so nvrtc.cpp -o "$out/libnvrtc.so" -ldl &
nvrtc=$!
driver() {
    g++ $flags "-DCUDA_EMULATOR_NEWEST=$1" -Wl,-soname,libcuda.so.1 device.cpp memory.cpp stream.cpp module.cpp grid.cpp \
        fibers.cpp collectives.cpp -o "$2/libcuda.so.1" -ldl -lpthread
    ln -sf libcuda.so.1 "$2/libcuda.so"
}
driver 1200 "$out/old" &
old=$!
driver 1300 "$out"
g++ $flags -O3 -Wl,-soname,libcublasLt.so cublaslt.cpp product.cpp -o "$out/libcublasLt.so" "$out/libcuda.so.1"
g++ $flags -Wl,-soname,libnccl.so.2 nccl.cpp -o "$out/libnccl.so.2" "$out/libcuda.so.1" -lpthread -lrt
wait $nvrtc
wait $old
cp -r include "$out/"
