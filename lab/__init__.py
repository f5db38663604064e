"""Measuring, tuning, drawing, and training beyond the two recipes of train_exits.py."""
