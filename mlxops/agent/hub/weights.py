"""Decide which weight files an engine loads, whether the set is complete, and whether each file is complete.

mlx_lm.utils.load_model (0.28-0.32) loads every `model*.safetensors` at the top of the folder, in directory order. If
two files have a tensor of the same name, the last one counts. It does not read the index, which may be stale. So this
module relies on the numbers in the file names and on the files' headers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from fnmatch import translate

from mlxops.agent.hub.contents import Damaged, is_pointer, parse, printable
from mlxops.core.frozen import dataclass

MAX_HEADER = 100_000_000
"""The limit of the safetensors format in bytes (`safetensors`, src/tensor.rs, MAX_HEADER_SIZE)."""
NOT_SERVED = (
    *("*.gguf", "*.bin", "*.pth", "*.pt", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.ot", "*.tflite"),
    *("consolidated*", "onnx/*", "openvino/*", "original/*", "coreml/*", "metal/*"),
)
"""Names (fnmatch) of weights in formats that no MLX engine loads. They are not downloaded, and may be missing."""
_NOT_SERVED = re.compile("|".join(map(translate, NOT_SERVED)))
_SHARD = re.compile(r"(.+?)-(\d+)-of-(\d+)\.safetensors")
"""model-00001-of-00002, model-00001-of-000163 (DeepSeek), model-1-of-61 (Kimi), model.safetensors-00001-of-00014
(Qwen 3.5). Only the numbers count."""
_MAX_SHARDS = 9999
_TENSOR_ENDS = re.compile(rb'"data_offsets": ?\[\d{1,18}, ?(\d{1,18})\]')
_FIRST_READ_BYTES = 64 * 1024
"""Bytes of the first read of a weight file. Most headers are shorter."""

Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Name -> (dtype, shape), from the header."""


def is_served(name: str) -> bool:
    """Return whether MLX engines may need this file of a repository."""
    return _NOT_SERVED.match(name) is None


def is_weight(name: str) -> bool:
    """Return whether a file has weights that an engine may load.

    They are at the top of the folder. Subfolders have other models, adapters or formats. No engine's pattern matches a
    leading dot (`._model.safetensors` of a disk without extended attributes)."""
    return name.endswith(".safetensors") and "/" not in name and not name.startswith(".") and is_served(name)


def language_weights(names: Iterable[str]) -> list[str]:
    """Return the weight files that mlx-lm loads. Other engines load language models through mlx-lm."""
    return sorted(name for name in names if is_weight(name) and name.startswith("model"))


def weights(names: Collection[str]) -> list[str]:
    """Return the weight files that an engine loads: those for mlx-lm, or all if there are none (mlx-vlm loads all)."""
    return language_weights(names) or sorted(filter(is_weight, names))


def missing(present: Collection[str], listed: Collection[str]) -> str | None:
    """Return the first missing weight file; None if the `present` files include a complete set.

    `listed` are the files that an index or the hub names. The list is used if it names all files of a
    complete set. If no set is complete, it is used if it names any present file. Otherwise it is ignored, because it
    belongs to another conversion.
    """
    here = set(present)
    lacking = [_missing_shards(members) for members in _sets(here)]
    whole = [members for members, lacks in zip(_sets(here), lacking, strict=True) if not lacks]
    counts = any(members <= set(listed) for members in whole) if whole else not here.isdisjoint(listed)
    unseen = sorted(set(listed) - here) if counts or not here else []
    if unseen or whole:
        return unseen[0] if unseen else None
    return next((lacks[0] for lacks in lacking if lacks), None)


@dataclass(frozen=True)
class Leftovers:
    """Files of an earlier conversion, which an engine loads together with a complete set."""

    names: tuple[str, ...]
    why: str | None
    """Why they cannot be loaded together as one model; None if they can."""


def leftovers(folder: str, present: Collection[str], listed: Collection[str]) -> Leftovers | None:
    """Return the files beside the complete set that `listed` names, or beside any complete set.

    None if there is only one set.

    Raises `OSError`, `Damaged`.
    """
    sets = _sets(present)
    whole = [members for members in sets if members <= set(listed)] or [
        members for members in sets if not _missing_shards(members)
    ]
    if len(sets) < 2 or not whole:
        return None
    candidates = []
    for members in whole:  # the old set is not known, so one loadable set is enough
        extra = sorted(set().union(*sets) - members)
        candidates.append(Leftovers(tuple(extra), _conflict(folder, members, extra)))
    return next((files for files in candidates if files.why is None), candidates[0])


