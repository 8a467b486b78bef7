"""One snapshot folder of a Hugging Face cache: is all of it there, is it MLX, what can be known of its model.

Reads only, standard library only, and no more than it needs: `init` asks this of every repository of a cache.
Everything in a snapshot comes from outside. Nothing in it may raise past this module, block it (a named pipe
called config.json), or make it read without bound.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import translate
from pathlib import Path

from mlxops.agent import reading
from mlxops.core.kvcache import HALF, KVCache, kv_cache, language_model

MAX_JSON = 64 * 1024 * 1024
"""Bytes; a tokenizer.json of 250,000 words has 35 million, a config.json a few thousand."""
MAX_CONFIG = 8 * 1024 * 1024
MAX_HEADER = 100_000_000
"""Bytes; the limit of the safetensors format itself (`safetensors`, src/tensor.rs, MAX_HEADER_SIZE)."""
MAX_README = 16 * 1024

NOT_SERVED = (
    *("*.gguf", "*.bin", "*.pth", "*.pt", "*.ckpt", "*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.ot", "*.tflite"),
    *("consolidated*", "onnx/*", "openvino/*", "original/*", "coreml/*", "metal/*"),
)
"""Names (fnmatch) of the same weights in forms that no MLX engine loads: neither downloaded nor missed."""

_NOT_SERVED = re.compile("|".join(map(translate, NOT_SERVED)))
_OTHER_FORMATS = {
    ".gguf": "GGUF",
    ".bin": "PyTorch weights",
    ".pth": "PyTorch weights",
    ".pt": "PyTorch weights",
    ".npz": "weights of an MLX older than safetensors",
    ".onnx": "ONNX",
    ".h5": "TensorFlow weights",
    ".msgpack": "Flax weights",
}
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
_NEEDED = re.compile(
    r"(config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template|preprocessor_config"
    r"|processor_config)\.json|chat_template\.jinja|tokenizer\.model|merges\.txt|vocab\.txt|[^/]+\.tiktoken|[^/]+\.py"
)
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")
_CONTEXT = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_context_length", "max_seq_len")
_INDEX = "model.safetensors.index.json"
_INDEX_HEAD = 4096
"""Bytes of an index in which its metadata are: they come first (mlx_lm.utils.save_model; transformers sorts keys)."""
_TOTAL = re.compile(rb'\s*\{\s*"metadata":\s*\{[^{}]*"total_size":\s*(\d{1,18})\s*[,}]')
_ENDS = re.compile(rb'"data_offsets": ?\[\d{1,18}, ?(\d{1,18})\]')
_FIRST = 64 * 1024
"""Bytes of a weight file in the first read: most headers are shorter."""


class Damaged(Exception):
    """A file that is there and is not what it should be; its text says what it is instead."""


@dataclass(frozen=True)
class Files:
    """What lies in a snapshot folder: names relative to it, symlinks followed (two levels in a Xet cache)."""

    sizes: Mapping[str, int]
    dangling: frozenset[str]
    """Names that lead to no regular file: the blob is gone, a loop, a pipe."""
    total: int
    """Bytes; a file under two names counts once."""


@dataclass(frozen=True)
class Verdict:
    """`why` is None for a complete MLX snapshot, else one line; `incomplete`: a download would help."""

    size_bytes: int
    why: str | None
    incomplete: bool = False


@dataclass(frozen=True)
class Shape:
    """What config.json alone tells: cheap enough to be asked for every model of a list."""

    model_type: str | None
    context_length: int | None
    cache: KVCache | None
    """What it keeps of a conversation; None where the configuration tells nothing."""


@dataclass(frozen=True)
class ModelFacts:
    """What the files tell before anything is started."""

    model_type: str | None
    architectures: tuple[str, ...]
    context_length: int | None
    cache: KVCache | None
    weight_bytes: int
    quantization: str | None
    """For people: "6-bit gs64"."""
    runs_code: tuple[str, ...]
    """Why loading would run code of the repository; empty if it would not."""
    has_chat_template: bool
    problems: tuple[str, ...]
    """Why an engine could not serve it; empty if nothing is known against it."""


def judge(folder: str, org: str) -> Verdict:
    """Whether a snapshot of a repository of `org` can be registered; never raises."""
    try:
        files, tree = _list(folder), _tree(folder)
        if not _weights({**files.sizes, **dict.fromkeys(files.dangling, 0), **(tree or {})}):
            return _without_weights(files, tree)
        if why := _missing(folder, files, tree):
            return Verdict(files.total, f"incomplete: {why}", incomplete=True)
        return Verdict(files.total, _not_mlx(folder, org, _weights(files.sizes)))
    except (OSError, Damaged) as error:
        return Verdict(0, f"cannot be read: {_reason(error)}", incomplete=isinstance(error, Damaged))


def completeness(snapshot_dir: Path) -> str | None:
    """None if everything that an engine needs is there and as long as it should be, else one line why not.

    The thorough form: it also holds every weight file against its own header.
    """
    folder = str(snapshot_dir)
    try:
        files, tree = _list(folder), _tree(folder)
        if why := _missing(folder, files, tree):
            return why
        return next(_wrong_lengths(folder, files), None)
    except (OSError, Damaged) as error:
        return _reason(error)


def damaged_weights(snapshot_dir: Path) -> tuple[str, ...]:
    """The weight files whose length is not what their own header says."""
    folder = str(snapshot_dir)
    return tuple(name for name, _ in _damage(folder, _list(folder)))


def inspect(path: Path) -> ModelFacts:
    """The facts of the snapshot at `path`; bad files never raise, they become problems."""
    folder = str(path)
    problems: list[str] = []
    config = _object(folder, "config.json", problems)
    tokenizer = _object(folder, "tokenizer_config.json", problems, optional=True)
    try:
        files = _list(folder)
    except OSError as error:
        files = Files({}, frozenset(), 0)
        problems.append(_reason(error))
    if not _has_tokenizer(files):
        problems.append("no tokenizer (tokenizer.json, tokenizer.model, vocab.json)")
    if (why := completeness(path)) and why not in problems:
        problems.append(why)
    architectures = config.get("architectures")
    shaped = _shape(config, folder)
    return ModelFacts(
        model_type=shaped.model_type,
        architectures=tuple(map(str, architectures)) if isinstance(architectures, list) else (),
        context_length=shaped.context_length,
        cache=shaped.cache,
        weight_bytes=sum(files.sizes[name] for name in _weights(files.sizes)),
        quantization=_quantization(config),
        runs_code=tuple(_code(config, tokenizer)),
        has_chat_template=bool(tokenizer.get("chat_template"))
        or not files.sizes.keys().isdisjoint({"chat_template.jinja", "chat_template.json"}),
        problems=tuple(problems),
    )


def shape(path: Path) -> Shape:
    """The shape of the model in the snapshot at `path`; a bad file never raises, it tells nothing."""
    folder = str(path)
    return _shape(_object(folder, "config.json", []), folder)


def _shape(config: Mapping[str, object], folder: str) -> Shape:
    longest = (_positive(each, key) for key in _CONTEXT for each in (config, language_model(config)))
    model_type = config.get("model_type")
    cache = kv_cache(config)
    if cache and cache.value_bytes > HALF and _has_halves(folder):
        cache = replace(cache, value_bytes=HALF)
    return Shape(
        model_type=model_type if isinstance(model_type, str) else None,
        context_length=next(filter(None, longest), None),
        cache=cache,
    )


def _has_halves(folder: str) -> bool:
    """Whether the weights, and with them what is computed, have 16 bits. mlx_lm.convert leaves the `torch_dtype` of a
    config.json as it was."""
    try:
        files = _list(folder)
        header = _encoded_header(f"{folder}/{(name := _weights(files.sizes)[0])}", files.sizes[name])
    except (OSError, Damaged, IndexError):
        return False
    return re.search(rb'"dtype": ?"B?F16"', header) is not None


def weight_files(path: Path) -> dict[str, int]:
    """The weight files of the snapshot at `path` with their sizes in bytes; empty where it cannot be read."""
    try:
        sizes = _list(str(path)).sizes
    except OSError:
        return {}
    return {name: sizes[name] for name in _weights(sizes)}


def is_served(name: str) -> bool:
    """Whether a repository's file belongs to what MLX engines load, or at least might."""
    return _NOT_SERVED.match(name) is None


