"""Shows what the memory of an equilibrium model recalls, from how much noise, and how much.

    python probes/associative_recall.py --checkpoint=checkpoints/equilibrium_shakespeare
"""

from hippocampus.probe import script

if __name__ == "__main__":
    script("associative_recall")
