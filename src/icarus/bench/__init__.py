"""Measurements: each side beside its peer in one run, the sides alternating, medians reported."""
