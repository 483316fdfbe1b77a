"""Delayed copy: ids, a gap of filler, then marks, at which the ids are asked for in their order.

    :hopfield   a Hopfield memory
    :gru        a GRU at equal parameters (within 0.1 %), whose state has to carry the ids over
                the gap
    :hybrid, :attention, :ssm   as in recall_mqar

A number behind the model is the gap: ":gru-240". Every gap is a run of its own, as in Hochreiter &
Schmidhuber 1997 and Arjovsky et al. 2016 (arXiv:1511.06464), with 10 ids of 14.

Command:   for gap in 20 60 120 240; do python benchmarks/recall.py \
               --config=configs/recall_delayed_copy.py --models=hopfield-$gap,gru-$gap \
               --out=recall/delayed_copy_$gap; done
"""

from ml_collections import ConfigDict

from hippocampus.config_files import start_from
from hippocampus.errors import ConfigError

IDS = 10


def get_config(argument: str = "hopfield") -> ConfigDict:
    """Two layers of width 64; learned positions tell every memory where it is."""
    model, _, gap = argument.partition("-")
    if gap and not gap.isdecimal():
        raise ConfigError(f"recall_delayed_copy has no gap {gap!r}", "give tokens, as in gru-240")
    config = start_from("recall_mqar.py", __file__, "ssm" if model == "gru" else model)
    length = 2 * IDS + int(gap or 60)
    if model == "gru":
        config.model.ssm.kind = "gru"
        config.model.ssm.expansion = 34 / 64
    config.model.position = "learned"
    config.data.corpus = "recall:delayed_copy"
    config.data.context = length
    config.data.recall.vocab_size = 16
    config.data.recall.lengths = (length,)
    config.data.recall.pairs = (IDS,)
    config.data.recall.examples = (200_000,)
    config.data.recall.test_lengths = (length,)
    config.data.recall.test_pairs = (IDS,)
    config.train.steps = 3000
    config.train.batch_size = max(1, 16_384 // length)
    config.optimizer.learning_rate = 3e-3  # of all models
    config.sample.prompt = "5 3 12 0 0 1 1"
    return config