def is_weight(name: str) -> bool:
    """Weights lie at the top of the folder; in subfolders are other models, adapters, other formats."""
    return name.endswith(".safetensors") and "/" not in name and is_served(name)


def printable(text: str) -> str:
    """Text from outside in one bounded line of ASCII; control characters and undecodable bytes are escaped."""
    if len(text) <= 200 and text.isascii() and text.isprintable():
        return text
    escaped = text.encode("ascii", "backslashreplace").decode("ascii")
    escaped = "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in escaped)
    return escaped if len(escaped) <= 200 else escaped[:197] + "..."


def read(path: str, limit: int) -> bytes:
    """The bytes of a regular file. Raises `OSError`; `Damaged` if it is none, or longer than `limit`."""
    try:
        return reading.read(path, limit)
    except reading.Unfit as error:
        raise Damaged(f"{_base(path)} {error.strerror}") from None


def _list(folder: str) -> Files:
    sizes: dict[str, int] = {}
    dangling: set[str] = set()
    seen: set[tuple[int, int]] = set()
    total = 0
    folders = [("", folder)]
    while folders:
        prefix, path = folders.pop()
        with os.scandir(path) as entries:
            for entry in entries:
                name = prefix + entry.name
                if entry.is_dir(follow_symlinks=False):
                    folders.append((name + "/", entry.path))
                    continue
                try:
                    status = entry.stat()
                except OSError:
                    dangling.add(name)
                    continue
                if not stat.S_ISREG(status.st_mode):
                    dangling.add(name)
                    continue
                sizes[name] = status.st_size
                if (status.st_dev, status.st_ino) not in seen:
                    seen.add((status.st_dev, status.st_ino))
                    total += status.st_size
    return Files(sizes, frozenset(dangling), total)


