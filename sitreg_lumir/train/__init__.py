"""Training: LightningModules, callbacks, and the run folder."""
