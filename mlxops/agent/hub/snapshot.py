"""One snapshot folder of a Hugging Face cache: whether it is complete, whether it is MLX, and facts about its model.

Reads only, with the standard library, and as little as possible, because `init` examines every repository of a cache.
The content of a snapshot is untrusted. It must not raise an exception out of this module, block it (a named pipe called
config.json) or make it read without limit.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import field, replace
from pathlib import Path
from typing import NamedTuple

from mlxops.agent.hub import contents
from mlxops.agent.hub.contents import Damaged, json_object, printable
from mlxops.agent.hub.weights import (
    damage,
    first_bytes,
    header,
    header_bytes,
    is_weight,
    language_weights,
    leftovers,
    missing,
    tensors,
    weights,
    wrong_length,
)
from mlxops.common import files as files_io
from mlxops.core.frozen import dataclass
from mlxops.core.kv_cache import HALF, KVCache, kv_cache, language_model, seeing_cache
from mlxops.core.loadable import is_packed, no_model, no_tokenizer, unsaid_quantization

MAX_JSON = contents.MAX_TEXT
MAX_CONFIG = 8 * 1024 * 1024
MAX_README = 16 * 1024
MAX_HASHED = 8 * 1024 * 1024
"""Files with more bytes are not hashed to find edits, because that is done at each load."""

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
_NEEDED = re.compile(
    r"(config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template|preprocessor_config"
    r"|processor_config)\.json|chat_template\.jinja|tokenizer\.model|merges\.txt|vocab\.txt|[^/]+\.tiktoken|[^/]+\.py"
)
_CONTEXT = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_context_length", "max_seq_len")
_PARSED = ("special_tokens_map.json", "added_tokens.json")
"""Files that engines parse besides the two configurations, if they exist."""
_QUANTIZED = ("quantization", "quantization_config")
_EDITED_FILES = ("generation_config.json", "README.md")
"""Files that engines do not need but people edit."""
_INDEX = "model.safetensors.index.json"
_WEIGHTS_HEAD = 64 * 1024
"""Bytes at the beginning of a weight file that contain the types of its first tensors."""
_INDEX_HEAD = 4096
"""Bytes at the beginning of an index that contain its metadata (mlx_lm.utils.save_model; transformers sorts keys)."""
_TOTAL = re.compile(rb'\s*\{\s*"metadata":\s*\{[^{}]*"total_size":\s*(\d{1,18})\s*[,}]')


@dataclass(frozen=True)
class Listing:
    """The files of a snapshot folder, with relative names. Symlinks are followed (two levels in a Xet cache)."""

    sizes: Mapping[str, int]
    dangling: frozenset[str]
    """Names that are not regular files: links to missing blobs, loops, pipes."""
    total: int
    """Bytes. A file with two names counts once."""


class Listed(NamedTuple):
    """A file in the hub's list."""

    size: int
    etag: str
    """SHA-256 for LFS files, git's blob id for others; empty if the list has none."""


@dataclass(frozen=True)
class Edited:
    """A complete file of a snapshot that differs from the hub's."""

    name: str
    size: int
    listed: int | None
    """The hub's size in bytes; None if not known."""

    def __str__(self) -> str:
        sizes = f" ({self.size} bytes, the hub's has {self.listed})" if self.listed not in (None, self.size) else ""
        return f"{printable(self.name)} differs from the hub's{sizes}"


@dataclass(frozen=True)
class Verdict:
    """`why` is None for a complete MLX snapshot, else one line. `incomplete`: a download would repair it."""

    size_bytes: int
    why: str | None
    incomplete: bool = False
    whole: bool = False
    """It is complete but not in MLX's format. Engines convert such weights while they load them."""


@dataclass(frozen=True)
class Shape:
    """The facts in config.json alone, which are cheap enough to read for every model of a list."""

    model_type: str | None
    context_length: int | None
    cache: KVCache | None
    """The size of its KV cache; None if config.json does not show it."""
    other_cache: KVCache | None
    """The size when it is served as a model other than a language model."""

    def cache_of(self, model_type: str) -> KVCache | None:
        """Return the size of the KV cache. `model_type`: the engine's option, `lm` or another."""
        return self.cache if model_type == "lm" else self.other_cache


