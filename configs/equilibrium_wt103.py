"""WikiText-103 in byte-level BPE with an equilibrium for depth: a recipe for 98M parameters.

Sixteen Mamba layers read the text; a cell of state space, Hopfield memory (4,096 learned patterns)
and MLP is then iterated to its fixed point, whose gradient is the implicit one: memory does not
grow with the sweeps. Training begins with a few unrolled sweeps and then lets their number and the
tolerance go to their own values. The Jacobian's term keeps the cell contracting.

Command:   python -m hippocampus.train --config=configs/equilibrium_wt103.py
Tokens:    25,000 steps of 64 x 1,024 = 1.64 billion, about 14 times the training text, as
           configs/wt103_bpe.py reads
Text:      Salesforce/wikitext (raw) from the hub; a local copy: --config.data.corpus=FOLDER with
           what `save_to_disk` wrote or the parquet files of the data set
Hardware:  made for several TPU cores or 80 GB GPUs; not run yet
Result:    not trained yet
Recipe:    as configs/wt103_bpe.py; see docs/equilibrium.md for what to change where tokens do not
           converge
"""

from ml_collections import ConfigDict

from hippocampus.config_files import defaults

SWEEPS = 12


def get_config() -> ConfigDict:
    """The experiment."""
    config = defaults("equilibrium")
    config.train.steps = 25_000
    config.train.batch_size = 64
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 1000
    config.optimizer.groups = ((r"slots$", 1.0, 0.0),)
    config.ema.decay = 0.999
    config.data.corpus = "Salesforce/wikitext"
    config.data.subset = "wikitext-103-raw-v1"
    config.data.document_start = r"^ = [^=].* = $"
    config.data.tokenizer = "bpe"
    config.data.vocab_size = 32_768
    config.data.context = 1024
    config.model.vocab_size = 32_768
    config.model.d_model = 768
    config.model.n_layers = 16
    config.model.n_heads = 12
    config.model.dropout = 0.1
    config.model.scan_layers = True
    config.model.remat = "full"
    config.model.hopfield.n_slots = 4096
    config.model.solver.max_iterations = SWEEPS
    config.model.solver.backward_iterations = SWEEPS
    config.model.solver.warmup_fraction = 0.1
    config.model.solver.ramp_fraction = 0.1
    config.model.solver.jitter = 2
    config.loss.z_weight = 1e-4
    config.loss.equilibrium.jacobian_weight = 0.1
    config.eval.every_steps = 1000
    config.checkpoint.every_steps = 1000
    config.checkpoint.keep_every_steps = 5000
    config.log.every_steps = 25
    config.log.histogram_every_steps = 1000
    config.sample.every_steps = 1000
    config.sample.prompt = " = The history of"
    return config
