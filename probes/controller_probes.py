"""Replaces what the controller says: another text's, noise, nothing.

    python probes/controller_probes.py --checkpoint=checkpoints/quickstart
"""

from hippocampus.probe import script

if __name__ == "__main__":
    script("controller")
