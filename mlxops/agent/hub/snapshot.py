"""One snapshot folder of a Hugging Face cache: is all of it there, is it MLX, what can be known of its model.

Reads only, standard library only, and no more than it needs: `init` asks this of every repository of a cache.
Everything in a snapshot comes from outside. Nothing in it may raise past this module, block it (a named pipe
called config.json), or make it read without bound.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
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
from mlxops.common import files as reading
from mlxops.core.kv_cache import HALF, KVCache, kv_cache, language_model, seeing_cache
from mlxops.core.loadable import is_packed, no_model, no_tokenizer, unsaid_quantization

MAX_JSON = contents.MAX_TEXT
MAX_CONFIG = 8 * 1024 * 1024
MAX_README = 16 * 1024
MAX_HASHED = 8 * 1024 * 1024
"""Bytes. Larger files are not hashed at each load to find edits."""

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
"""What engines parse beside the two configurations, if it is there."""
_QUANTIZED = ("quantization", "quantization_config")
_OF_THE_MODEL = ("generation_config.json", "README.md")
"""Files that a model does not need, and that people edit."""
_INDEX = "model.safetensors.index.json"
_WEIGHTS_HEAD = 64 * 1024
"""Bytes at the beginning of a weight file that name the types of its first tensors."""
_INDEX_HEAD = 4096
"""Bytes of an index in which its metadata are: they come first (mlx_lm.utils.save_model; transformers sorts keys)."""
_TOTAL = re.compile(rb'\s*\{\s*"metadata":\s*\{[^{}]*"total_size":\s*(\d{1,18})\s*[,}]')


@dataclass(frozen=True)
class Listing:
    """What lies in a snapshot folder: names relative to it, symlinks followed (two levels in a Xet cache)."""

    sizes: Mapping[str, int]
    dangling: frozenset[str]
    """Names that lead to no regular file: the blob is gone, a loop, a pipe."""
    total: int
    """Bytes; a file under two names counts once."""


class Listed(NamedTuple):
    """A file as the hub lists it."""

    size: int
    etag: str
    """SHA-256 for files that the hub keeps in LFS, git's blob id for the others; empty if not listed."""


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
    """`why` is None for a complete MLX snapshot, else one line; `incomplete`: a download would help."""

    size_bytes: int
    why: str | None
    incomplete: bool = False
    whole: bool = False
    """It is complete and only not in MLX's format: engines convert such weights while they load them."""


@dataclass(frozen=True)
class Shape:
    """What config.json alone tells: cheap enough to be asked for every model of a list."""

    model_type: str | None
    context_length: int | None
    cache: KVCache | None
    """What it keeps of a conversation; None if the configuration does not say."""
    seeing: KVCache | None
    """The same where it is served as another model than a language model."""

    def served_as(self, model_type: str) -> KVCache | None:
        """`model_type`: the engine's option, lm or another."""
        return self.cache if model_type == "lm" else self.seeing


@dataclass(frozen=True)
class ModelFacts:
    """What the files tell before anything is started."""

    shape: Shape
    architectures: tuple[str, ...]
    weight_bytes: int
    quantization: str | None
    """For people: "6-bit gs64"."""
    model_file: str | None
    """A Python file of the repository that config.json names as the model; mlx-lm 0.30.6-0.31.3 import it unasked."""
    auto_map: tuple[str, ...]
    """The files that name code for transformers, which runs only if it is trusted."""
    has_chat_template: bool
    problems: tuple[str, ...]
    """Why an engine could not serve it; empty if nothing is known against it."""
    broken: tuple[str, ...] = ()
    """The text files that do not parse. `problems` says why."""
    oddities: tuple[str, ...] = ()
    """Warnings about files that can be served."""
    language_weights: bool = True
    """There are weights that a language model's engine loads (model*.safetensors)."""
    config: Mapping[str, object] = field(default_factory=dict)
    tokenizer_class: str | None = None
    """The tokenizer's class, if it needs code of the repository and no tokenizer.json makes that unnecessary."""
    packed: bool = False
    """The weights are quantized, whatever config.json says."""


