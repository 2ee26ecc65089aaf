"""Errors that a user can act on; every message says what is wrong and what to do."""


class PsimError(Exception):
    """Base of all errors whose message is shown to the user without a traceback."""


class BundleError(PsimError):
    """A bundle that is incomplete, altered, or cannot be used as requested."""


class VictimError(PsimError):
    """A victim that cannot be loaded safely, or cannot be guarded."""


class EngineError(PsimError):
    """An engine that is not installed, or cannot run this victim."""


class ScreenError(PsimError):
    """Readings that are NaN or infinite; such a text must never count as clean."""


class DataError(PsimError):
    """Input texts or labels that cannot be used as they are."""


class CalibrationError(PsimError):
    """A false-rejection budget that the clean texts at hand cannot support."""
