"""Protocol, metrics, baselines and their report."""
