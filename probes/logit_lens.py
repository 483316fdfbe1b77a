"""Reads the next token out of every layer and every reasoning pass.

    python probes/logit_lens.py --checkpoint=checkpoints/quickstart
"""

from hippocampus.probe import script

if __name__ == "__main__":
    script("lens")
