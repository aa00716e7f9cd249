"""What a user starts: the command line, engines, comparisons, sweeps, searches, reports and benchmarks."""
