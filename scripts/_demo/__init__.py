"""Parts of `train_demo_pair.py`: the text and the pair."""
