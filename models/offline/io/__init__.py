"""Reading and writing texts, classifiers and whole folders."""