@dataclass(frozen=True)
class ModelFacts:
    """What the files show before a server is started."""

    shape: Shape
    architectures: tuple[str, ...]
    weight_bytes: int
    quantization: str | None
    """For people: "6-bit gs64"."""
    model_file: str | None
    """A Python file of the repository that config.json names. mlx-lm 0.30.6-0.31.3 import it without being asked to."""
    auto_map: tuple[str, ...]
    """The files that name code for transformers. It runs only if it is trusted."""
    has_chat_template: bool
    problems: tuple[str, ...]
    """Why an engine cannot serve it; empty if no problem is known."""
    broken: tuple[str, ...] = ()
    """The text files that do not parse. `problems` says why."""
    oddities: tuple[str, ...] = ()
    """Warnings that do not prevent serving."""
    language_weights: bool = True
    """There are weights that an engine for language models loads (model*.safetensors)."""
    config: Mapping[str, object] = field(default_factory=dict)
    tokenizer_class: str | None = None
    """The tokenizer's class if it needs code of the repository, and there is no tokenizer.json instead."""
    packed: bool = False
    """The weights are quantized, which config.json may not show."""


def judge(folder: str, org: str) -> Verdict:
    """Return whether a snapshot of a repository of `org` can be registered. Never raises."""
    try:
        files, tree = _list(folder), _tree(folder)
        if why := _no_model(files, tree):
            return Verdict(files.total, f"not MLX: {why}")
        if not weights({*files.sizes, *files.dangling, *(tree or ())}):
            return _without_weights(files, tree)
        if why := _missing(folder, files, tree):
            return Verdict(files.total, f"incomplete: {why}", incomplete=True)
        why = _not_mlx(folder, org, weights(files.sizes))
        return Verdict(files.total, why, whole=True)
    except Damaged as error:
        return Verdict(0, f"cannot be read: {error}", incomplete=error.ends_early)
    except OSError as error:
        return Verdict(0, f"cannot be read: {_reason(error)}")


def completeness(snapshot_dir: Path) -> str | None:
    """Return why a snapshot is incomplete, in one line; None if all files that an engine needs are complete.

    More thorough than `judge`: it compares each weight file with its header.
    """
    folder = str(snapshot_dir)
    try:
        files, tree = _list(folder), _tree(folder)
        if why := _missing(folder, files, tree):
            return why
        return next((why for _, why in damage(folder, weights(files.sizes), files.sizes)), None)
    except (OSError, Damaged) as error:
        return _reason(error)


def damaged_weights(snapshot_dir: Path) -> tuple[str, ...]:
    """Return the weight files whose length does not match their header."""
    folder = str(snapshot_dir)
    sizes = _list(folder).sizes
    return tuple(name for name, _ in damage(folder, weights(sizes), sizes))


def is_truncated(path: str, name: str, size: int, whole: int) -> bool:
    """Return whether a file of `size` bytes is a truncated form of the hub's file of `whole` bytes.

    Weights that match their header, and text that parses, are complete: an edit. Raises `OSError`, `Damaged`."""
    if is_weight(name):
        return wrong_length(path, size) is not None
    return contents.ends_early(path, name, size, whole)


def edited(snapshot_dir: Path) -> tuple[Edited, ...]:
    """Return the files of a snapshot that differ from the hub's, by its file list and the names of blobs."""
    folder = str(snapshot_dir)
    try:
        files = _list(folder)
    except OSError:
        return ()
    tree = _tree(folder) or {}
    links = any(os.path.islink(f"{folder}/{name}") for name in files.sizes)
    edits = []
    for name in sorted(filter(_is_model_file, files.sizes)):
        size, listed = files.sizes[name], tree.get(name)
        etag = listed.etag if listed else _blob_name(f"{folder}/{name}")
        if listed is not None and size != listed.size:
            edits.append(Edited(name, size, listed.size))
        elif etag and contents.content_hash(f"{folder}/{name}", etag, MAX_HASHED) not in (None, etag):
            edits.append(Edited(name, size, listed.size if listed else None))
        elif not etag and links and not os.path.islink(f"{folder}/{name}"):
            edits.append(Edited(name, size, None))  # it replaced a link into the cache
    return tuple(edits)


