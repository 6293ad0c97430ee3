"""Bytes on disk → one global batch on the devices, and its augmentation there; knows no models."""
