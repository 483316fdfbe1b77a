"""Shows where the attention heads look and how sharply.

    python probes/attention_entropy.py --checkpoint=checkpoints/quickstart
"""

from hippocampus.probe import script

if __name__ == "__main__":
    script("attention")
