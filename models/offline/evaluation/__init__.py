"""What an attack does with and without the screen."""
