"""safetensors files without a library: what a gateway worker, which has no numpy, reads of an artifact.

The format (huggingface/safetensors): eight bytes, little endian, with the length of a JSON header that names each
tensor's type, shape and place; then the tensors themselves, little endian and row-major.
"""

import hashlib
import json
import math
import sys
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from probes.errors import ArtifactError
from probes.manifest import MANIFEST, TENSORS, Manifest

_CODES: Final = {"F64": "d", "F32": "f", "I8": "b", "U8": "B"}


def read_bytes(folder: Path, manifest: Manifest) -> bytes:
    """The tensors file of an artifact, as the manifest knows it. Raises ArtifactError."""
    try:
        data = (folder / TENSORS).read_bytes()
    except OSError as error:
        raise ArtifactError(f"no probe artifact in {folder}: {error.strerror} ({error.filename})") from None
    if hashlib.sha256(data).hexdigest() != manifest.tensors_sha256:
        raise ArtifactError(f"{folder / TENSORS} does not match tensors_sha256 in {MANIFEST}: restore both or refit")
    return data


def read_tensors(
    data: bytes, expected: Mapping[str, tuple[str, tuple[int, ...]]], file: Path
) -> "dict[str, array[Any]]":
    """The tensors, flat, by name. `expected`: name to (type, shape), -1 standing for any length.

    Raises ArtifactError for another set of tensors, another type or shape, NaN or infinity.
    """
    try:
        size = int.from_bytes(data[:8], "little")
        header = {name: about for name, about in json.loads(data[8 : 8 + size]).items() if name != "__metadata__"}
        missing, extra = sorted(expected.keys() - header.keys()), sorted(header.keys() - expected.keys())
        if missing or extra:
            raise ArtifactError(f"{file}: missing tensors {missing}, unexpected tensors {extra}; refit")
        found = {name: _tensor(data, 8 + size, header[name], *expected[name], f"{file}: {name}") for name in expected}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{file} is not a safetensors file: {error}") from None
    return found


def _tensor(
    data: bytes, start: int, about: Mapping[str, Any], kind: str, shape: tuple[int, ...], what: str
) -> "array[Any]":
    begin, end = about["data_offsets"]
    wanted = [have if want == -1 else want for want, have in zip(shape, about["shape"], strict=False)]
    if about["dtype"] != kind or about["shape"] != wanted or len(wanted) != len(shape):
        raise ArtifactError(
            f"{what} is {about['dtype']}{about['shape']}, the manifest asks for {kind}{list(shape)}; refit"
        )
    tensor = array(_CODES[kind], data[start + begin : start + end])
    if sys.byteorder == "big":
        tensor.byteswap()
    if len(tensor) != math.prod(wanted):
        raise ValueError(f"{what} holds {len(tensor)} numbers, not {math.prod(wanted)}")
    if kind in ("F32", "F64") and not all(map(math.isfinite, tensor)):
        raise ArtifactError(f"{what} holds NaN or infinity; refit")
    return tensor
