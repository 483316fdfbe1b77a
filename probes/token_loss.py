"""Shows the loss of a passage token by token, by position and by frequency.

    python probes/token_loss.py --checkpoint=checkpoints/quickstart
"""

from hippocampus.probe import script

if __name__ == "__main__":
    script("tokens")
