"""Training: windows of sequences to batches, the epoch loop, and its distribution by Ray Train (`trainer` alone)."""
