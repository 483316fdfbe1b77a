"""Shows how the gates of every layer weigh the paths, token by token.

    python probes/gate_views.py --checkpoint=checkpoints/quickstart
"""

from hippocampus.probe import script

if __name__ == "__main__":
    script("gates")
