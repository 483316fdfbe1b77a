"""A pretrained decoder from the files it came in, and back to files: `load_backbone`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from hippocampus.backbones.architecture import Architecture
from hippocampus.backbones.chat import ChatTemplate
from hippocampus.backbones.config_json import end_ids, read_architecture, write_config
from hippocampus.backbones.decoder import Decoder
from hippocampus.backbones.gemma3n import Gemma3nDecoder
from hippocampus.backbones.hub_tokenizer import HubTokenizer
from hippocampus.backbones.huggingface import (
    CONFIG,
    LARGEST_SHARD,
    new_folder,
    open_folder,
    write_tensors,
)
from hippocampus.backbones.parameters import Shardings, named_tensors, read_parameters
from hippocampus.errors import DataError
from hippocampus.files import expand, read_object

TOKENIZER, TOKENIZER_CONFIG, GENERATION = (
    "tokenizer.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True)
class Backbone:
    """A pretrained decoder.

    Attributes:
      model: the module.
      params: its parameters; None where they were not asked for.
      tokenizer: None where the files have none.
      chat: its chat template; None where the files have none.
    """

    model: Decoder
    params: Any
    tokenizer: HubTokenizer | None = None
    chat: ChatTemplate | None = None


def build_decoder(architecture: Architecture, **settings: Any) -> Decoder:
    """The module of an architecture; `settings` are the further attributes of `Decoder`."""
    kind = Gemma3nDecoder if architecture.family == "gemma3n" else Decoder
    return kind(architecture, **settings)


def is_backbone(path: Path) -> bool:
    """Whether a path is meant as a pretrained decoder; `load_backbone` says whether it is good."""
    if path.suffix in (".gguf", ".bin"):
        return path.is_file()
    try:
        return "model_type" in json.loads((path / CONFIG).read_text("utf-8"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def load_backbone(path: str | Path, *, dtype: str | None = None, sharding: Shardings = None,
                  weights: bool = True, **settings: Any) -> Backbone:
    """Reads a pretrained decoder.

    Args:
      path: a folder with config.json and safetensors, a `.gguf` file, or a llama2.c `.bin`.
      dtype: of the parameters; None = as they lie in the file (GGUF: float32).
      sharding: where they go: one for all, or a function of the tree of shapes; None = whole, to
        this process's first device.
      weights: False = what the files say of the model, without its parameters.
      settings: attributes of `Decoder`, such as `compute_dtype` and `scan_layers`.

    Raises:
      DataError: nothing there, or a config or tokenizer that is damaged or not supported.
      CheckpointError: tensors that are missing, damaged, not finite or another model's.
    """
    place = expand(path)
    if place.suffix in (".gguf", ".bin"):
        return _load_file(place, dtype, sharding, weights, settings)
    if not (place / CONFIG).is_file():
        raise DataError(f"there is no pretrained model at {place}",
                        "give a folder with config.json, or a .gguf or .bin file")
    model = build_decoder(read_architecture(place / CONFIG), **settings)
    tokenizer = read_tokenizer(place, model.config.vocab_size)
    chat = read_chat_template(place, tokenizer)
    if not weights:
        return Backbone(model, None, tokenizer, chat)
    with open_folder(place) as source:
        params = read_parameters(source, model, dtype=dtype, sharding=sharding)
    return Backbone(model, params, tokenizer, chat)


def _load_file(path: Path, dtype: str | None, sharding: Shardings, weights: bool,
               settings: dict[str, Any]) -> Backbone:
    if path.suffix == ".gguf":
        from hippocampus.backbones.gguf_file import load_gguf

        return load_gguf(path, dtype, sharding, settings, weights)
    from hippocampus.backbones.llama2c import load_llama2c

    return load_llama2c(path, dtype, sharding, settings, weights)


def weights_digest(path: str | Path) -> str:
    """A digest of the files that hold a decoder's weights: the same for the same bytes.

    Args:
      path: as for `load_backbone`.

    Raises:
      DataError: there are none.
    """
    place = expand(path)
    files = [place] if place.is_file() else sorted(place.glob("*.safetensors"))
    if not files:
        raise DataError(f"there is no pretrained model at {place}",
                        "give a folder with config.json, or a .gguf or .bin file")
    digest = xxhash.xxh3_128()
    for file in files:
        digest.update(f"{file.name if place.is_dir() else ''} {file.stat().st_size} ".encode())
        with file.open("rb") as content:
            while block := content.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def save_backbone(folder: str | Path, backbone: Backbone, *, dtype: str | None = None,
                  largest: int = LARGEST_SHARD) -> None:
    """Writes a folder of the Hugging Face form, which appears whole or not at all.

    Args:
      folder: the folder to make.
      backbone: what to write; its tokenizer and chat template too, where it has them.
      dtype: of the tensors; None = as the parameters are.
      largest: bytes of a file, unless one tensor alone is larger.

    Raises:
      ConfigError: something is in its place, it cannot be written, or adapters lie beside matrices.
      CheckpointError: a weight is not finite.
    """
    cfg, tokenizer = backbone.model.config, backbone.tokenizer
    kept = dtype or str(backbone.params["embedding"].dtype)
    config = write_config(cfg, kept)
    if tokenizer and tokenizer.end_ids:
        config["eos_token_id"] = list(tokenizer.end_ids)
        config["bos_token_id"] = tokenizer.begin_id
    with new_folder(expand(folder)) as place:
        write_tensors(place, named_tensors(backbone.params, cfg, dtype), largest=largest)
        _write_json(place / CONFIG, config)
        if tokenizer:
            tokenizer.save(place / TOKENIZER)
        if backbone.chat:
            _write_json(place / TOKENIZER_CONFIG, {"chat_template": backbone.chat.source,
                                                   **backbone.chat.tokens})


def read_tokenizer(folder: Path, vocab_size: int) -> HubTokenizer | None:
    """The tokenizer of a folder, with the ids that end a text; None where there is no file.

    Args:
      folder: of the Hugging Face form.
      vocab_size: ids that the model knows.

    Raises:
      DataError: damaged, or with ids that the model does not know.
    """
    path = folder / TOKENIZER
    if not path.is_file():
        return None
    ends: tuple[int, ...] = ()
    for file in (GENERATION, CONFIG):  # a chat model's config.json may lack the end of a turn
        if not ends and (folder / file).is_file():
            ends = end_ids(read_object(folder / file, "copy or download the folder again"))
    tokenizer = HubTokenizer.load(path, ends)
    if tokenizer.vocab_size > vocab_size:
        raise DataError(f"{path} has {tokenizer.vocab_size} ids, the model {vocab_size}",
                        "both must be of the same model")
    return tokenizer


def read_chat_template(folder: Path, tokenizer: HubTokenizer | None) -> ChatTemplate | None:
    """The chat template of a folder: chat_template.jinja, or a field of tokenizer_config.json.

    Args:
      folder: of the Hugging Face form.
      tokenizer: of the same folder, which knows the special tokens that no file names.

    Raises:
      DataError: a file that is damaged, or a template that is not one.
    """
    config: dict[str, Any] = {}
    if (folder / TOKENIZER_CONFIG).is_file():
        config = read_object(folder / TOKENIZER_CONFIG, "copy or download the folder again")
    template = config.get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            template = file.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read {file}: {error}",
                            "copy or download the folder again") from None
    if not isinstance(template, str):
        return None
    tokens = tokenizer.special_tokens() if tokenizer else {}
    for name in ("bos_token", "eos_token"):
        value = config.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            tokens[name] = value
    return ChatTemplate(template, tokens)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
