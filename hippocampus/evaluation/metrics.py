"""From nats per token to the numbers people compare: bits per byte and perplexities."""

from __future__ import annotations

import math


class TokenLoss:
    """A mean loss per token and, derived from it, the numbers that people compare.

    Attributes:
      nats_per_token: mean -log p of the predicted ids.
      bytes_per_token: UTF-8 bytes of the text per prediction; None for what is not a text.
      words_per_token: words of the text per prediction; None where nobody counted them.
    """

    nats_per_token: float
    bytes_per_token: float | None
    words_per_token: float | None

    @property
    def bits_per_byte(self) -> float | None:
        """nats per token / (ln 2 * bytes per token): comparable between tokenizers."""
        if self.bytes_per_token is None:
            return None
        return bits_per_byte(self.nats_per_token, self.bytes_per_token)

    @property
    def perplexity(self) -> float:
        """exp(nats per token): only comparable under the same tokenizer."""
        return perplexity(self.nats_per_token)

    @property
    def word_perplexity(self) -> float | None:
        """exp(summed nats / words): comparable between tokenizers that know every word."""
        if self.words_per_token is None:
            return None
        return word_perplexity(self.nats_per_token, self.words_per_token)


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """Cross-entropy in bits per UTF-8 byte of the text, whatever it was cut into."""
    return nats_per_token / (math.log(2) * bytes_per_token)


def perplexity(nats_per_token: float) -> float:
    """exp(nats per token); it depends on what a token is."""
    return _exp(nats_per_token)


def word_perplexity(nats_per_token: float, words_per_token: float) -> float:
    """exp(summed nats / words): the perplexity per word, whatever a token is.

    Args:
      nats_per_token: mean over the predictions.
      words_per_token: words of the text / predictions. A word here is WikiText's: what stands
        between white space, and one `<eos>` for every line.

    Source: the convention of the WikiText results (Merity et al. 2016, arXiv:1609.07843), whose
    test split has 245,569 words.
    """
    return _exp(nats_per_token / words_per_token) if words_per_token else math.inf


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
