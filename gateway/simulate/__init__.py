"""A policy run over a table of what each model did on each query: accuracy and cost beside every baseline, offline."""
