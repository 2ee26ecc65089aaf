"""Measures of an attack, with and without the screen."""
