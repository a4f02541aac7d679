"""Every supported family as a tiny random model: logits and greedy tokens equal transformers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from batchinfer.engine.models.decoder import Decoder
from batchinfer.engine.models.registry import decoder_config, supported_architectures
from batchinfer.engine.runner import TorchRunner
from batchinfer.engine.types import ModelError, NewRow, SamplingParams, StepCosts, StepPlan
from batchinfer.engine.weights import WeightReader, find_model
from batchinfer.kernels.ops import operators_for

SIZES = {
    "vocab_size": 128,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied-biased": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-one-kv-head": ("Llama", {"num_key_value_heads": 1, "head_dim": 16}),
    "llama3-rope": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-linear-rope": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}},
    ),
    "mistral": ("Mistral", {"sliding_window": 9}),
    "mistral-no-window": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {}),
    "qwen2-windowed": ("Qwen2", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2}),
    "qwen3": ("Qwen3", {}),
    "qwen3-biased": ("Qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    "smollm3": ("SmolLM3", {}),
    "smollm3-windowed": (
        "SmolLM3",
        {"use_sliding_window": True, "sliding_window": 6, "no_rope_layer_interval": 2},
    ),
    "gemma2": (
        "Gemma2",
        {"sliding_window": 8, "query_pre_attn_scalar": 20, "final_logit_softcapping": 3.0},
    ),
    "gemma2-uncapped": (
        "Gemma2",
        {"sliding_window": 8, "final_logit_softcapping": None, "attn_logit_softcapping": None},
    ),
    "gemma3": ("Gemma3Text", {"sliding_window": 8, "num_hidden_layers": 7, "query_pre_attn_scalar": 10}),
    "gemma3-linear-rope": (
        "Gemma3Text",
        {
            "sliding_window": 8,
            "num_hidden_layers": 6,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
}
MODEL_CLASSES = {"Gemma3Text": "Gemma3"}


def make_model(name: str, folder: Path) -> Any:
    """Save the tiny model ``name`` under ``folder`` and return it, in fp32."""
    family, changes = FAMILIES[name]
    torch.manual_seed(len(name))
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **changes})
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{MODEL_CLASSES.get(family, family)}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norm weights and biases begin as ones and zeros, which would hide their absence.
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return model


def load_runner(folder: Path, max_rows: int = 8) -> TorchRunner:
    files = find_model(str(folder))
    config = decoder_config("tiny", files.config)
    cpu = torch.device("cpu")
    ops = operators_for(cpu, "reference")
    reader = WeightReader("tiny", files.checkpoint("auto"), torch.float32, cpu)
    decoder = Decoder(config, reader, ops, 256)
    reader.finish(("lm_head.weight",) if config.tied_embeddings else ())
    kv = ops.allocate_kv(config.kv_spec(torch.float32), max_rows * 16, cpu)
    costs = StepCosts(1, 1, 1, 1, 1, 1, 1)
    return TorchRunner(decoder, ops, kv, max_rows=max_rows, max_context=256, eos_token_ids=(), costs=costs)


def generate(runner: TorchRunner, prompts: list[list[int]], count: int, chunk: int) -> tuple[list, list]:
    """Greedy tokens and their log-probabilities, all prompts in one batch, prefilled ``chunk`` a step.

    Row r owns the blocks from 16 r on. Prompts of different length make steps that mix chunks with
    decodes.
    """
    rows = len(prompts)
    per_row = -(-256 // runner.block_size)
    new = tuple(
        NewRow(r, np.array(p, np.int32), len(p), SamplingParams(logprobs=0), r, 0)
        for r, p in enumerate(prompts)
    )
    blocks = np.arange(rows * per_row, dtype=np.int32)
    done, tokens, logprobs = [0] * rows, [[] for _ in range(rows)], [[] for _ in range(rows)]
    index = 0
    while active := [r for r in range(rows) if len(tokens[r]) < count]:
        known = [len(prompts[r]) + len(tokens[r]) for r in active]
        counts = [min(chunk, k - done[r]) for r, k in zip(active, known, strict=True)]
        plan = StepPlan(
            index=index,
            rows=np.array(active, np.int32),
            num_tokens=np.array(counts, np.int32),
            starts=np.array([done[r] for r in active], np.int32),
            samples=np.array([done[r] + c == k for r, c, k in zip(active, counts, known, strict=True)]),
            new_rows=new if index == 0 else (),
            block_rows=blocks // per_row if index == 0 else blocks[:0],
            block_positions=blocks % per_row if index == 0 else blocks[:0],
            block_ids=blocks if index == 0 else blocks[:0],
        )
        result = runner.launch(plan).result()
        for place, (r, c) in enumerate(zip(active, counts, strict=True)):
            done[r] += c
            if plan.samples[place]:
                tokens[r].append(int(result.tokens[place]))
                logprobs[r].append(float(result.logprobs[place].chosen[0]))
            else:
                assert result.tokens[place] == -1
        index += 1
    return tokens, logprobs


@pytest.mark.parametrize("name", FAMILIES)
def test_family_equals_transformers(name: str, tmp_path: Path) -> None:
    model = make_model(name, tmp_path)
    runner = load_runner(tmp_path)
    generator = torch.Generator().manual_seed(7)
    prompts = [
        torch.randint(3, 128, (length,), generator=generator).tolist() for length in (1, 5, 17, 33, 40)
    ]
    expected_tokens, expected_logprobs = [], []
    for prompt in prompts:
        with torch.inference_mode():
            out = model.generate(
                torch.tensor([prompt]),
                max_new_tokens=12,
                min_new_tokens=12,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
                suppress_tokens=None,
                eos_token_id=None,
            )
        tokens = out.sequences[0, len(prompt) :].tolist()
        expected_tokens.append(tokens)
        expected_logprobs.append(
            [
                float(logits[0].log_softmax(-1)[token])
                for logits, token in zip(out.logits, tokens, strict=True)
            ]
        )
    for chunk in (64, 6):
        tokens, logprobs = generate(runner, prompts, 12, chunk)
        assert tokens == expected_tokens
        np.testing.assert_allclose(logprobs, expected_logprobs, atol=2e-4)


def test_every_supported_architecture_is_tested() -> None:
    tested = {f"{MODEL_CLASSES.get(family, family)}ForCausalLM" for family, _ in FAMILIES.values()}
    assert tested == set(supported_architectures())


@pytest.mark.parametrize("name", ["llama3-rope", "gemma3", "smollm3"])
def test_configurations_in_the_older_spelling_mean_the_same(name: str, tmp_path: Path) -> None:
    make_model(name, tmp_path)
    now = json.loads((tmp_path / "config.json").read_text())
    then = {key: value for key, value in now.items() if key not in ("rope_parameters", "layer_types")}
    parameters = now["rope_parameters"]
    if "full_attention" in parameters:
        then["rope_theta"] = parameters["full_attention"]["rope_theta"]
        then["rope_local_base_freq"] = parameters["sliding_attention"]["rope_theta"]
    else:
        then["rope_theta"] = parameters["rope_theta"]
        if parameters["rope_type"] != "default":
            then["rope_scaling"] = {k: v for k, v in parameters.items() if k != "rope_theta"}
    assert decoder_config("then", then) == decoder_config("now", now)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["MambaForCausalLM"]},
            "architecture MambaForCausalLM, which is not supported; supported are Llama",
        ),
        (
            {"architectures": ["XForCausalLM"], "auto_map": {"AutoModel": "x.X"}},
            "would run code from its folder",
        ),
        ({"architectures": None, "model_type": None}, "architecture none"),
        ({"hidden_act": "relu"}, "activation 'relu'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope scaling 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope scaling linear has no factor"),
        ({"hidden_size": None}, "hidden_size in its configuration is None"),
        ({"num_key_value_heads": 4}, "num_key_value_heads 4 and head_dim 8 don't go together"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized by 'gptq'"),
    ],
)
def test_what_is_not_supported_is_named(changes: dict[str, Any], message: str) -> None:
    config = {**SIZES, "architectures": ["LlamaForCausalLM"], **changes}
    with pytest.raises(ModelError) as error:
        decoder_config("the-model", config)
    assert message in str(error.value)
    assert str(error.value).startswith("the-model")
