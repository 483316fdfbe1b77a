"""Makes the tiny random Mamba checkpoints of the parity tests, and what transformers says of them.

    pip install torch transformers
    python tests/backbones/make_mamba_fixtures.py

Every parameter is random: as the library initialises them, norms of one and biases of zero would
hide what they do. A folder of the result holds config.json, model.safetensors and reference.npz:
`ids` (2, 40) and `logits` of the full forward pass in float32. The numbers of the committed ones
are from torch 2.13.0 and transformers 5.24.0.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

FOLDER = Path(__file__).parent / "fixtures"
COMMON = {"vocab_size": 41, "hidden_size": 24, "state_size": 16}
FAMILIES = {
    "mamba": (MambaForCausalLM, MambaConfig(**COMMON, num_hidden_layers=3)),
    # Two groups of heads, biases where the other has none, and an output table of its own.
    "mamba2": (Mamba2ForCausalLM, Mamba2Config(
        **COMMON, num_hidden_layers=2, num_heads=6, head_dim=8, n_groups=2, conv_kernel=3,
        use_bias=True, use_conv_bias=False, tie_word_embeddings=False, layer_norm_epsilon=1e-3,
        chunk_size=16)),
}


def randomize(model: torch.nn.Module) -> None:
    """Draws every parameter, of about the size that a trained one has."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name or name.endswith(".D"):
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("A_log"):
                parameter.copy_(1 + 0.7 * noise)
            elif name.endswith(("dt_bias", "dt_proj.bias")):
                parameter.copy_(-2 + noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
            elif "embeddings" in name or "lm_head" in name:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
            else:
                parameter.copy_(noise * (parameter.shape[-1] if parameter.ndim == 2 else 3) ** -0.5)


def main() -> None:
    """Writes every folder anew."""
    ids = np.random.default_rng(0).integers(0, COMMON["vocab_size"], (2, 40))
    for family, (kind, config) in FAMILIES.items():
        model = kind(config).eval()
        randomize(model)
        with torch.no_grad():
            logits = model(torch.from_numpy(ids), use_cache=False).logits.numpy()
        shutil.rmtree(FOLDER / family, ignore_errors=True)
        model.save_pretrained(FOLDER / family)
        (FOLDER / family / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(FOLDER / family / "reference.npz", ids=ids.astype(np.int32),
                            logits=logits)


if __name__ == "__main__":
    main()
