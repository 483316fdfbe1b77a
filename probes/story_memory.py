"""Shows what a memory alone knows of a story that another process has read.

    python probes/story_memory.py --checkpoint=RUN --stories=PATH
"""

from hippocampus.probe import script

if __name__ == "__main__":
    script("memory")