def judge(folder: str, org: str) -> Verdict:
    """Whether a snapshot of a repository of `org` can be registered; never raises."""
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
    """Return None if everything that an engine needs is there and complete, else one line why not.

    The thorough form: it also holds every weight file against its own header.
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
    """The weight files whose length is not what their own header says."""
    folder = str(snapshot_dir)
    sizes = _list(folder).sizes
    return tuple(name for name, _ in damage(folder, weights(sizes), sizes))


def is_begun_only(path: str, name: str, size: int, whole: int) -> bool:
    """Whether a file of `size` bytes, of which the hub has `whole`, is truncated. A complete file is an edit: weights
    that fit their header, text that parses. Raises `OSError`, `Damaged`."""
    if is_weight(name):
        return wrong_length(path, size) is not None
    return contents.ends_early(path, name, size, whole)


def edited(snapshot_dir: Path) -> tuple[Edited, ...]:
    """Return the files of a snapshot that differ from the hub's, judged by its file list and the blobs' names."""
    folder = str(snapshot_dir)
    try:
        files = _list(folder)
    except OSError:
        return ()
    tree = _tree(folder) or {}
    links = any(os.path.islink(f"{folder}/{name}") for name in files.sizes)
    found = []
    for name in sorted(filter(_is_of_the_model, files.sizes)):
        size, listed = files.sizes[name], tree.get(name)
        etag = listed.etag if listed else _blob_name(f"{folder}/{name}")
        if listed is not None and size != listed.size:
            found.append(Edited(name, size, listed.size))
        elif etag and contents.content_hash(f"{folder}/{name}", etag, MAX_HASHED) not in (None, etag):
            found.append(Edited(name, size, listed.size if listed else None))
        elif not etag and links and not os.path.islink(f"{folder}/{name}"):
            found.append(Edited(name, size, None))  # it replaced a link into the cache
    return tuple(found)


def is_of_a_download(folder: str, name: str) -> bool:
    """Whether a download puts a file of this name into the snapshot."""
    return _is_of_the_model(name) or name == _INDEX or name in (_tree(folder) or ())


def kept_as_it_is(file: Path, repo_id: str, revision: str) -> str:
    """Say that an edited file is kept, with the commands that restore the hub's."""
    return f"it is kept, and served as it is (to have the hub's again: {hubs_again(file, repo_id, revision)})"


def to_correct(file: Path, repo_id: str, revision: str) -> str:
    """What to do about a file that engines do not parse."""
    return f"correct {file}, or have the hub's again: {hubs_again(file, repo_id, revision)}"


def hubs_again(file: Path, repo_id: str, revision: str) -> str:
    """Return the commands that replace an edited file by the hub's. They delete the file behind a link, too."""
    return f"rm {shlex.quote(os.path.realpath(file))}; mlxctl pull --repo {repo_id}@{revision}"


def link_that_leads_nowhere(folder: str, name: str) -> str | None:
    """Return the target of a dangling link that a person made to a place outside of the cache; None for other paths."""
    path = f"{folder}/{name}"
    if not os.path.islink(path) or os.path.exists(path):  # a target that cannot be seen counts as away
        return None
    cache = os.path.realpath(os.path.join(folder, *3 * (os.pardir,)))
    target = os.path.realpath(path)
    return None if target.startswith(f"{cache}/") else target


def inspect(path: Path) -> ModelFacts:
    """The facts of the snapshot at `path`; bad files never raise, they become problems."""
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
        oddities.append("it is a model for embeddings (sentence-transformers): its chat completions mean nothing")
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
        held = [tensors(f"{folder}/{name}") for name in weights(files.sizes)]
    except (OSError, Damaged):
        return False
    return any(is_packed({name: dtype for name, (dtype, _) in each.items()}) for each in held)


