"""Reading texts and classifiers; writing folders as a whole."""
