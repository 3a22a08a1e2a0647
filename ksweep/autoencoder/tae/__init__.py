"""Talkative-autoencoder checkpoints: one .pt file with a decoder (AV) and an encoder (AR)."""
