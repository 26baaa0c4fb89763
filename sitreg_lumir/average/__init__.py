"""An unbiased average brain of many scans: what the verb `template` does."""
