"""Errors that a user can act on; every message names what was wrong and what to do."""


class PsimError(Exception):
    """Base of all errors whose message is meant for the user, without a traceback."""


class BundleError(PsimError):
    """A bundle that is incomplete, altered, or not fit for what was asked of it."""


class VictimError(PsimError):
    """A victim model that cannot be loaded safely or cannot be guarded."""


class EngineError(PsimError):
    """An engine that is not installed, or cannot run this victim."""


class ScreenError(PsimError):
    """Screening gave no usable probabilities (NaN, infinite): never to be read as clean."""


class DataError(PsimError):
    """Input texts or labels that cannot be used as they are."""


class CalibrationError(PsimError):
    """A false-rejection budget that the clean texts at hand cannot support."""
