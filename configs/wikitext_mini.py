"""wikitext-mini: 7.3 MB of English to train on, WikiText's validation articles to be measured by.

The architecture of wt103_bpe at a size for one device and a few minutes, for honest comparisons of
small models. It is NOT WikiText-103: the training text is Wikipedia articles, fairy tales and
speeches, and its perplexities say nothing beside published ones. hippocampus/data/named_texts.py
lists the files, which $HIPPOCAMPUS_DATA has to hold.

    :10m :25m (the default) :97m     the sizes of a scaling study, one vocabulary of 8,192
    :bytes                           the 25m body on bytes

Command:   python -m hippocampus.train --config=configs/wikitext_mini.py
Tokens:    2,000 steps of 32 x 512 = 33 million, about 18 times the training text
Hardware:  one NVIDIA H100, bfloat16: 295,000 tokens/s, 9.4 GiB, about 4 minutes
Result:    25m: 2.659 bits per byte (averaged weights, best step 1,600; 2.669 at the end; bigram
           3.128, trigram 3.154), the whole validation text in windows of 512, one seed
Recipe:    the text is read many times and the validation text is of another style, so dropout,
           weight decay, token noise and label smoothing are on; rectified flow is off
"""

from ml_collections import ConfigDict

from hippocampus.config_files import start_from
from hippocampus.errors import ConfigError

# d_model, n_heads, n_kv_heads, mlp.width
SIZES = {
    "10m": (256, 2, 1, 448),
    "25m": (384, 3, 1, 1280),
    "97m": (768, 6, 2, 2560),
    "bytes": (384, 3, 1, 1280),
}


def get_config(size: str = "25m") -> ConfigDict:
    """The experiment in a size."""
    if size not in SIZES:
        raise ConfigError(f"configs/wikitext_mini.py has no size {size!r}",
                          f"known: {', '.join(SIZES)}")
    config = start_from("wt103_bpe.py", __file__)
    config.train.steps = 2000
    config.train.batch_size = 32
    config.optimizer.warmup_steps = 200
    config.optimizer.weight_decay = 1.0
    config.data.corpus = "wikitext_mini"
    config.data.subset = ""
    config.data.document_start = ""
    config.data.vocab_size = 8192
    config.data.context = 512
    config.model.vocab_size = 8192
    (config.model.d_model, config.model.n_heads, config.model.attention.n_kv_heads,
     config.model.mlp.width) = SIZES[size]
    config.model.dropout = 0.3
    config.model.token_noise = 0.15
    config.loss.label_smoothing = 0.1
    if size == "bytes":
        config.data.tokenizer = "bytes"
        config.data.vocab_size = 0
        config.data.context = 1024
        config.model.vocab_size = 256
    config.eval.every_steps = 250
    config.checkpoint.every_steps = 500
    config.checkpoint.keep_every_steps = 0
    config.log.histogram_every_steps = 500
    config.sample.every_steps = 1000
    return config
