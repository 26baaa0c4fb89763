"""Maps between worlds in mm, the grids they live on, and images resampled by them."""
