"""Thin jobs: each builds a Ray pipeline out of library functions. The one place that imports Ray."""
