"""WikiText-103 in bytes: the body of wt103_bpe (71.3M parameters) without a tokenizer.

Command:   python -m hippocampus.train --config=configs/wt103_bytes.py
Tokens:    25,000 steps of 32 x 2,048 = 1.64 billion bytes, about 3 times the training text
Hardware:  as wt103_bpe
Result:    not trained to the end yet
Recipe:    as wt103_bpe: label smoothing and rectified flow off; no dropout, the text is hardly
           repeated
"""

from ml_collections import ConfigDict

from hippocampus.config_files import start_from


def get_config() -> ConfigDict:
    """The experiment."""
    config = start_from("wt103_bpe.py", __file__)
    config.train.batch_size = 32
    config.data.tokenizer = "bytes"
    config.data.vocab_size = 0
    config.data.context = 2048
    config.model.vocab_size = 256
    config.model.dropout = 0.0
    config.sample.max_new_tokens = 500
    return config