def _check_tokenizer(folder: str, files: Listing, problems: list[str], broken: list[str]) -> None:
    """Check only the last byte of tokenizer.json: parsing many megabytes takes long."""
    if files.sizes.get("tokenizer.json", 0) > 0:
        with suppress(OSError):
            pointer = contents.is_pointer(first_bytes(f"{folder}/tokenizer.json", 64))
            if pointer or not reading.read_end(f"{folder}/tokenizer.json", 64).rstrip().endswith(b"}"):
                problems.append(f"tokenizer.json {'is a Git LFS pointer' if pointer else 'ends before its end'}")
                broken.append("tokenizer.json")


def _check_generation(folder: str, problems: list[str], broken: list[str]) -> None:
    """Report a generation_config.json that is JSON but no object: engines fail on it (they ignore invalid JSON)."""
    try:
        json_object(f"{folder}/generation_config.json", MAX_CONFIG)
    except Damaged as error:
        if str(error).endswith("is not a JSON object"):
            problems.append(str(error))
            broken.append("generation_config.json")
    except OSError:
        pass  # it need not be there


def _odd_weights(folder: str, files: Listing, config: Mapping[str, object], problems: list[str]) -> Iterator[str]:
    """Yield warnings about an index or weights left by another conversion; add to `problems` what cannot be loaded."""
    present = weights(files.sizes)
    index = _indexed(folder, files)
    if index and not index >= set(present) and not index <= set(present):
        yield f"{_INDEX} names other weight files than are here; engines do not read it"
    try:
        if present and (unsaid := unsaid_quantization(config, tensors(f"{folder}/{present[0]}"))):
            problems.append(unsaid)
        left = leftovers(folder, present, index or set(_tree(folder) or ()))
    except (OSError, Damaged) as error:
        problems.append(_reason(error))
        return
    if left and left.why:
        problems.append(f"{left.why}: it was left by another conversion, and engines load every model*.safetensors")
    elif left:
        yield f"{printable(left.names[0])} is loaded too, and looks like the rest of another conversion"


def shape(path: Path) -> Shape:
    """The shape of the model in the snapshot at `path`; a bad file never raises, it tells nothing."""
    folder = str(path)
    return _shape(_object(folder, "config.json", [], []), folder)


def _shape(config: Mapping[str, object], folder: str) -> Shape:
    longest = (_positive(each, key) for key in _CONTEXT for each in (config, language_model(config)))
    model_type = config.get("model_type")
    cache, seeing = kv_cache(config), seeing_cache(config)
    if cache and cache.value_bytes > HALF and _has_halves(folder):
        cache, seeing = replace(cache, value_bytes=HALF), seeing and replace(seeing, value_bytes=HALF)
    return Shape(
        model_type=model_type if isinstance(model_type, str) else None,
        context_length=next(filter(None, longest), None),
        cache=cache,
        seeing=seeing,
    )


def _has_halves(folder: str) -> bool:
    """Whether the weights, and so the cache, have 16 bits. The `torch_dtype` of config.json does not show it:
    mlx_lm.convert leaves that unchanged."""
    try:
        files = _list(folder)
        name = weights(files.sizes)[0]
        head = first_bytes(f"{folder}/{name}", _WEIGHTS_HEAD)
    except (OSError, Damaged, IndexError):
        return False
    return re.search(rb'"dtype": ?"B?F16"', head) is not None


def weight_files(path: Path) -> dict[str, int]:
    """The weight files of the snapshot at `path` with their sizes in bytes; empty where it cannot be read."""
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
    """Return all files of the commit, as huggingface_hub 1.22 and later list them beside the snapshots
    (`_tree_cache.py`, format 1); None if there is no such list or it cannot be read."""
    repo, commit = os.path.dirname(os.path.dirname(folder)), os.path.basename(folder)
    try:
        listing = json_object(f"{repo}/trees/{commit}.json", MAX_JSON)
    except (OSError, Damaged):
        return None
    files = listing.get("files")
    if listing.get("format_version") != 1 or not isinstance(files, dict):
        return None
    found: dict[str, Listed] = {}
    for name, entry in files.items():
        size = (entry.get("lfs_size") or entry.get("size")) if isinstance(entry, dict) else None
        if not isinstance(size, int):
            return None
        etag = entry.get("lfs_sha256") or entry.get("blob_id")
        found[name] = Listed(size, etag if isinstance(etag, str) else "")
    return found


