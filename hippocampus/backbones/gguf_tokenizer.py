"""The tokenizer that a GGUF file describes, as a tokenizer.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers import Tokenizer as LibraryTokenizer

from hippocampus.backbones.hub_tokenizer import HubTokenizer, scored_pieces
from hippocampus.errors import DataError

_CONTROL, _USER = 3, 4
"""Kinds of tokens that are read whole: with a meaning, and without."""
_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,%d}|"
          r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_DIGITS = {"llama-bpe": 3, "qwen2": 1}
"""Digits that may stand together, by the name of the rule that cuts a text into words."""
_RULES = ("default", "gpt-2", "smollm", *_DIGITS)


def gguf_tokenizer(path: Path, fields: Mapping[str, Any]) -> HubTokenizer | None:
    """The tokenizer of a file; None where it has none.

    Args:
      path: of the file, for messages.
      fields: of the file, by name.

    Raises:
      DataError: a kind that is not supported, or fields that do not belong together.
    """
    if "tokenizer.ggml.model" not in fields:
        return None
    try:
        return _read(path, fields)
    except DataError:
        raise
    except Exception as error:  # a stranger's fields of any type; the library raises bare ones
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path}: its tokenizer is damaged: {text}",
                        "put the tokenizer.json of the model beside the file") from None


def _read(path: Path, fields: Mapping[str, Any]) -> HubTokenizer:
    def field(name: str, default: Any = None) -> Any:
        return fields.get(f"tokenizer.ggml.{name}", default)

    kind, pieces = field("model"), field("tokens")
    types = field("token_type", [1] * len(pieces or ()))
    if not isinstance(pieces, list) or len(types) != len(pieces):
        raise DataError(f"{path}: its tokens and their types do not belong together",
                        "copy or download it again")
    specials = {i: piece for i, piece in enumerate(pieces) if types[i] == _CONTROL}
    ends = [field("eos_token_id"), field("eot_token_id")]
    begin = field("bos_token_id") if field("add_bos_token", kind == "llama") else None
    if begin is not None:
        specials.setdefault(begin, pieces[begin])
    if kind == "llama":
        document = scored_pieces(pieces, field("scores"), specials, space="▁", add_begin=begin,
                                 unknown=field("unknown_token_id", 0),
                                 first_space=field("add_space_prefix", True))
    elif kind == "gpt2":
        user = [piece for i, piece in enumerate(pieces) if types[i] == _USER]
        document = _byte_level(path, pieces, field("merges", []), field("pre", "default"), specials,
                               user, begin)
    else:
        raise DataError(f"{path}: tokenizers of the kind {str(kind)[:60]!r} are not supported",
                        "put the tokenizer.json of the model beside the file")
    return HubTokenizer(document, [end for end in ends if end is not None])


def _byte_level(path: Path, pieces: list[str], merges: list[str], rule: str,
                specials: Mapping[int, str], user: list[str], begin: int | None) -> str:
    if rule not in _RULES:
        raise DataError(f"{path}: words cut by the rule {str(rule)[:60]!r} are not supported",
                        "put the tokenizer.json of the model beside the file")
    whole_words = rule == "llama-bpe"
    library = LibraryTokenizer(models.BPE(
        vocab={piece: i for i, piece in enumerate(pieces)},
        merges=[(left, right) for left, _, right in (merge.partition(" ") for merge in merges)],
        ignore_merges=whole_words))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rule not in _DIGITS)
    first: list[Any] = []
    if rule in _DIGITS:
        first = [pre_tokenizers.Split(Regex(_WORDS % _DIGITS[rule]), "isolated")]
    elif rule == "smollm":
        first = [pre_tokenizers.Digits(individual_digits=True)]
    library.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level])
    library.decoder = decoders.ByteLevel()
    if rule == "qwen2":
        library.normalizer = normalizers.NFC()
    library.add_special_tokens([AddedToken(piece, special=True, normalized=False)
                                for piece in specials.values()])
    library.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in user])
    if begin is not None:
        library.post_processor = processors.TemplateProcessing(
            single=f"{pieces[begin]} $A", special_tokens=[(pieces[begin], begin)])
    return str(library.to_str())
