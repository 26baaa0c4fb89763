"""What training minimises (losses) and what the challenge counts (metrics)."""
