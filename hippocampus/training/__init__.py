"""The trainer: loss, optimizer, sharded step, loop, and what it writes."""
