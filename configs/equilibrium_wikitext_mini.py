"""wikitext-mini with an equilibrium for depth: the body of equilibrium_wt103 at a smaller size.

As configs/wikitext_mini.py it is for honest comparisons of small models on one device, and is NOT
WikiText-103. hippocampus/data/named_texts.py lists the files, which $HIPPOCAMPUS_DATA has to hold.

    :equilibrium (the default) :explicit :untied     as in configs/equilibrium_shakespeare.py

Command:   python -m hippocampus.train --config=configs/equilibrium_wikitext_mini.py
Tokens:    2,000 steps of 32 x 512 = 33 million, about 18 times the training text, as
           configs/wikitext_mini.py:25m reads
Hardware:  one GPU
Result:    not measured yet
Recipe:    the text is read many times and the validation text is of another style, so dropout,
           weight decay and label smoothing are on
"""

from ml_collections import ConfigDict

from hippocampus.config_files import start_from
from hippocampus.errors import ConfigError

KINDS = ("equilibrium", "explicit", "untied")
CELLS = 8
"""Of `untied`: about the FLOPs of the equilibrium's sweeps and of their gradient."""


def get_config(kind: str = "equilibrium") -> ConfigDict:
    """The experiment, or a control of it."""
    if kind not in KINDS:
        raise ConfigError(f"configs/equilibrium_wikitext_mini.py has no kind {kind!r}",
                          f"known: {', '.join(KINDS)}")
    config = start_from("equilibrium_wt103.py", __file__)
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
    config.model.d_model = 512
    config.model.n_layers = 9
    config.model.n_heads = 8
    config.model.dropout = 0.3
    config.model.remat = "none"
    config.model.hopfield.n_slots = 1024
    config.loss.label_smoothing = 0.1
    if kind != "equilibrium":
        config.model.solver.method = "explicit"
        config.model.solver.warmup_fraction = 0.0
        config.model.solver.ramp_fraction = 0.0
        config.model.solver.jitter = 0
        config.model.cell.copies = CELLS if kind == "untied" else 1
        config.loss.equilibrium.jacobian_weight = 0.0
    config.eval.every_steps = 250
    config.checkpoint.every_steps = 500
    config.checkpoint.keep_every_steps = 0
    config.log.histogram_every_steps = 500
    config.sample.every_steps = 1000
    return config
