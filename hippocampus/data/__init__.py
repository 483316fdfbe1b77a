"""From a text to batches: corpora, tokenizers, and windows that are a pure function of the step."""
