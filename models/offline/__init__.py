"""The offline half, pip extra `offline`: from a victim and clean texts to a calibrated bundle."""
