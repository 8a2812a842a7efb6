#!/bin/sh
# A real llama.cpp server, compiled for this machine: sh scripts/install_llamacpp.sh FOLDER
# FOLDER becomes a venv with gguf, which scripts/write_gguf.py needs, and with llama-server in its bin.
# llama-cpp-python's source has llama.cpp's in it, the server included. Needs a C++ compiler, and ten minutes on two cores.
set -eu
venv=${1:?the folder of the venv}
command -v c++ >/dev/null || { echo "llama.cpp is compiled here: install a C++ compiler (Debian: apt-get install g++)"; exit 1; }
test -x "$venv/bin/python" || "${PYTHON:-python3}" -m venv "$venv"
venv=$(cd "$venv" && pwd)
PATH="$venv/bin:$PATH"
pip="$venv/bin/python -m pip --disable-pip-version-check -q"
$pip install cmake ninja scikit-build-core gguf==0.19.0
version=0.3.36
source=$(mktemp -d)
trap 'rm -rf "$source"' EXIT
$pip download --no-deps --no-binary :all: --no-build-isolation -d "$source" "llama-cpp-python==$version"
tar xzf "$source"/llama_cpp_python-*.tar.gz -C "$source"
cmake -S "$source"/llama_cpp_python-*/vendor/llama.cpp -B "$source/build" -G Ninja -DCMAKE_BUILD_TYPE=Release \
    -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
    -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF >"$source/log" || { cat "$source/log"; exit 1; }
cmake --build "$source/build" --target llama-server >"$source/log" 2>&1 || { tail -50 "$source/log"; exit 1; }
cp "$source/build/bin/llama-server" "$venv/bin/llama-server"
echo "llama-cpp-python $version" > "$venv/.installed"
