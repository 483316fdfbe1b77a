"""Makes processors.json with transformers' own logits processors.

    pip install torch transformers
    python tests/generation/make_processors.py
"""

import json
import random
from pathlib import Path

import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

SETTINGS = [
    {}, {"temperature": 0.7}, {"top_k": 3}, {"top_k": 400}, {"top_p": 0.3}, {"top_p": 0.95},
    {"min_p": 0.1}, {"repetition_penalty": 1.3}, {"repetition_penalty": 0.8},
    {"temperature": 1.7, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
    {"temperature": 0.4, "top_k": 5, "top_p": 0.5}, {"top_p": 0.8, "min_p": 0.3}]


def processors(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0):
    """In the order in which `generate` puts them."""
    chain = LogitsProcessorList()
    if repetition_penalty != 1:
        chain.append(RepetitionPenaltyLogitsProcessor(penalty=repetition_penalty))
    if temperature != 1:
        chain.append(TemperatureLogitsWarper(temperature))
    if top_k:
        chain.append(TopKLogitsWarper(top_k=top_k))
    if top_p < 1:
        chain.append(TopPLogitsWarper(top_p=top_p))
    if min_p:
        chain.append(MinPLogitsWarper(min_p=min_p))
    return chain


def main():
    """Writes the file."""
    rng, cases = random.Random(0), []
    for i, settings in enumerate(SETTINGS * 2):
        size = (24, 60)[i // len(SETTINGS)]
        # Decimals that float32 holds apart; neighbours repeat, so that top-k meets ties.
        logits = [round(rng.gauss(0, 3), 1 if "top_k" in settings and len(settings) == 1 else 4)
                  for _ in range(size)]
        seen = sorted(rng.sample(range(size), 6))
        scores = torch.tensor([logits])
        processed = processors(**settings)(torch.tensor([seen]), scores.clone())[0].tolist()
        cases.append({"settings": settings, "logits": logits, "seen": seen,
                      "processed": [None if x == float("-inf") else x for x in processed]})
    path = Path(__file__).with_name("processors.json")
    path.write_text("[\n" + ",\n".join(map(json.dumps, cases)) + "\n]\n")


if __name__ == "__main__":
    main()
