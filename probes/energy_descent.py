"""Shows the energy of Hopfield retrieval, step by step.

    python probes/energy_descent.py --checkpoint=checkpoints/quickstart
"""

from hippocampus.probe import script

if __name__ == "__main__":
    script("energy")