def _tree(folder: str) -> dict[str, int] | None:
    """Names and sizes of everything in the commit, as huggingface_hub 1.22 and later write beside the snapshots
    (`_tree_cache.py`, format 1); None if it is not there or not to be understood."""
    repo, commit = os.path.dirname(os.path.dirname(folder)), os.path.basename(folder)
    try:
        listing = _json(f"{repo}/trees/{commit}.json", MAX_JSON)
    except (OSError, Damaged):
        return None
    files = listing.get("files")
    if listing.get("format_version") != 1 or not isinstance(files, dict):
        return None
    sizes: dict[str, int] = {}
    for name, entry in files.items():
        size = (entry.get("lfs_size") or entry.get("size")) if isinstance(entry, dict) else None
        if not isinstance(size, int):
            return None
        sizes[name] = size
    return sizes


def _missing(folder: str, files: Files, tree: Mapping[str, int] | None) -> str | None:
    """The first thing, by name, that a complete snapshot has and this one has not; quick if there is a tree."""
    if "config.json" not in files.sizes:
        return "config.json is missing"
    if tree is not None:
        return _missing_of_tree(files, tree) or _no_weights(files)
    _json(f"{folder}/config.json", MAX_CONFIG)
    for name in sorted(files.dangling):
        if _NEEDED.fullmatch(name):
            return f"{printable(name)} is missing"
    if _adds_up(folder, files):
        return None
    for name in sorted(_expected_weights(folder, files)):
        if name not in files.sizes:
            return f"{printable(name)} is missing"
    return next(_wrong_lengths(folder, files), None) or _no_weights(files)


def _no_weights(files: Files) -> str | None:
    return None if _weights(files.sizes) else "no weights (*.safetensors)"


def _missing_of_tree(files: Files, tree: Mapping[str, int]) -> str | None:
    weights = set(_weights(tree))
    for name in sorted(tree):
        if name not in weights and not _NEEDED.fullmatch(name) and name != _INDEX:
            continue
        size = files.sizes.get(name)
        if size is None:
            return f"{printable(name)} is missing"
        if size != tree[name]:
            return f"{printable(name)} has {size} of {tree[name]} bytes"
    return None


def _weights(names: Mapping[str, int]) -> list[str]:
    """What an engine loads: `model*.safetensors` (mlx_lm.utils.load_model), else whatever weights there are."""
    weights = sorted(name for name in names if is_weight(name))
    return [name for name in weights if name.startswith("model")] or weights


