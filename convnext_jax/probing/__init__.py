"""Simple classifiers on frozen features, and the computation of these features. No data sets and no configs."""