def is_downloaded(folder: str, name: str) -> bool:
    """Return whether a download creates a file of this name in the snapshot."""
    return _is_model_file(name) or name == _INDEX or name in (_tree(folder) or ())


def edit_notice(file: Path, repo_id: str, revision: str) -> str:
    """Return a sentence that an edited file is kept, with the commands that restore the hub's."""
    return f"it is kept and served as it is (to restore the hub's file: {restore_commands(file, repo_id, revision)})"


def correction_hint(file: Path, repo_id: str, revision: str) -> str:
    """Return a hint for a file that engines cannot parse."""
    return f"correct {file}, or restore the hub's file: {restore_commands(file, repo_id, revision)}"


def restore_commands(file: Path, repo_id: str, revision: str) -> str:
    """Return the commands that replace an edited file by the hub's. They also delete the target of a link."""
    return f"rm {shlex.quote(os.path.realpath(file))}; `mlxctl pull --repo {repo_id}@{revision}`"


def broken_link_target(folder: str, name: str) -> str | None:
    """Return the target of a dangling link that leads out of the cache, which only a person makes; else None."""
    path = f"{folder}/{name}"
    if not os.path.islink(path) or os.path.exists(path):  # an unreadable target counts as missing
        return None
    cache = os.path.realpath(os.path.join(folder, *3 * (os.pardir,)))
    target = os.path.realpath(path)
    return None if target.startswith(f"{cache}/") else target


def inspect(path: Path) -> ModelFacts:
    """Return the facts of the snapshot at `path`. Bad files never raise; they are listed in `problems`."""
    folder = str(path)
    problems: list[str] = []
    broken: list[str] = []
    config = _object(folder, "config.json", problems, broken)
    tokenizer = _object(folder, "tokenizer_config.json", problems, broken, optional=True)
    try:
        files = _list(folder)
    except OSError as error:
        files = Listing({}, frozenset(), 0)
        problems.append(_reason(error))
    if why := no_tokenizer(files.sizes):
        problems.append(why)
    for name in _PARSED:
        _object(folder, name, problems, broken, optional=True)
    _check_generation(folder, problems, broken)
    _check_tokenizer(folder, files, problems, broken)
    if (why := completeness(path)) and why not in problems:
        problems.append(why)
    oddities = [] if problems else list(_odd_weights(folder, files, config, problems))
    if "modules.json" in files.sizes or "1_Pooling/config.json" in files.sizes:
        oddities.append("it is a model for embeddings (sentence-transformers): its chat completions are meaningless")
    architectures = config.get("architectures")
    model_file = config.get("model_file")
    return ModelFacts(
        shape=_shape(config, folder),
        architectures=tuple(map(str, architectures)) if isinstance(architectures, list) else (),
        weight_bytes=sum(files.sizes[name] for name in weights(files.sizes)),
        quantization=_quantization(config),
        model_file=printable(str(model_file)) if model_file else None,
        auto_map=tuple(
            name
            for name, content in (("config.json", config), ("tokenizer_config.json", tokenizer))
            if content.get("auto_map")
        ),
        has_chat_template=bool(tokenizer.get("chat_template"))
        or not files.sizes.keys().isdisjoint({"chat_template.jinja", "chat_template.json"}),
        problems=tuple(problems),
        broken=tuple(broken),
        oddities=tuple(oddities),
        language_weights=bool(language_weights(files.sizes)),
        config=config,
        tokenizer_class=_own_tokenizer(tokenizer) if "tokenizer.json" not in files.sizes else None,
        packed=not problems and any(key in config for key in _QUANTIZED) and _are_packed(folder, files),
    )


def _own_tokenizer(tokenizer: Mapping[str, object]) -> str | None:
    auto_map = tokenizer.get("auto_map")
    named = tokenizer.get("tokenizer_class")
    return str(named) if isinstance(auto_map, dict) and auto_map.get("AutoTokenizer") and named else None