def _expected_weights(folder: str, files: Files) -> set[str]:
    """Names of weight files according to the index, else to the numbers in the names themselves."""
    if _INDEX in files.dangling:
        return {_INDEX}
    if _INDEX in files.sizes:
        shards = _json(f"{folder}/{_INDEX}", MAX_JSON).get("weight_map")
        try:
            names = set(shards.values()) if isinstance(shards, dict) else set()
        except TypeError:  # lists or objects in place of names
            names = set()
        if not names or not all(isinstance(name, str) and name and "/" not in name for name in names):
            raise Damaged(f"{_INDEX} names no weight files")
        return names
    names = {name for name in files.dangling if is_weight(name)}
    for name in _weights(files.sizes):
        if shard := _SHARD.fullmatch(name):
            stem, last = shard[1], shard[3]
            names |= {f"{stem}-{number:05d}-of-{last}.safetensors" for number in range(1, min(int(last), 9999) + 1)}
    return names


def _adds_up(folder: str, files: Files) -> bool:
    """Whether the weight files hold as many bytes of tensors together as the index says at its beginning: then none is
    missing and none was cut off. For that, only the lengths of their headers have to be read. Parsing the headers and
    indexes of a thousand repositories takes longer than all the rest of an `init`."""
    if _INDEX not in files.sizes or not files.dangling.isdisjoint((_INDEX, *filter(is_weight, files.dangling))):
        return False
    total = _TOTAL.match(_first(f"{folder}/{_INDEX}", _INDEX_HEAD))
    weights = _weights(files.sizes)
    headers = sum(8 + int.from_bytes(_first(f"{folder}/{name}", 8), "little") for name in weights) if total else 0
    return total is not None and sum(files.sizes[name] for name in weights) == headers + int(total[1])


def _first(path: str, size: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return os.read(descriptor, size)
    finally:
        os.close(descriptor)


def _wrong_lengths(folder: str, files: Files) -> Iterator[str]:
    for _, why in _damage(folder, files):
        yield why


def _damage(folder: str, files: Files) -> Iterator[tuple[str, str]]:
    """(name, why) of each weight file that is not exactly as long as its header says."""
    for name in _weights(files.sizes):
        size = files.sizes[name]
        path = f"{folder}/{name}"
        try:
            if _fits(_encoded_header(path, size), size):
                continue
            _, length = _header(path, size)
        except Damaged as error:
            yield name, f"{printable(name)} {error}"
            continue
        if size != length:
            yield name, f"{printable(name)} has {size} of {length} bytes"


def _fits(header: bytes, size: int) -> bool:
    """Whether the last tensor ends where the file does, without parsing thousands of tensors. A string cannot pass
    for an offset: in JSON its quotes are escaped. What is written otherwise is parsed after all."""
    return max(map(int, _ENDS.findall(header)), default=-1) == size - 8 - len(header)


def _header(path: str, size: int) -> tuple[str | None, int]:
    """(the metadata's `format`, the length in bytes that the file should have) of a safetensors file.

    The format: 8 bytes, little endian, the length of the header; the header, JSON, each tensor with its
    `data_offsets` in what follows (https://github.com/huggingface/safetensors#format).
    """
    encoded = _encoded_header(path, size)
    header = _parse(encoded, "the header")
    end = 0
    for name, tensor in header.items():
        if name == "__metadata__":
            continue
        offsets = tensor.get("data_offsets") if isinstance(tensor, dict) else None
        if not isinstance(offsets, list) or len(offsets) != 2 or not all(isinstance(at, int) for at in offsets):
            raise Damaged("has a header without offsets")
        end = max(end, offsets[1])
    metadata = header.get("__metadata__")
    written_by = metadata.get("format") if isinstance(metadata, dict) else None
    return (written_by if isinstance(written_by, str) else None), 8 + len(encoded) + end


def _encoded_header(path: str, size: int) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        start = os.read(descriptor, _FIRST)
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise Damaged(f"is cut off or not a safetensors file ({size} bytes)")
        rest = os.read(descriptor, length + 8 - len(start)) if length + 8 > len(start) else b""
        return (start + rest)[8 : 8 + length]
    finally:
        os.close(descriptor)


def _without_weights(files: Files, tree: Mapping[str, int] | None) -> Verdict:
    for name in sorted({*files.sizes, *files.dangling, *(tree or ())}):
        if kind := _OTHER_FORMATS.get(os.path.splitext(name)[1]):
            return Verdict(files.total, f"not MLX: {kind} ({printable(name)})")
    if tree is not None:
        return Verdict(files.total, "not MLX: the repository has no weights (*.safetensors)")
    return Verdict(files.total, "incomplete: no weights (*.safetensors)", incomplete=True)


def _not_mlx(folder: str, org: str, weights: list[str]) -> str | None:
    """None for MLX, else why not. The cheapest evidence first; that of the hub itself is the model card's."""
    if org == "mlx-community" or _quantization(_json(f"{folder}/config.json", MAX_CONFIG)):
        return None
    first = f"{folder}/{weights[0]}"
    try:
        written_by, _ = _header(first, os.stat(first).st_size)
    except Damaged as error:
        return f"not MLX: {printable(weights[0])} {error}"
    if written_by == "mlx" or _card_says_mlx(folder):
        return None
    if written_by == "pt":
        return "not MLX: safetensors in PyTorch's format"
    return "not MLX: nothing says that its safetensors are MLX's"


def _quantization(config: Mapping[str, object]) -> str | None:
    """config.json's `quantization` as mlx_lm.convert writes it."""
    quantization = config.get("quantization")
    if not isinstance(quantization, dict):
        return None
    bits, group = _positive(quantization, "bits"), _positive(quantization, "group_size")
    if bits is None or group is None:
        return None
    mode = quantization.get("mode")
    return f"{bits}-bit gs{group}" + (f" {mode}" if mode in {"mxfp4", "mxfp8", "nvfp4"} else "")


def _card_says_mlx(folder: str) -> bool:
    """The front matter of README.md has `library_name: mlx` or the tag mlx (hub-docs, modelcard.md)."""
    try:
        with open(reading.open_file(f"{folder}/README.md"), "rb", buffering=0) as file:
            card = file.read(MAX_README).decode("utf-8", "replace")
    except OSError:
        return False
    front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card, re.DOTALL)
    said = r"""^(library_name:\s*|\s*-\s+|tags:\s*\[(.*,)?\s*)["']?mlx["']?\s*([,\]].*)?$"""
    return front is not None and re.search(said, front[1], re.MULTILINE) is not None


