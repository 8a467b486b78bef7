"""Compute by `model_type` how much each layer of a model caches of a conversation in mlx-lm. Pure.

The rules are read from the models of mlx-lm 0.32.2 (`make_cache`, and the calls of `update_and_fetch`). The models of
0.31.3, which mlx-openai-server 1.8.1 uses, never cache more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod

from mlxops.core.frozen import dataclass

FULL, WINDOW, STATE, NOTHING = "*", "w", "s", "-"
"""Kinds of layers: full attention, attention to a window of the last tokens, recurrent state, and no cache. A plan is a
string with one of these for each layer."""

LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_transformer_layers")
HEADS = ("num_attention_heads", "n_heads", "n_head", "num_heads")
HIDDEN = ("hidden_size", "n_embd", "d_model", "model_dim", "hidden_dim")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "num_attention_groups")
_MOST = 10**9
MOST_LAYERS = 10_000


@dataclass(frozen=True)
class Layer:
    """The cache of one layer."""

    width: int = 0
    """Values per token."""
    window: int | None = None
    """Number of last tokens that it keeps; None for all."""
    state: int = 0
    """Values of a recurrent state, the same for any number of tokens."""


class Unspecified(Exception):
    """The configuration lacks a value, or the value is invalid."""


class Config:
    """A configuration as an engine reads it. Null counts as absent. An invalid value raises `Unspecified`."""

    def __init__(self, values: Mapping[str, object]) -> None:
        self.values = values

    def optional(self, *fields: str) -> int | None:
        """Return the first field that is set, a positive number; None if no field is set."""
        value = self._first(fields)
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and 0 < value < _MOST):
            return value
        raise Unspecified

    def number(self, *fields: str, default: int | None = None) -> int:
        value = self.optional(*fields) or default
        if value is None:
            raise Unspecified
        return value

    def items(self, *fields: str) -> list[object]:
        """Return the first field that is set: a list, or the letters of a string. Empty if no field is set."""
        value = self._first(fields)
        if value is None or isinstance(value, list | str):
            return list(value or ())
        raise Unspecified

    def for_each_layer(self, items: Sequence[object]) -> Sequence[object]:
        """Return the items. Raises `Unspecified` unless there is one for each layer."""
        if len(items) != self.layers:
            raise Unspecified
        return items

    def numbers(self, field: str) -> frozenset[int]:
        """Return the layer numbers that a field lists."""
        items = self.items(field)
        layers = [item for item in items if isinstance(item, int)]
        if len(layers) != len(items):
            raise Unspecified
        return frozenset(layers)

    def inner(self, field: str) -> Config:
        """Return an object of the configuration; an empty one if it is absent."""
        value = self.values.get(field)
        if value is None or isinstance(value, Mapping):
            return Config(value or {})
        raise Unspecified

    def plan(self, kind: Callable[[int], str]) -> str:
        return "".join(map(kind, range(self.layers)))

    @property
    def layers(self) -> int:
        if (count := self.number(*LAYERS)) > MOST_LAYERS:
            raise Unspecified
        return count

    @property
    def heads(self) -> int:
        return self.number(*HEADS)

    @property
    def head_dim(self) -> int:
        return self.optional("head_dim", "hidden_size_per_head") or self.number(*HIDDEN) // self.heads

    def _first(self, fields: tuple[str, ...]) -> object:
        return next((value for field in fields if (value := self.values.get(field)) is not None), None)


def guess(values: Mapping[str, object], *fields: str) -> int | None:
    """Return the largest number that the fields may mean: 8, 8.0, "8", or a list with a number for each layer."""
    written = [values.get(field) for field in fields]
    flat = [item for value in written for item in (value if isinstance(value, list) else [value])]
    digits = [str(item).removesuffix(".0") for item in flat if isinstance(item, int | float | str) and item is not True]
    return max((int(text) for text in digits if text.isdecimal() and len(text) < 10 and int(text)), default=None)


# -- which layers ----------------------------------------------------------------------------------------------------

_Plan = Callable[[Config], str]

_WORDS = {
    **{"full_attention": FULL, "attention": FULL, "sliding_attention": WINDOW},
    **{"linear_attention": STATE, "mamba": STATE, "conv": STATE, "recurrent": STATE, "moe": NOTHING, "mlp": NOTHING},
}
"""A layer type's name -> its kind. Other names mean full attention."""


def _all(kind: str) -> _Plan:
    return lambda config: kind * config.layers


