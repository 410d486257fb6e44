"""The training loop and its parts: adapters, attention, loss, optimizer, checkpoints, events."""