def _code(config: Mapping[str, object], tokenizer: Mapping[str, object]) -> Iterator[str]:
    """mlx-lm 0.30.6-0.31.3 import config.json's `model_file` unasked (CVE-2026-5843); transformers import what
    `auto_map` names."""
    if config.get("model_file"):
        yield f"config.json names model_file {printable(str(config['model_file']))}"
    for name, content in (("config.json", config), ("tokenizer_config.json", tokenizer)):
        if content.get("auto_map"):
            yield f"{name} has an auto_map"


def _has_tokenizer(files: Files) -> bool:
    return any(name in files.sizes for name in _TOKENIZERS) or any(name.endswith(".tiktoken") for name in files.sizes)


def _positive(mapping: Mapping[str, object], key: str) -> int | None:
    value = mapping.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _object(folder: str, name: str, problems: list[str], *, optional: bool = False) -> Mapping[str, object]:
    """The JSON object in a file of the folder; an empty one, and a problem, where it cannot be had."""
    try:
        return _json(f"{folder}/{name}", MAX_CONFIG if name == "config.json" else MAX_JSON)
    except FileNotFoundError:
        if not optional:
            problems.append(f"{name} is missing")
    except (OSError, Damaged) as error:
        problems.append(_reason(error))
    return {}


def _json(path: str, limit: int) -> dict[str, object]:
    return _parse(read(path, limit), _base(path))


def _parse(data: bytes, what: str) -> dict[str, object]:
    try:
        parsed = json.loads(data)
    except (ValueError, RecursionError):
        raise Damaged(f"{what} is not JSON") from None
    if not isinstance(parsed, dict):
        raise Damaged(f"{what} is not a JSON object")
    return parsed


def _base(path: str) -> str:
    return printable(path.rpartition("/")[2])


def _reason(error: OSError | Damaged) -> str:
    if isinstance(error, Damaged):
        return str(error)
    return f"{_base(os.fsdecode(error.filename or ''))}: {error.strerror or type(error).__name__}"
