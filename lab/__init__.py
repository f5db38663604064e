"""What measures, chooses and draws: used by bench.py and train_exits.py, and knows neither."""
