"""Speed and memory beside the other libraries that have these models."""
