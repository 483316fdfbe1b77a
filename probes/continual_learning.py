"""Shows what a copy of a run learns from one task after another, and what it forgets.

    python probes/continual_learning.py --checkpoint=checkpoints/equilibrium_shakespeare
"""

from hippocampus.probe import script

if __name__ == "__main__":
    script("continual")