def _are_packed(folder: str, files: Listing) -> bool:
    try:
        headers = [tensors(f"{folder}/{name}") for name in weights(files.sizes)]
    except (OSError, Damaged):
        return False
    return any(is_packed({name: dtype for name, (dtype, _) in header.items()}) for header in headers)


def _check_tokenizer(folder: str, files: Listing, problems: list[str], broken: list[str]) -> None:
    """Check only the beginning and end of tokenizer.json, because parsing many megabytes takes long."""
    if files.sizes.get("tokenizer.json", 0) > 0:
        with suppress(OSError):
            pointer = contents.is_pointer(first_bytes(f"{folder}/tokenizer.json", 64))
            if pointer or not files_io.read_end(f"{folder}/tokenizer.json", 64).rstrip().endswith(b"}"):
                problems.append(f"tokenizer.json {'is a Git LFS pointer' if pointer else 'is cut off'}")
                broken.append("tokenizer.json")


def _check_generation(folder: str, problems: list[str], broken: list[str]) -> None:
    """Report a generation_config.json that is JSON but not an object. Engines fail on it, but ignore invalid JSON."""
    try:
        json_object(f"{folder}/generation_config.json", MAX_CONFIG)
    except Damaged as error:
        if str(error).endswith("is not a JSON object"):
            problems.append(str(error))
            broken.append("generation_config.json")
    except OSError:
        pass  # it is optional


def _odd_weights(folder: str, files: Listing, config: Mapping[str, object], problems: list[str]) -> Iterator[str]:
    """Yield warnings about an index or weights of another conversion. Add to `problems` what prevents loading."""
    present = weights(files.sizes)
    index = _indexed(folder, files)
    if index and not index >= set(present) and not index <= set(present):
        yield f"{_INDEX} names other weight files than those present; engines do not read it"
    try:
        if present and (unsaid := unsaid_quantization(config, tensors(f"{folder}/{present[0]}"))):
            problems.append(unsaid)
        left = leftovers(folder, present, index or set(_tree(folder) or ()))
    except (OSError, Damaged) as error:
        problems.append(_reason(error))
        return
    if left and left.why:
        problems.append(f"{left.why}: it is left from another conversion, and engines load every model*.safetensors")
    elif left:
        yield f"{printable(left.names[0])} is loaded too, and seems to be left from another conversion"


def shape(path: Path) -> Shape:
    """Return the shape of the model in the snapshot at `path`. For a bad config.json, its fields are None."""
    folder = str(path)
    return _shape(_object(folder, "config.json", [], []), folder)


def _shape(config: Mapping[str, object], folder: str) -> Shape:
    longest = (_positive(each, key) for key in _CONTEXT for each in (config, language_model(config)))
    model_type = config.get("model_type")
    cache, other_cache = kv_cache(config), seeing_cache(config)
    if cache and cache.value_bytes > HALF and _has_halves(folder):
        cache, other_cache = replace(cache, value_bytes=HALF), other_cache and replace(other_cache, value_bytes=HALF)
    return Shape(
        model_type=model_type if isinstance(model_type, str) else None,
        context_length=next(filter(None, longest), None),
        cache=cache,
        other_cache=other_cache,
    )


def _has_halves(folder: str) -> bool:
    """Return whether the weights, and so the KV cache, have 16 bits.

    The `torch_dtype` of config.json does not show it, because mlx_lm.convert leaves it unchanged."""
    try:
        files = _list(folder)
        name = weights(files.sizes)[0]
        head = first_bytes(f"{folder}/{name}", _WEIGHTS_HEAD)
    except (OSError, Damaged, IndexError):
        return False
    return re.search(rb'"dtype": ?"B?F16"', head) is not None


def weight_files(path: Path) -> dict[str, int]:
    """Return the weight files of the snapshot at `path` with their sizes in bytes; empty if it cannot be read."""
    try:
        sizes = _list(str(path)).sizes
    except OSError:
        return {}
    return {name: sizes[name] for name in weights(sizes)}


def _list(folder: str) -> Listing:
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
    return Listing(sizes, frozenset(dangling), total)


