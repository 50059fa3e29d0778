"""Compiles training steps for TPU slices without a TPU."""
