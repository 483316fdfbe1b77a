"""Shows how straight hidden states move through layers and passes.

    python probes/flow_straightness.py --checkpoint=checkpoints/quickstart
"""

from hippocampus.probe import script

if __name__ == "__main__":
    script("flow")
