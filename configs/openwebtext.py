"""OpenWebText, read as a stream: the model of wt103_bpe on 9 billion tokens of the web.

The text is never kept: it is read over the network, tokenized piece by piece in bounded memory into
shards of about 18 GB, and training reads those. A build that was interrupted keeps its finished
pieces but downloads what they were made of again; with --config.data.streaming=false the text is
kept instead (40 GB). The first 5,000 documents are held out.

Command:   python -m hippocampus.train --config=configs/openwebtext.py
Tokens:    20,000 steps of 480 x 1,024 = 9.8 billion, about once through the text
Hardware:  a slice of 16 or more TPU devices, or 8 GPUs of 80 GB
Result:    not trained yet; the tokenizer learns from the first 2,000 MB of the text
Recipe:    label smoothing and rectified flow off, as in wt103_bpe; no dropout, nothing repeats
"""

from ml_collections import ConfigDict

from hippocampus.config_files import start_from


def get_config() -> ConfigDict:
    """The experiment."""
    config = start_from("wt103_bpe.py", __file__)
    config.train.steps = 20_000
    config.train.batch_size = 480
    config.data.corpus = "Skylion007/openwebtext"
    config.data.subset = ""
    config.data.document_start = ""
    config.data.streaming = True
    config.model.dropout = 0.0
    config.sample.prompt = "The"
    return config
