"""Plain torch: every operation on deformations as readable text; the other backends are tested against."""
