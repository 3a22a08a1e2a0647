"""Parts of `train_demo_pair.py`: where the text comes from, and the pair itself."""
