"""The input pipeline: from bytes on disk to a global batch on the devices, and its augmentation on the devices."""
