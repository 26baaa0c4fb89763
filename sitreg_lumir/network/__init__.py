"""The network: MIND, encoder, stages, weights."""
