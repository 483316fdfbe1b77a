"""Pretrained decoders: Llama, Qwen3, Gemma 3 and Gemma-3n text, from the files they come in.

`load_backbone` of `hippocampus.backbones.loading` reads a folder of the Hugging Face form, a GGUF
file or a llama2.c `.bin`; docs/backbones.md says which weights were tried.
"""
