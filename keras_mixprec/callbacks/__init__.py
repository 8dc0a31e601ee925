"""Callbacks: they observe a run, and read it once per epoch."""
