"""Shows how deep and how sharply the Hopfield memory retrieves.

    python probes/hopfield_views.py --checkpoint=checkpoints/quickstart
"""

from hippocampus.probe import script

if __name__ == "__main__":
    script("hopfield")
