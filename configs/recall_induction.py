"""Induction heads: a mark stands somewhere in filler; at its end it comes again. What followed?

One answer per example of 256 tokens and 16 ids, as in Gu & Dao 2023 (arXiv:2312.00752), table 2;
held out up to 4,096 tokens, where a model has to go beyond what it was trained on.

Command:   python benchmarks/recall.py --config=configs/recall_induction.py --out=recall/induction
           (one model: python -m hippocampus.train --config=configs/recall_induction.py:hybrid)
"""

from ml_collections import ConfigDict

from hippocampus.config_files import start_from


def get_config(model: str = "hybrid") -> ConfigDict:
    """The bodies of recall_mqar."""
    config = start_from("recall_mqar.py", __file__, model)
    config.data.corpus = "recall:induction"
    config.data.recall.vocab_size = 16
    config.data.recall.lengths = (256,)
    config.data.recall.pairs = (1,)
    config.data.recall.examples = (200_000,)
    config.data.recall.test_lengths = (64, 256, 1024, 4096)
    config.data.recall.test_pairs = (1, 1, 1, 1)
    config.train.steps = 3000
    config.sample.prompt = "7 3 1 12 5 9 1"
    return config
