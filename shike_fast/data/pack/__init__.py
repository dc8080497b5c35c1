"""Packs: a data set of image files in a few large ones."""
