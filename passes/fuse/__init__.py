"""What a backend runs as one becomes one (docs/fusion.md), and what makes that possible."""
