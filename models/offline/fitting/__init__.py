"""From a classifier and clean texts to a bundle."""
