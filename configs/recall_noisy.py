"""Recall that has to forget: half of the keys are bound again later, and the newest value counts.

As recall_mqar (V = 8,192), and among the bindings lie pairs of filler, half as many as keys. The
recall suite of hippocampus.probe measures other shares of noise on the same model.

Command:   python benchmarks/recall.py --config=configs/recall_noisy.py --out=recall/noisy
"""

from ml_collections import ConfigDict

from hippocampus.config_files import start_from


def get_config(model: str = "hybrid") -> ConfigDict:
    """The bodies of recall_mqar."""
    config = start_from("recall_mqar.py", __file__, model)
    config.data.corpus = "recall:noisy"
    config.data.recall.updates = 0.5
    config.data.recall.noise = 0.5
    config.data.recall.lengths = (64, 128, 256, 256)
    config.data.recall.pairs = (4, 8, 16, 32)
    config.data.recall.examples = (100_000, 20_000, 20_000, 20_000)
    config.data.recall.test_lengths = (64, 128, 256, 256, 512)
    config.data.recall.test_pairs = (4, 8, 16, 32, 64)
    return config
