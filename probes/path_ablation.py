"""Takes paths away from a trained model, in all layers or in one, and changes K.

    python probes/path_ablation.py --checkpoint=checkpoints/quickstart
"""

from hippocampus.probe import script

if __name__ == "__main__":
    script("paths")
