"""Probes of frozen features: how well simple classifiers on them recognise classes. This package sees arrays only."""
