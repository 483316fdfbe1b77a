"""Shows how far back the state-space memory of every channel reaches.

    python probes/ssm_memory.py --checkpoint=checkpoints/quickstart
"""

from hippocampus.probe import script

if __name__ == "__main__":
    script("ssm")
