"""Shows what gated adapters on a frozen decoder do: controls, layers, gates, slots, health.

    python probes/adapter_monitors.py --checkpoint=RUN --lora=RUN
"""

from hippocampus.probe import script

if __name__ == "__main__":
    script("buu")