def _missing(folder: str, files: Listing, tree: Mapping[str, Listed] | None) -> str | None:
    """Return why a snapshot is incomplete; quick if there is a tree.

    Raises `Damaged` for what a download would not repair: an edit that does not parse, a dangling link of a person's.
    """
    if "config.json" not in files.sizes:
        return _gone(folder, files, "config.json")
    for name in sorted(files.dangling):
        if _NEEDED.fullmatch(name) or (name in weights(files.dangling)):
            return _gone(folder, files, name)
    if tree is not None:
        return _missing_of_tree(folder, files, tree) or _no_weights(files)
    json_object(f"{folder}/config.json", MAX_CONFIG)
    if _adds_up(folder, files):
        return None
    present = weights(files.sizes)
    if why := missing(present, _indexed(folder, files)):
        return f"{printable(why)} is missing"
    return next((why for _, why in damage(folder, present, files.sizes)), None) or _no_weights(files)


def _gone(folder: str, files: Listing, name: str) -> str:
    if name in files.dangling and (place := link_that_leads_nowhere(folder, name)):
        raise Damaged(f"{printable(name)} is a link to {printable(place)}, which is not there")
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
            continue  # not of the hub, or of the same size: checked before it is loaded
        if is_begun_only(f"{folder}/{name}", name, size, listed.size):
            return f"{printable(name)} has {size} of {listed.size} bytes"
    return None


def _indexed(folder: str, files: Listing) -> set[str]:
    """Return the weight files that the index names; empty if there is no index or it cannot be read."""
    if _INDEX not in files.sizes:
        return set()
    try:
        named = json_object(f"{folder}/{_INDEX}", MAX_JSON).get("weight_map")
    except (OSError, Damaged):
        return set()
    return {name for name in named.values() if isinstance(name, str)} if isinstance(named, dict) else set()


def _adds_up(folder: str, files: Listing) -> bool:
    """Whether the weight files hold as many bytes of tensors together as the index says at its beginning: then none is
    missing and none was cut off. For that, only the lengths of their headers have to be read. Parsing the headers and
    indexes of a thousand repositories takes longer than all the rest of an `init`."""
    if _INDEX not in files.sizes or any(map(is_weight, files.dangling)):
        return False
    total = _TOTAL.match(first_bytes(f"{folder}/{_INDEX}", _INDEX_HEAD))
    present = weights(files.sizes)
    headers = sum(header_bytes(f"{folder}/{name}") for name in present) if total else 0
    return total is not None and sum(files.sizes[name] for name in present) == headers + int(total[1])


def _is_of_the_model(name: str) -> bool:
    return name in _OF_THE_MODEL or is_weight(name) or _NEEDED.fullmatch(name) is not None


def _blob_name(path: str) -> str:
    """Return the name of the blob that a file links to, which is the hub's hash of it; empty if it is no such link."""
    try:
        link = os.readlink(path)
    except OSError:
        return ""
    return os.path.basename(link) if os.path.basename(os.path.dirname(link)) == "blobs" else ""


def _no_model(files: Listing, tree: Mapping[str, Listed] | None) -> str | None:
    """Return why a repository holds no model, by the hub's file list or a file that only such repositories have."""
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
    """None for MLX, else why not. The cheapest evidence first; that of the hub itself is the model card's."""
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


def _positive(mapping: Mapping[str, object], key: str) -> int | None:
    value = mapping.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _object(
    folder: str, name: str, problems: list[str], broken: list[str], *, optional: bool = False
) -> Mapping[str, object]:
    """The JSON object in a file of the folder; an empty one, and a problem, where it cannot be had."""
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
