"""Runs one, two, three, … reasoning passes.

    python probes/segment_sweep.py --checkpoint=checkpoints/quickstart
"""

from hippocampus.probe import script

if __name__ == "__main__":
    script("segments")
