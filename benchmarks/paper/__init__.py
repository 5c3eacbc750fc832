"""The tables of the paper: their cells, their rows and the figures published there."""
