"""The page of a benchmark: bundles on attacks and on honest traffic, over several base models."""
