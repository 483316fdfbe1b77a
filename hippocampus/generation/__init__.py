"""From a trained model to text: sampling, and the facade that users hold."""
