"""Checkpoint families behind one small protocol: an AV turns vectors into draws, an AR turns texts into vectors."""
