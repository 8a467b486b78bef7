"""Decide from file names and config.json whether a repository can be loaded."""

from __future__ import annotations

import pytest

from mlxops.core.loadable import (
    Abilities,
    is_packed,
    no_model,
    no_tokenizer,
    unknown_quantization,
    unsaid_quantization,
)

OLD = Abilities("0.31.3", '"bitnet" "mxfp4" "compressed-tensors" ("awq", "gptq")', '"mxfp4" "nvfp4" "mxfp8"', "")
NEW = Abilities(
    "0.32.2",
    OLD.quantizations
    + ' "mxfp8" "modelopt" "ue8m0" "nvfp4-pack-quantized" "mxfp4-pack-quantized" infer_quant_config '
    + "unsupported compressed-tensors",
    OLD.modes,
    "",
)
DEEPSEEK = Abilities(OLD.version, OLD.quantizations, OLD.modes, "weight_scale_inv")


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (["config.json", "model.safetensors"], None),
        (["config.json", "adapter_config.json", "model.safetensors"], None),
        (["adapter_config.json", "adapters.safetensors"], "it is an adapter, which needs the model"),
        (["model_index.json", "unet/config.json"], "it is a pipeline of several models"),
        (["params.json", "consolidated.safetensors"], "it has no config.json"),
        (["weights.npz"], "it has no config.json"),
    ],
)
def test_repository_without_config_is_described(names: list[str], why: str | None) -> None:
    reason = no_model(names)
    assert reason is None if why is None else reason is not None and reason.startswith(why)


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("tokenizer.json", True),
        ("tokenizer.model", True),
        ("tiktoken.model", True),  # Kimi K2
        ("qwen.tiktoken", True),
        ("tekken.json", True),  # Mistral
        ("spiece.model", True),
        ("vocab.txt", True),
        ("rwkv_vocab_v20230424.txt", True),
        ("tokenizer_config.json", False),
        ("model.safetensors", False),
        ("original/tokenizer.model", False),
    ],
)
def test_tokenizer_files_of_all_families_are_known(name: str, known: bool) -> None:
    assert (no_tokenizer([name]) is None) == known


@pytest.mark.parametrize(
    ("config", "old", "new"),
    [
        ({}, True, True),
        ({"quantization": {"group_size": 64, "bits": 4}}, True, True),
        ({"quantization": {"group_size": 16, "bits": 4, "mode": "nvfp4"}}, True, True),
        ({"quantization": {"group_size": 64, "bits": 4, "mode": "jang"}}, False, True),
        ({"quantization": {"group_size": 64}}, False, False),
        ({"quantization": []}, False, False),
        ({"quantization": {"group_size": 64, "bits": 4}, "quantization_config": {"bits": 4}}, True, True),
        ({"quantization_config": {"bits": 4}}, False, False),
        ({"quantization_config": "fp8"}, False, False),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, True, True),
        ({"quantization_config": {"quant_method": "gptq", "bits": 8}}, False, False),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, False, False),
        ({"quantization_config": {"quant_method": "mxfp8"}}, False, True),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}}, False, True),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}}, False, False),
        ({"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}}, True, True),
        (
            {"quantization_config": {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}},
            False,
            True,
        ),
        ({"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}}, False, False),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, False, False),
        ({"quantization_config": {"quant_method": "fp8", "scale_fmt": "ue8m0"}}, False, True),
    ],
)
def test_quantization_is_refused_by_versions_without_it(config: dict[str, object], old: bool, new: bool) -> None:
    assert (unknown_quantization(config, OLD, packed=True) is None) == old
    assert (unknown_quantization(config, NEW, packed=True) is None) == new


def test_fp8_is_allowed_if_the_architecture_unpacks_it() -> None:
    config = {"quantization_config": {"quant_method": "fp8"}}
    assert unknown_quantization(config, OLD, packed=True) and not unknown_quantization(config, DEEPSEEK, packed=True)


def test_quantization_method_is_ignored_for_unpacked_weights() -> None:
    assert unknown_quantization({"quantization_config": {"quant_method": "hqq"}}, OLD, packed=False) is None
    assert not is_packed({"a.weight": "BF16", "b.weight": "F32"})
    assert is_packed({"a.weight": "U32"}) and is_packed({"a.weight_scale_inv": "F32"})


def test_quantized_weights_need_a_configuration() -> None:
    packed = ["a.weight", "a.scales", "a.biases"]
    assert unsaid_quantization({}, packed) and unsaid_quantization({"quantization": None}, packed)
    for config in ({"quantization": {"bits": 4}}, {"text_config": {"quantization_config": {"bits": 4}}}):
        assert unsaid_quantization(config, packed) is None
    assert unsaid_quantization({}, ["a.weight", "a.scales"]) is None, "a layer may have scales of its own"
