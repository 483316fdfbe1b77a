"""Splits the loss into what a memory can recall and the rest.

    python probes/recall_split.py --checkpoint=checkpoints/quickstart
"""

from hippocampus.probe import script

if __name__ == "__main__":
    script("recall")
