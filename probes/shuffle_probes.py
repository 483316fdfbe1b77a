"""Lets the mixer read each path at another token.

    python probes/shuffle_probes.py --checkpoint=checkpoints/quickstart
"""

from hippocampus.probe import script

if __name__ == "__main__":
    script("shuffle")
