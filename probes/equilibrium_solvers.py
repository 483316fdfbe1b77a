"""Shows whether a fixed point is one: solvers, starts, rate, energy, gradient, causality.

    python probes/equilibrium_solvers.py --checkpoint=checkpoints/equilibrium_shakespeare
"""

from hippocampus.probe import script

if __name__ == "__main__":
    script("equilibrium")