_ALL_FULL = _all(FULL)


def _last_of(period: int, others: str, field: str = "") -> _Plan:
    """The last of every `period` layers has full attention. The configuration's `field` may set another period."""

    def plan(config: Config) -> str:
        every = config.number(field, default=period)
        return config.plan(lambda at: others if (at + 1) % every else FULL)

    return plan


def _words(*fields: str, missing: _Plan = _ALL_FULL, words: Mapping[str, str] = _WORDS) -> _Plan:
    """A field has a name for each layer. `missing` is the plan without such a field."""

    def plan(config: Config) -> str:
        if not config.items(*fields):
            return missing(config)
        return "".join(words.get(str(word), FULL) for word in config.for_each_layer(config.items(*fields)))

    return plan


def _repeated(*fields: str, words: Mapping[str, str] = _WORDS) -> _Plan:
    """A field has a pattern that repeats over the layers. Without one, all layers have full attention."""

    def plan(config: Config) -> str:
        pattern = [words.get(str(word), FULL) for word in config.items(*fields)] or [FULL]
        return config.plan(lambda at: pattern[at % len(pattern)])

    return plan


def _listed(field: str, inside: str, outside: str) -> _Plan:
    """A field lists the numbers of the layers of the kind `inside`. The others are of the kind `outside`."""

    def plan(config: Config) -> str:
        numbers = config.numbers(field)
        return config.plan(lambda at: inside if at in numbers else outside)

    return plan


def _owned(plan: _Plan, default: int) -> _Plan:
    """The last layers reuse the keys and values of earlier layers and keep none. `default` is their number."""

    def owned(config: Config) -> str:
        shared = config.values.get("num_kv_shared_layers", default)
        if not isinstance(shared, int) or not 0 <= shared < config.layers:
            raise Unspecified
        return plan(config)[: config.layers - shared]

    return owned


def _nemotron_h(config: Config) -> str:
    """A letter or a name for each layer. Some of these configurations lack the number of layers."""
    letters = {"M": STATE, "-": NOTHING, "E": NOTHING}
    plan = "".join(letters.get(str(each), FULL) for each in config.items("hybrid_override_pattern"))
    plan = plan or "".join(_WORDS.get(str(each), FULL) for each in config.items("layers_block_type", "layer_types"))
    if config.optional(*LAYERS) not in (None, len(plan)) or not 0 < len(plan) <= MOST_LAYERS:
        raise Unspecified
    return plan


def _jamba(config: Config) -> str:
    def by_period(config: Config) -> str:
        period, offset = config.number("attn_layer_period"), config.values.get("attn_layer_offset")
        if not isinstance(offset, int) or not 0 <= offset < period:
            raise Unspecified
        return config.plan(lambda at: FULL if at % period == offset else STATE)

    return _words("layers_block_type", missing=by_period)(config)


def _bailing(config: Config) -> str:
    """The last layer of each group has full attention, and so have the layers after the last whole group."""
    group = config.number("layer_group_size", default=4)
    whole = config.layers // group * group
    return config.plan(lambda at: FULL if (at + 1) % group == 0 or at >= whole else STATE)


def _kimi(config: Config) -> str:
    linear = config.inner("linear_attn_config").numbers("kda_layers")
    return config.plan(lambda at: STATE if at + 1 in linear else FULL)


def _lfm2(config: Config) -> str:
    if config.values.get("full_attn_idxs") is not None:
        return _listed("full_attn_idxs", FULL, STATE)(config)
    return _words("layer_types")(config)


