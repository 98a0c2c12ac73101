"""Losses: pure functions on tensors, one file per method."""
