"""What runs in the benchmark's processes, one of them for each contender."""
