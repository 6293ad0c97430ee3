"""What a run reports: records, curves, throughput, stalls and profiles."""
