"""Selective copying: ids lie scattered in filler; at the end they are asked for in their order.

16 ids of 14 in 256 tokens, filler included; Gu & Dao 2023 (arXiv:2312.00752), table 1, has them
in 4,096 tokens: --config.data.recall.lengths=4096 --config.data.context=4096
--config.data.recall.test_lengths=4096 --config.data.recall.test_pairs=16
--config.train.batch_size=8. The marks at the end are all alike, so a model has to count them.

Command:   python benchmarks/recall.py --config=configs/recall_selective_copy.py \
               --out=recall/selective_copy
"""

from ml_collections import ConfigDict

from hippocampus.config_files import start_from


def get_config(model: str = "hybrid") -> ConfigDict:
    """The bodies of recall_mqar."""
    config = start_from("recall_mqar.py", __file__, model)
    config.data.corpus = "recall:selective_copy"
    config.data.recall.vocab_size = 16
    config.data.recall.lengths = (256,)
    config.data.recall.pairs = (16,)
    config.data.recall.examples = (200_000,)
    config.data.recall.test_lengths = (128, 256, 512)
    config.data.recall.test_pairs = (16, 16, 16)
    config.train.steps = 3000
    config.sample.prompt = "0 7 0 0 3 0 12 0 1 1 1"
    return config