def _plamo2(config: Config) -> str:
    step = config.number("mamba_step", default=2)
    if config.values.get("mamba_enabled") is False or config.layers <= step // 2:
        return FULL * config.layers
    return config.plan(lambda at: FULL if at % step == step // 2 else STATE)


# -- how wide --------------------------------------------------------------------------------------------------------

_Width = Callable[[Config, str], int]
"""Values per token of a layer of that kind."""


def _pairs(kv_heads: int | None = None, head_dim: int | None = None) -> _Width:
    """Keys and values of each key-value head. The arguments are the engine's defaults."""

    def width(config: Config, kind: str) -> int:
        heads = config.optional(*_KV_HEADS) or kv_heads or config.heads
        return 2 * heads * (config.number("head_dim", default=head_dim) if head_dim else config.head_dim)

    return width


_PAIRS = _pairs()


def _latent(config: Config, kind: str) -> int:
    """One compressed vector with its rotary part, shared by all heads."""
    return config.number("kv_lora_rank") + (config.optional("qk_rope_head_dim") or 0)


def _indexed_latent(config: Config, kind: str) -> int:
    """Also the keys of the sparse attention's index, twice: mlx-lm passes them as values too."""
    return _latent(config, kind) + 2 * config.number("index_head_dim", default=128)


def _expanded(config: Config, kind: str) -> int:
    """Full keys and values of all heads, although the model has a compressed vector."""
    keys = config.number("qk_nope_head_dim") + config.number("qk_rope_head_dim")
    return config.heads * (keys + (config.optional("v_head_dim") or config.number(*HIDDEN) // config.heads))


def _gemma4(config: Config, kind: str) -> int:
    heads = config.number("num_key_value_heads", default=1)
    if kind == WINDOW:
        return 2 * heads * config.number("head_dim", default=256)
    if config.values.get("attention_k_eq_v"):
        heads = config.number("num_global_key_value_heads", default=heads)
    return 2 * heads * config.number("global_head_dim", default=512)


def _mimo(config: Config, kind: str) -> int:
    heads, key, value = (f"{'swa_' if kind == WINDOW else ''}{field}" for field in _MIMO)
    return config.number(heads) * (config.number(key) + config.number(value))


_MIMO = ("num_key_value_heads", "head_dim", "v_head_dim")


def _step(config: Config, kind: str) -> int:
    other = config.inner("attention_other_setting")
    if kind == FULL or not other.values:
        return _PAIRS(config, kind)
    return 2 * other.number("num_attention_groups") * config.head_dim


def _baichuan(config: Config, kind: str) -> int:
    swa = ("num_swa_attention_heads", "num_swa_key_value_heads") if kind == WINDOW else ("", "")
    heads = config.number(swa[0], *HEADS)
    return 2 * config.number(swa[1], *_KV_HEADS) * (config.number(*HIDDEN) // heads)


# -- recurrent states ------------------------------------------------------------------------------------------------

_STATES = (
    ("mamba_n_heads", "mamba_d_head", "mamba_d_state"),
    ("mamba_num_heads", "mamba_head_dim", "ssm_state_size"),
    ("mamba_num_heads", "hidden_size_per_head", "mamba_d_state"),
    ("mamba_expand", "hidden_size", "mamba_d_state"),
    ("linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim"),
    ("num_heads", "head_dim", "state_size"),
    ("intermediate_size", "state_size"),
)
"""Fields whose product is the size of a layer's state. The few rows of a convolution are not counted."""


def _state(config: Config) -> int:
    return next((size for fields in _STATES if (size := _product(config, *fields))), 0)


def _product(config: Config, *fields: str) -> int:
    """Return 0 if a field is missing. A state is small compared with the caches of other layers."""
    return prod(guess(config.values, field) or 0 for field in fields)


def _matrices(config: Config) -> int:
    """A square matrix for each head."""
    return config.heads * config.head_dim**2


def _kimi_state(config: Config) -> int:
    return _product(config.inner("linear_attn_config"), "num_heads", "head_dim", "head_dim")


# -- the model types -------------------------------------------------------------------------------------------------

_Family = Callable[[Config], Iterable[Layer]]


def _family(
    plan: _Plan = _ALL_FULL,
    width: _Width = _PAIRS,
    window: tuple[str, ...] = ("sliding_window",),
    default_window: int | None = None,
    state: Callable[[Config], int] = _state,
) -> _Family:
    def layers(config: Config) -> Iterable[Layer]:
        kinds = plan(config)
        made = {NOTHING: Layer()}
        if FULL in kinds:
            made[FULL] = Layer(width(config, FULL))
        if WINDOW in kinds:
            made[WINDOW] = Layer(width(config, WINDOW), config.number(*window, default=default_window))
        if STATE in kinds:
            made[STATE] = Layer(state=state(config))
        return [made[kind] for kind in kinds]

    return layers


def _alike(width: Callable[[Config], int], caches: Callable[[Config], int] = lambda config: 1) -> _Family:
    def layers(config: Config) -> Iterable[Layer]:
        if (count := config.layers * caches(config)) > MOST_LAYERS:
            raise Unspecified
        return [Layer(width(config))] * count

    return layers


def _falcon_h1(config: Config) -> Iterable[Layer]:
    """Every layer has both attention and a recurrent state."""
    return [Layer(_pairs(2, 64)(config, FULL), state=_state(config))] * config.layers


def _nemotron_nas(config: Config) -> Iterable[Layer]:
    """Each block has its own number of heads, or no attention."""
    for block in config.for_each_layer(config.items("block_configs")):
        attention = Config({"block": block}).inner("block").inner("attention")
        if attention.values.get("no_op") or attention.values.get("replace_with_linear"):
            yield Layer()
        else:
            yield Layer(2 * (config.heads // attention.number("n_heads_in_group")) * config.head_dim)


def _openelm(config: Config) -> Iterable[Layer]:
    for heads in config.for_each_layer(config.items("num_kv_heads")):
        yield Layer(2 * Config({"heads": heads}).number("heads") * config.head_dim)


def _afm7(config: Config) -> Iterable[Layer]:
    """The last layers reuse the keys and values of earlier layers."""
    return [Layer(_PAIRS(config, FULL))] * (config.layers - (config.optional("num_kv_reuse_layers") or 0))


def _minimax_m3(config: Config) -> Iterable[Layer]:
    """Keys and values. A layer with sparse attention also keeps the keys of its index."""
    sparse, width = config.inner("sparse_attention_config"), _pairs(4, 128)(config, FULL)
    index = sparse.optional("sparse_index_dim") or config.optional("index_head_dim") or 0
    if not (sparse.optional("sparse_block_size") or config.optional("index_block_size")):
        index = 0
    kinds = [kind != "full_attention" for kind in config.items("layer_types")]
    flags = kinds or sparse.items("sparse_attention_freq") or config.items("sparse_attention_freq")
    return [Layer(width + index if flag else width) for flag in config.for_each_layer(flags or [True] * config.layers)]


def _deepseek_v41(config: Config) -> Iterable[Layer]:
    """A window in every layer; some also keep a compressed vector, and an index key, of every few tokens."""
    dim, index = config.number("head_dim", default=512), config.number("index_head_dim", default=128)
    ratios, sources = config.items("compress_ratios"), config.numbers("kv_source_layer_ids")
    for at in range(config.layers):
        yield Layer(dim, config.number("sliding_window", default=128))
        if at in sources:
            ratio = Config({"ratio": ratios[at] if at < len(ratios) else None}).number("ratio", default=1)
            yield Layer(-(-(dim + index) // ratio))


def _iquestloopcoder(config: Config) -> Iterable[Layer]:
    """Each layer runs twice: over all tokens, and over the last ones."""
    width = _PAIRS(config, FULL)
    return [Layer(width), Layer(width, config.number("loop_window_size", default=64))] * config.layers


def _loops(config: Config) -> int:
    weights = config.items("loop_loss_weights")
    return len(weights) + 1 if weights else config.number("num_loops", default=1)


def _mistral3(config: Config) -> Iterable[Layer]:
    """These do not pass on their language model's own cache: its windows are not used."""
    return _family(width=_latent if config.values.get("model_type") == "mistral4" else _PAIRS)(config)


_ROWS: tuple[tuple[str, _Family], ...] = (
    # Full keys and values in every layer. Windows in the configurations of some of these are not used.
    (
        "Klear apertus bailing_moe bitnet cohere deepseek dots1 ernie4_5 ernie4_5_moe exaone gemma gemma2 glm glm4 "
        "glm4_moe gpt2 gpt_neox gptj granite granitemoe helium hunyuan hunyuan_v1_dense internlm2 internlm3 "
        "lille-130m llama4_text mimo minicpm minimax minimax_m2 mixtral nanochat nemotron olmo olmo2 olmoe phi "
        "phi-msft phi3 phi3small phimoe phixtral qwen qwen2 qwen2_5_vl qwen2_moe qwen2_vl qwen3 qwen3_moe qwen3_vl "
        "qwen3_vl_moe seed_oss smollm3 solar_open stablelm starcoder2 talkie telechat3",
        _family(),
    ),
    ("deepseek_v2 minicpm3 youtu_llm", _family(width=_expanded)),
    ("afm7", _afm7),
    ("dbrx", _alike(lambda config: 2 * config.inner("attn_config").number("kv_n_heads") * config.head_dim)),
    (
        "gpt_bigcode",
        _alike(lambda config: 2 * config.head_dim * (1 if config.values.get("multi_query", True) else config.heads)),
    ),
    ("iquestloopcoder", _iquestloopcoder),
    ("nanbeige", _alike(lambda config: _PAIRS(config, FULL), caches=_loops)),
    ("nemotron-nas", _nemotron_nas),
    ("openelm", _openelm),
    (
        "plamo",
        _alike(lambda config: 2 * -(-config.heads // config.number("n_shared_head", default=8)) * config.head_dim),
    ),
    # One compressed vector for all heads.
    ("deepseek_v3 glm4_moe_lite joyai_llm_flash kimi_k2 kimi_k25 kimi_vl mistral4", _family(width=_latent)),
    ("deepseek_v32 glm_moe_dsa", _family(width=_indexed_latent)),
    ("deepseek_v41", _deepseek_v41),
    ("longcat_flash longcat_flash_ngram", _alike(lambda config: _latent(config, FULL), caches=lambda config: 2)),
    ("minimax_m3_vl", _minimax_m3),
    # Windows in some layers.
    (
        "afmoe exaone_moe iquestcoder laguna llama mellum ministral3 mistral muse_spark xverse",
        _family(_words("layer_types")),
    ),
    ("llava mistral3 pixtral", _mistral3),
    ("muse_glimmer olmo3 spark2_5", _family(_words("layer_types", missing=_last_of(4, WINDOW)))),
    ("baichuan_m1", _family(_listed("sliding_window_layers", WINDOW, FULL), _baichuan)),
    (
        "cohere2",
        _family(_last_of(4, WINDOW, "sliding_window_pattern"), _pairs(8, 128), default_window=4096),
    ),
    ("exaone4", _family(_repeated("sliding_window_pattern", words={"L": WINDOW}))),
    ("gear", _family(_words("layer_types"), default_window=512)),
    ("gemma3", _family(_last_of(6, WINDOW, "sliding_window_pattern"), _pairs(4, 256), default_window=512)),
    ("gemma3_text", _family(_last_of(6, WINDOW, "sliding_window_pattern"), _pairs(1, 256), default_window=512)),
    ("gemma3n", _family(_owned(_words("layer_types"), 0))),
    (
        "gemma4 gemma4_unified",
        _family(
            _owned(_words("layer_types", missing=_last_of(5, WINDOW, "sliding_window_pattern")), 20),
            _gemma4,
            default_window=512,
        ),
    ),
    ("gpt_oss", _family(_words("layer_types", missing=_last_of(2, WINDOW)), _pairs(8, 64), default_window=128)),
    ("llama4", _family(_last_of(4, WINDOW), window=("attention_chunk_size",))),
    (
        "mimo_v2_flash",
        _family(_words("hybrid_layer_pattern", words={"1": WINDOW}), _mimo, window=("sliding_window_size",)),
    ),
    (
        "plamo3",
        _family(
            _last_of(8, WINDOW, "sliding_window_pattern"),
            _pairs(4, 128),
            window=("sliding_window", "window_size"),
            default_window=2048,
        ),
    ),
    ("step3p5", _family(_words("layer_types", missing=_last_of(2, WINDOW)), _step, default_window=512)),
    # Recurrent states in some layers, or in all.
    ("bailing_moe_linear", _family(_bailing, state=_matrices)),
    ("bailing_hybrid bailing_moe_v3", _family(_bailing, _latent, state=_matrices)),
    ("falcon_h1", _falcon_h1),
    ("falcon_mamba mamba mamba2", _family(_all(STATE))),
    ("granitemoehybrid", _family(_words("layer_types"))),
    ("jamba", _family(_jamba)),
    ("kimi_k3 kimi_linear", _family(_kimi, _latent, state=_kimi_state)),
    ("lfm2 lfm2-vl lfm2_moe", _family(_lfm2)),
    ("nemotron_h", _family(_nemotron_h)),
    ("olmo_hybrid", _family(_words("layer_types", missing=_last_of(4, STATE)))),
    ("plamo2", _family(_plamo2)),
    (
        "prism_hadamard_qwen35 qwen3_5 qwen3_5_moe qwen3_next",
        _family(_last_of(4, STATE, "full_attention_interval")),
    ),
    (
        "recurrent_gemma",
        _family(
            _repeated("block_types", "_block_types", words={"recurrent": STATE, "attention": WINDOW}),
            lambda config, kind: 2 * config.head_dim,
            window=("attention_window_size",),
        ),
    ),
    ("rwkv7", _family(_all(STATE), state=lambda config: _product(config, "hidden_size", "head_dim"))),
)

MODEL_TYPES: Mapping[str, _Family] = {name: family for names, family in _ROWS for name in names.split()}
