"""Parameters, FLOPs, latency and memory of a trained model."""