def _tree(folder: str) -> dict[str, Listed] | None:
    """Return the hub's list of the commit's files; None if there is none or it cannot be read.

    huggingface_hub 1.22 and later store it beside the snapshots (`_tree_cache.py`, format 1)."""
    repo, commit = os.path.dirname(os.path.dirname(folder)), os.path.basename(folder)
    try:
        listing = json_object(f"{repo}/trees/{commit}.json", MAX_JSON)
    except (OSError, Damaged):
        return None
    files = listing.get("files")
    if listing.get("format_version") != 1 or not isinstance(files, dict):
        return None
    tree: dict[str, Listed] = {}
    for name, entry in files.items():
        size = (entry.get("lfs_size") or entry.get("size")) if isinstance(entry, dict) else None
        if not isinstance(size, int):
            return None
        etag = entry.get("lfs_sha256") or entry.get("blob_id")
        tree[name] = Listed(size, etag if isinstance(etag, str) else "")
    return tree


def _missing(folder: str, files: Listing, tree: Mapping[str, Listed] | None) -> str | None:
    """Return why a snapshot is incomplete; None if it is complete. Fast if there is a tree.

    Raises `Damaged` for what a download would not repair: an edit that does not parse, a person's dangling link.
    """
    if "config.json" not in files.sizes:
        return _missing_file(folder, files, "config.json")
    for name in sorted(files.dangling):
        if _NEEDED.fullmatch(name) or (name in weights(files.dangling)):
            return _missing_file(folder, files, name)
    if tree is not None:
        return _missing_of_tree(folder, files, tree) or _no_weights(files)
    json_object(f"{folder}/config.json", MAX_CONFIG)
    if _sizes_match_index(folder, files):
        return None
    present = weights(files.sizes)
    if why := missing(present, _indexed(folder, files)):
        return f"{printable(why)} is missing"
    return next((why for _, why in damage(folder, present, files.sizes)), None) or _no_weights(files)


def _missing_file(folder: str, files: Listing, name: str) -> str:
    if name in files.dangling and (target := broken_link_target(folder, name)):
        raise Damaged(f"{printable(name)} is a link to {printable(target)}, which does not exist")
    return f"{printable(name)} is missing"


def _no_weights(files: Listing) -> str | None:
    return None if weights(files.sizes) else "no weights (*.safetensors)"


def _missing_of_tree(folder: str, files: Listing, tree: Mapping[str, Listed]) -> str | None:
    for name in sorted(filter(_NEEDED.fullmatch, tree)):
        if name not in files.sizes:
            return f"{printable(name)} is missing"
    present = weights(files.sizes)
    if present and (why := missing(present, weights(tree))):
        return f"{printable(why)} is missing"
    for name in sorted((*filter(_NEEDED.fullmatch, tree), *present)):
        size, listed = files.sizes[name], tree.get(name)
        if listed is None or size == listed.size:
            continue  # not in the list, or of the same size: checked before a load
        if is_truncated(f"{folder}/{name}", name, size, listed.size):
            return f"{printable(name)} has {size} of {listed.size} bytes"
    return None


def _indexed(folder: str, files: Listing) -> set[str]:
    """Return the weight files that the index names; empty if there is no readable index."""
    if _INDEX not in files.sizes:
        return set()
    try:
        named = json_object(f"{folder}/{_INDEX}", MAX_JSON).get("weight_map")
    except (OSError, Damaged):
        return set()
    return {name for name in named.values() if isinstance(name, str)} if isinstance(named, dict) else set()


def _sizes_match_index(folder: str, files: Listing) -> bool:
    """Return whether the weight files together have as many bytes of tensors as the beginning of the index says.

    If so, none is missing and none is truncated. This reads only the lengths of the headers: parsing the headers and
    indexes of a thousand repositories takes longer than the rest of `init`."""
    if _INDEX not in files.sizes or any(map(is_weight, files.dangling)):
        return False
    total = _TOTAL.match(first_bytes(f"{folder}/{_INDEX}", _INDEX_HEAD))
    present = weights(files.sizes)
    headers = sum(header_bytes(f"{folder}/{name}") for name in present) if total else 0
    return total is not None and sum(files.sizes[name] for name in present) == headers + int(total[1])


