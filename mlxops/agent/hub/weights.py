"""Decide which weight files an engine loads, whether all of them are there, and whether each is complete.

mlx_lm.utils.load_model (0.28-0.32) loads every `model*.safetensors` at the top of the folder, in directory order; of
several tensors with one name the last counts. It does not read the index, which may be stale. The numbers in the file
names and the files' own headers say what is there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import translate

from mlxops.agent.hub.contents import Damaged, is_pointer, parse, printable

MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors format itself (`safetensors`, src/tensor.rs, MAX_HEADER_SIZE)."""
NOT_SERVED = (
    *("*.gguf", "*.bin", "*.pth", "*.pt", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.ot", "*.tflite"),
    *("consolidated*", "onnx/*", "openvino/*", "original/*", "coreml/*", "metal/*"),
)
"""Names (fnmatch) of the same weights in forms that no MLX engine loads: neither downloaded nor missed."""
_NOT_SERVED = re.compile("|".join(map(translate, NOT_SERVED)))
_SHARD = re.compile(r"(.+?)-(\d+)-of-(\d+)\.safetensors")
"""model-00001-of-00002, model-00001-of-000163 (DeepSeek), model-1-of-61 (Kimi), model.safetensors-00001-of-00014
(Qwen 3.5): what counts are the numbers."""
_MOST = 9999
_ENDS = re.compile(rb'"data_offsets": ?\[\d{1,18}, ?(\d{1,18})\]')
_FIRST = 64 * 1024
"""Bytes of a weight file in the first read: most headers are shorter."""

Tensors = dict[str, tuple[str, tuple[int, ...]]]
"""Name -> (dtype, shape), as the header says."""


def is_served(name: str) -> bool:
    """Whether a repository's file belongs to what MLX engines load, or at least might."""
    return _NOT_SERVED.match(name) is None


def is_weight(name: str) -> bool:
    """Whether a file holds weights. They lie at the top of the folder: subfolders have other models, adapters, formats.
    No engine's pattern matches a leading dot (`._model.safetensors` of a disk without extended attributes)."""
    return name.endswith(".safetensors") and "/" not in name and not name.startswith(".") and is_served(name)


def language_weights(names: Iterable[str]) -> list[str]:
    """Return the weight files that mlx-lm loads, and engines that load through it."""
    return sorted(name for name in names if is_weight(name) and name.startswith("model"))


def weights(names: Collection[str]) -> list[str]:
    """Return the weight files that an engine loads: those of mlx-lm, else all (mlx-vlm loads those)."""
    return language_weights(names) or sorted(filter(is_weight, names))


def missing(present: Collection[str], listed: Collection[str]) -> str | None:
    """Return the first missing weight file; None if those `present` form a complete set.

    `listed` is what an index, or the hub, names. It counts if it names all files of a complete set or, if no set is
    complete, any file that is present. Otherwise it belongs to another conversion.
    """
    here = set(present)
    lacking = [_lacking(members) for members in _sets(here)]
    whole = [members for members, lacks in zip(_sets(here), lacking, strict=True) if not lacks]
    counts = any(members <= set(listed) for members in whole) if whole else not here.isdisjoint(listed)
    unseen = sorted(set(listed) - here) if counts or not here else []
    if unseen or whole:
        return unseen[0] if unseen else None
    return next((lacks[0] for lacks in lacking if lacks), None)


@dataclass(frozen=True)
class Leftovers:
    """Files of an earlier conversion that an engine loads beside a complete set."""

    names: tuple[str, ...]
    why: str | None
    """Why both cannot be loaded as one model; None if they can."""


def leftovers(folder: str, present: Collection[str], listed: Collection[str]) -> Leftovers | None:
    """Return the files beside the complete set that `listed` names, else beside any; None if there is only one set.

    Raises `OSError`, `Damaged`.
    """
    sets = _sets(present)
    whole = [members for members in sets if members <= set(listed)] or [each for each in sets if not _lacking(each)]
    if len(sets) < 2 or not whole:
        return None
    found = []
    for members in whole:  # it is not known which set is the old one: one that can be loaded is enough
        extra = sorted(set().union(*sets) - members)
        found.append(Leftovers(tuple(extra), _conflict(folder, members, extra)))
    return next((each for each in found if each.why is None), found[0])


def _conflict(folder: str, whole: Collection[str], extra: Collection[str]) -> str | None:
    """Return why loading `extra` beside `whole` gives other tensors than `whole` alone; None if it gives the same."""
    wanted: Tensors = {}
    for name in whole:
        wanted |= tensors(f"{folder}/{name}")
    found: Tensors = {}
    last: dict[str, str] = {}
    for name in os.listdir(folder):  # the engine's order, too
        if name in whole or name in extra:
            held = tensors(f"{folder}/{name}")
            found |= held
            last |= dict.fromkeys(held, name)
    for tensor, form in found.items():
        if wanted.get(tensor) != form:
            what = "of another shape or type" if tensor in wanted else "that the others do not know"
            return f"{printable(last[tensor])} holds {printable(tensor)} {what}"
    return None


def _sets(names: Collection[str]) -> list[set[str]]:
    """Group files that belong together by their numbers. model.safetensors is a complete set by itself."""
    sets: dict[tuple[str, int], set[str]] = {}
    for name in sorted(names):
        if shard := _SHARD.fullmatch(name):
            sets.setdefault((shard[1], int(shard[3][:6])), set()).add(name)
        elif name == "model.safetensors":
            sets["model", 1] = sets.get(("model", 1), set()) | {name}
    return list(sets.values())


def _lacking(members: set[str]) -> list[str]:
    """Return the names that are missing between the first and the last number."""
    shards = [shard for name in members if (shard := _SHARD.fullmatch(name))]
    if not shards or "model.safetensors" in members:
        return []
    stem, width, last = shards[0][1], len(shards[0][2]), shards[0][3]
    here = {int(shard[2][:6]) for shard in shards}
    first = 0 if 0 in here else 1
    numbers = range(first, first + min(int(last[:6]), _MOST))
    return [f"{stem}-{number:0{width}d}-of-{last}.safetensors" for number in numbers if number not in here]


def damage(folder: str, names: Iterable[str], sizes: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Yield (name, why) for each weight file that is not exactly as long as its header says. Raises `OSError`."""
    for name in names:
        if why := wrong_length(f"{folder}/{name}", sizes[name]):
            yield name, f"{printable(name)} {why}"


def wrong_length(path: str, size: int) -> str | None:
    """Return why a safetensors file of `size` bytes does not fit its header; None if it does. Raises `OSError`."""
    try:
        if _fits(encoded_header(path, size), size):
            return None
        _, length = header(path, size)
    except Damaged as error:
        return str(error)
    return f"has {size} of {length} bytes" if size != length else None


def header(path: str, size: int) -> tuple[str | None, int]:
    """(the metadata's `format`, the length in bytes that the file should have) of a safetensors file.

    The format: 8 bytes, little endian, the length of the header; the header, JSON, each tensor with its
    `data_offsets` in what follows (https://github.com/huggingface/safetensors#format). Raises `OSError`, `Damaged`.
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
    found: Tensors = {}
    for name, tensor in parse(encoded_header(path, os.stat(path).st_size), "the header").items():
        if name != "__metadata__" and isinstance(tensor, dict):
            shape = tensor.get("shape")
            found[name] = str(tensor.get("dtype")), tuple(shape) if isinstance(shape, list) else ()
    return found


def header_bytes(path: str) -> int:
    """Return how many bytes of a safetensors file precede its tensors. Raises `OSError`."""
    return 8 + int.from_bytes(first_bytes(path, 8), "little")


def first_bytes(path: str, size: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return os.read(descriptor, size)
    finally:
        os.close(descriptor)


def _fits(encoded: bytes, size: int) -> bool:
    """Whether the last tensor ends where the file does, without parsing thousands of tensors. A string cannot pass
    for an offset: in JSON its quotes are escaped. What is written otherwise is parsed after all."""
    return max(map(int, _ENDS.findall(encoded)), default=-1) == size - 8 - len(encoded)


def encoded_header(path: str, size: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        start = os.read(descriptor, _FIRST)
        length = int.from_bytes(start[:8], "little")
        if is_pointer(start):
            raise Damaged("is a Git LFS pointer, not the weights")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise Damaged(f"is cut off or not a safetensors file ({size} bytes)")
        rest = os.read(descriptor, length + 8 - len(start)) if length + 8 > len(start) else b""
        return (start + rest)[8 : 8 + length]
    finally:
        os.close(descriptor)
