"""WikiText-103 in words: the full vocabulary of 267,735, in 105.6M parameters.

The body is that of wt103_bpe. Published word-level perplexities are those of the full vocabulary
(<unk> only where the text itself has it), so this one is full too. A table of 267,735 x 768 would
hold 206M parameters by itself: here it is 128 wide, with a projection to and from the model. Its
logits are never in memory as a whole.

Command:   python -m hippocampus.train --config=configs/wt103_word.py
Tokens:    25,000 steps of 64 x 1,024 = 1.64 billion, about 16 times the training text
Text:      Salesforce/wikitext, wikitext-103-v1; every line ends with <eos>
Hardware:  as wt103_bpe
Result:    not trained to the end yet
Recipe:    as wt103_bpe: label smoothing and rectified flow off
A smaller vocabulary:  --config.data.vocab_size=50000 keeps the most frequent words; the rate of
           <unk> stands in every table, and perplexities are then not comparable with others
"""

from ml_collections import ConfigDict

from hippocampus.config_files import start_from


def get_config() -> ConfigDict:
    """The experiment."""
    config = start_from("wt103_bpe.py", __file__)
    config.data.subset = "wikitext-103-v1"
    config.data.tokenizer = "words"
    config.data.vocab_size = 0
    config.model.vocab_size = 267_735
    config.model.embedding_width = 128
    config.sample.prompt = "The history of"
    return config