def _conflict(folder: str, whole: Collection[str], extra: Collection[str]) -> str | None:
    """Return why loading `extra` with `whole` gives other tensors than `whole` alone; None if it gives the same."""
    wanted: Tensors = {}
    for name in whole:
        wanted |= tensors(f"{folder}/{name}")
    loaded: Tensors = {}
    last: dict[str, str] = {}
    for name in os.listdir(folder):  # the same order as the engine
        if name in whole or name in extra:
            held = tensors(f"{folder}/{name}")
            loaded |= held
            last |= dict.fromkeys(held, name)
    for tensor, form in loaded.items():
        if wanted.get(tensor) != form:
            what = "of another shape or type" if tensor in wanted else "that the other files do not have"
            return f"{printable(last[tensor])} holds {printable(tensor)} {what}"
    return None


def _sets(names: Collection[str]) -> list[set[str]]:
    """Group files into sets by the numbers in their names. model.safetensors is a complete set by itself."""
    sets: dict[tuple[str, int], set[str]] = {}
    for name in sorted(names):
        if shard := _SHARD.fullmatch(name):
            sets.setdefault((shard[1], int(shard[3][:6])), set()).add(name)
        elif name == "model.safetensors":
            sets["model", 1] = sets.get(("model", 1), set()) | {name}
    return list(sets.values())


def _missing_shards(members: set[str]) -> list[str]:
    """Return the names that are missing in a set, by their numbers."""
    shards = [shard for name in members if (shard := _SHARD.fullmatch(name))]
    if not shards or "model.safetensors" in members:
        return []
    stem, width, last = shards[0][1], len(shards[0][2]), shards[0][3]
    here = {int(shard[2][:6]) for shard in shards}
    first = 0 if 0 in here else 1
    numbers = range(first, first + min(int(last[:6]), _MAX_SHARDS))
    return [f"{stem}-{number:0{width}d}-of-{last}.safetensors" for number in numbers if number not in here]


def damage(folder: str, names: Iterable[str], sizes: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Yield (name, why) for each weight file whose length does not match its header. Raises `OSError`."""
    for name in names:
        if why := wrong_length(f"{folder}/{name}", sizes[name]):
            yield name, f"{printable(name)} {why}"


def wrong_length(path: str, size: int) -> str | None:
    """Return why a safetensors file of `size` bytes does not match its header; None if it does. Raises `OSError`."""
    try:
        if _fits(encoded_header(path, size), size):
            return None
        _, length = header(path, size)
    except Damaged as error:
        return str(error)
    return f"has {size} of {length} bytes" if size != length else None


def header(path: str, size: int) -> tuple[str | None, int]:
    """Return the metadata's `format` and the expected length in bytes of a safetensors file.

    The file has the header's length in 8 bytes (little endian), the header (JSON), and the tensors. The header gives
    the `data_offsets` of each tensor (https://github.com/huggingface/safetensors#format). Raises `OSError`, `Damaged`.
    """
    encoded = encoded_header(path, size)
    document = parse(encoded, "the header")
    end = 0
    for name, tensor in document.items():
        if name == "__metadata__":
            continue
        offsets = tensor.get("data_offsets") if isinstance(tensor, dict) else None
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(isinstance(at, int) for at in offsets):
            raise Damaged("has a header without offsets")
        end = max(end, offsets[1])
    metadata = document.get("__metadata__")
    written_by = metadata.get("format") if isinstance(metadata, dict) else None
    return (written_by if isinstance(written_by, str) else None), 8 + len(encoded) + end


def tensors(path: str) -> Tensors:
    """Read the tensors of a safetensors file from its header. Raises `OSError`, `Damaged`."""
    forms: Tensors = {}
    for name, tensor in parse(encoded_header(path, os.stat(path).st_size), "the header").items():
        if name != "__metadata__" and isinstance(tensor, dict):
            shape = tensor.get("shape")
            forms[name] = str(tensor.get("dtype")), tuple(shape) if isinstance(shape, list) else ()
    return forms


def header_bytes(path: str) -> int:
    """Return the number of bytes before the tensors of a safetensors file. Raises `OSError`."""
    return 8 + int.from_bytes(first_bytes(path, 8), "little")


def first_bytes(path: str, size: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return os.read(descriptor, size)
    finally:
        os.close(descriptor)


def _fits(encoded: bytes, size: int) -> bool:
    """Return whether the last tensor ends at the end of the file, without parsing thousands of tensors.

    A string cannot look like an offset, because its quotes are escaped in JSON. If the header is formatted otherwise,
    this is False and the caller parses it."""
    return max(map(int, _TENSOR_ENDS.findall(encoded)), default=-1) == size - 8 - len(encoded)


def encoded_header(path: str, size: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        start = os.read(descriptor, _FIRST_READ_BYTES)
        length = int.from_bytes(start[:8], "little")
        if is_pointer(start):
            raise Damaged("is a Git LFS pointer, not the weights")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise Damaged(f"is cut off or not a safetensors file ({size} bytes)")
        rest = os.read(descriptor, length + 8 - len(start)) if length + 8 > len(start) else b""
        return (start + rest)[8 : 8 + length]
    finally:
        os.close(descriptor)
