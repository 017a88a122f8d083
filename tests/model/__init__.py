"""DESIGN's rules of time as a plain model, and the real SQL under a test clock held against it."""
