"""What a training step needs on a machine that is not there: memory, traffic and a time bound."""
