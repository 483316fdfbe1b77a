"""Shows residual and energy around a fixed point, trajectories to it, and its basin.

    python probes/energy_landscape.py --checkpoint=checkpoints/equilibrium_shakespeare
"""

from hippocampus.probe import script

if __name__ == "__main__":
    script("energy_landscape")
