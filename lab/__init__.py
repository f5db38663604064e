"""What measures, chooses and draws: used by bench.py, train_exits.py and show/, knows none."""
