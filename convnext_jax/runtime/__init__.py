"""Processes, signals, process settings and accelerators. Nothing here depends on models."""