def _is_model_file(name: str) -> bool:
    return name in _EDITED_FILES or is_weight(name) or _NEEDED.fullmatch(name) is not None


def _blob_name(path: str) -> str:
    """Return the name of the blob to which a file links, which is the hub's hash; empty for other files."""
    try:
        link = os.readlink(path)
    except OSError:
        return ""
    return os.path.basename(link) if os.path.basename(os.path.dirname(link)) == "blobs" else ""


def _no_model(files: Listing, tree: Mapping[str, Listed] | None) -> str | None:
    """Return why a repository is not a model, by the hub's file list or by a file that no model has; else None."""
    names = tree.keys() if tree is not None else files.sizes.keys() | files.dangling
    return no_model(names) if tree is not None or names & {"model_index.json", "adapter_config.json"} else None


def _without_weights(files: Listing, tree: Mapping[str, Listed] | None) -> Verdict:
    for name in sorted({*files.sizes, *files.dangling, *(tree or ())}):
        if kind := _OTHER_FORMATS.get(os.path.splitext(name)[1]):
            return Verdict(files.total, f"not MLX: {kind} ({printable(name)})")
    if tree is not None:
        return Verdict(files.total, "not MLX: the repository has no weights (*.safetensors)")
    return Verdict(files.total, "incomplete: no weights (*.safetensors)", incomplete=True)


def _not_mlx(folder: str, org: str, present: list[str]) -> str | None:
    """Return why a snapshot is not MLX; None if it is. The cheapest evidence is examined first."""
    if org == "mlx-community" or _quantization(json_object(f"{folder}/config.json", MAX_CONFIG)):
        return None
    first = f"{folder}/{present[0]}"
    try:
        written_by, _ = header(first, os.stat(first).st_size)
    except Damaged as error:
        return f"not MLX: {printable(present[0])} {error}"
    if written_by == "mlx" or _card_says_mlx(folder):
        return None
    if written_by == "pt":
        return "not MLX: safetensors in PyTorch's format"
    return "not MLX: neither its safetensors nor its README.md mention MLX"


def _quantization(config: Mapping[str, object]) -> str | None:
    """Return the quantization in config.json for people, as mlx_lm.convert writes it; None if there is none."""
    quantization = config.get("quantization")
    if not isinstance(quantization, dict):
        return None
    bits, group = _positive(quantization, "bits"), _positive(quantization, "group_size")
    if bits is None or group is None:
        return None
    mode = quantization.get("mode")
    return f"{bits}-bit gs{group}" + (f" {mode}" if mode in {"mxfp4", "mxfp8", "nvfp4"} else "")


def _card_says_mlx(folder: str) -> bool:
    """Return whether the front matter of README.md has `library_name: mlx` or the tag mlx (hub-docs, modelcard.md)."""
    try:
        with open(files_io.open_file(f"{folder}/README.md"), "rb", buffering=0) as file:
            card = file.read(MAX_README).decode("utf-8", "replace")
    except OSError:
        return False
    front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", card, re.DOTALL)
    pattern = r"""^(library_name:\s*|\s*-\s+|tags:\s*\[(.*,)?\s*)["']?mlx["']?\s*([,\]].*)?$"""
    return front is not None and re.search(pattern, front[1], re.MULTILINE) is not None


def _positive(mapping: Mapping[str, object], key: str) -> int | None:
    value = mapping.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _object(
    folder: str, name: str, problems: list[str], broken: list[str], *, optional: bool = False
) -> Mapping[str, object]:
    """Read the JSON object in a file of the folder. If that fails, return an empty one and add to `problems`."""
    try:
        return json_object(f"{folder}/{name}", MAX_CONFIG if name == "config.json" else MAX_JSON)
    except FileNotFoundError:
        if not optional:
            problems.append(f"{name} is missing")
    except Damaged as error:
        problems.append(str(error))
        broken.append(name)
    except OSError as error:
        problems.append(_reason(error))
    return {}


def _reason(error: OSError | Damaged) -> str:
    if isinstance(error, Damaged):
        return str(error)
    return f"{contents.base(os.fsdecode(error.filename or ''))}: {error.strerror or type(error).__name__}"
