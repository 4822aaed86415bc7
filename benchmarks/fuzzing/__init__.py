"""What ``benchmarks.fuzz`` is made of: spoilers of inputs, the readers that get them, and who watches."""
