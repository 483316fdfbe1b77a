"""Makes the tiny random checkpoints that the parity tests read, and what transformers says of them.

    pip install 'hippocampus[parity]'
    python tests/backbones/make_fixtures.py [FAMILY …] [peft]

Every parameter is random: as a library initialises them, norms of one and scales of zero would
hide what they do. The sizes are chosen so that every path of the code is reached: contexts longer
than the sliding window, all three bands of the llama3 frequencies, ids beyond the per-layer table.
A folder of the result holds config.json, model.safetensors and reference.npz: `ids` (2, 40),
`logits` of the full forward pass in float32, and `generated`, the greedy continuation of the first
12 ids of each row. One of fixtures/peft holds an adapter as PEFT writes it for the checkpoint of
its family, random throughout, and in reference.npz the logits of the first 12 ids.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

FOLDER = Path(__file__).parent / "fixtures"
VOCABULARY, LENGTH, PROMPT, NEW = 97, 40, 12, 10
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0,
          "high_freq_factor": 4.0, "original_max_position_embeddings": 256}
COMMON = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

FAMILIES = {
    "llama": lambda: (LlamaForCausalLM, LlamaConfig(
        **COMMON, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, head_dim=8, max_position_embeddings=512,
        rms_norm_eps=1e-5, tie_word_embeddings=True, rope_parameters=LLAMA3)),
    # Heads that are wider together than the model, and an output table of its own.
    "qwen3": lambda: (Qwen3ForCausalLM, Qwen3Config(
        **COMMON, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
        tie_word_embeddings=False)),
    # A scale that is not that of the head width, and stretched positions in the full layer.
    "gemma3": lambda: (Gemma3ForCausalLM, Gemma3TextConfig(
        **COMMON, hidden_size=32, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=128,
        sliding_window=8, query_pre_attn_scalar=24,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}})),
    # Two layers that read the keys of others, of which one has two to choose from; two sparse ones
    # that are alike, of which enough is left that no norm sees almost nothing; ids beyond the
    # per-layer table.
    "gemma3n": lambda: (Gemma3nForCausalLM, Gemma3nTextConfig(
        **COMMON, vocab_size_per_layer_input=90, hidden_size=32, intermediate_size=64,
        num_hidden_layers=5, hidden_size_per_layer_input=8, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=128, sliding_window=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention",
                     "sliding_attention", "full_attention"], num_kv_shared_layers=2,
        laurel_rank=4, altup_num_inputs=4,
        activation_sparsity_pattern=[0.8, 0.8, 0.0, 0.0, 0.0])),
}

# Names, a regular expression that means some layers, and everything there is; both scales.
ADAPTERS = {
    "llama": {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, "lora_alpha": 8,
              "lora_dropout": 0.1},
    "qwen3": {"target_modules": r"model\.layers\.1\.(self_attn\.[ko]_proj|mlp\.up_proj)", "r": 3,
              "lora_alpha": 5, "use_rslora": True},
    "gemma3": {"target_modules": ["gate_proj", "model.layers.0.self_attn.o_proj"], "r": 2,
               "lora_alpha": 3},
    "gemma3n": {"target_modules": "all-linear", "r": 1, "lora_alpha": 2},
}


def randomise(model: torch.nn.Module, seed: int) -> None:
    """Vectors around one with a spread of 0.2, matrices of unit gain."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(1.0 + 0.2 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)


def make(name: str) -> None:
    """Writes one folder anew."""
    kind, config = FAMILIES[name]()
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(0)
    made = kind(config).eval().float()
    randomise(made, 1)
    made.save_pretrained(folder)
    ids = torch.randint(3, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(2))
    model = kind.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
        written = model.generate(ids[:, :PROMPT], max_new_tokens=NEW, do_sample=False,
                                 eos_token_id=VOCABULARY)
    np.savez(folder / "reference.npz", ids=ids.numpy(), logits=logits.numpy(),
             generated=written[:, PROMPT:].numpy())
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "model.safetensors").chmod(0o644)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{name}: {sum(p.numel() for p in model.parameters())} parameters, {size} bytes, "
          f"logits of spread {float(logits.std()):.2f}, drawn {written[:, PROMPT:].tolist()}")


def make_adapter(family: str) -> None:
    """Writes one folder of fixtures/peft anew; its checkpoint has to be there."""
    import peft

    kind, _ = FAMILIES[family]()
    folder = FOLDER / "peft" / family
    shutil.rmtree(folder, ignore_errors=True)
    base = kind.from_pretrained(FOLDER / family, attn_implementation="eager", dtype=torch.float32)
    torch.manual_seed(3)
    model = peft.get_peft_model(base, peft.LoraConfig(
        task_type="CAUSAL_LM", base_model_name_or_path=family, **ADAPTERS[family])).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape))
    model.peft_config["default"].base_model_name_or_path = family
    model.save_pretrained(folder)
    ids = torch.from_numpy(np.load(FOLDER / family / "reference.npz")["ids"][:, :PROMPT])
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
        with model.disable_adapter():
            moved = (logits - model(ids, use_cache=False).logits).abs().mean()
    np.savez(folder / "reference.npz", logits=logits.numpy())
    (folder / "README.md").unlink(missing_ok=True)
    (folder / "adapter_model.safetensors").chmod(0o644)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"peft/{family}: {size} bytes, logits moved by {float(moved):.2f}")


if __name__ == "__main__":
    for family in sys.argv[1:] or (*FAMILIES, "peft"):
        if family != "peft":
            make(family)
    if "peft" in (sys.argv[1:] or ["peft"]):
        for family in ADAPTERS:
            make_adapter(family)
