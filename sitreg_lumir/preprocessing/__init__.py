"""Scans before registration: alignment to the template, intensity normalisation, skull check, raw heads."""
