"""One file a figure: each has `draw`, which returns a matplotlib figure. Those of the curves take the runs."""
