"""The file that `PSIM_MODELS` names, with several models for one process."""

import tomllib
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.errors import PsimError
from service.settings import ModelSettings, Settings


class ModelsError(PsimError):
    """The file is not a valid list of models; the message never quotes a value."""


class ModelEntry(ModelSettings):
    """A model; keys that are left out take the value of the settings for all models."""

    name: str = Field(min_length=1)
    """Name of the model in requests."""
    bundle: Path
    """Relative to the folder of the file."""

    def settings(self, common: Settings, folder: Path) -> Settings:
        """Return the settings of this model."""
        own = {name: getattr(self, name) for name in self.model_fields_set - {"name"}}
        if self.upstream is not None:
            # The secret of one upstream must not reach another.
            own.setdefault("upstream_authorization", None)
        own |= {"model": self.name, "bundle": folder / self.bundle, "models": None}
        if self.challenger is not None:
            own["challenger"] = folder / self.challenger
        return common.model_copy(update=own)


class ModelsFile(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: Annotated[list[ModelEntry], Field(min_length=1)]

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [entry.name for entry in self.models]
        if len(set(names)) < len(names):
            raise ValueError("two models have the same name")
        return self


def settings_by_model(settings: Settings) -> list[Settings]:
    """Return the settings of every model, the default first; without a file, there is one.

    Raises:
        ModelsError: the file cannot be read, or is not a valid list of models.
    """
    if settings.models is None:
        return [settings]
    try:
        content = tomllib.loads(settings.models.read_text(encoding="utf-8"))
        entries = ModelsFile.model_validate(content).models
    except ValidationError as error:
        raise ModelsError(f"{settings.models}: {_describe(error)}") from None
    except (OSError, ValueError) as error:
        # A message of tomllib has a position, and at most one character of the file.
        detail = error.strerror if isinstance(error, OSError) else error
        raise ModelsError(f"{settings.models}: {detail}") from None
    return [entry.settings(settings, settings.models.parent) for entry in entries]


def _describe(error: ValidationError) -> str:
    """Describe the errors with their keys, without values, which may be secret."""
    errors = error.errors(include_input=False, include_url=False, include_context=False)
    return "; ".join(
        f"{'.'.join(map(str, e['loc'])) or 'the file'}: {_message(e['type'], e['msg'])}"
        for e in errors
    )


def _message(kind: str, message: str) -> str:
    return "there is no such key" if kind == "extra_forbidden" else message
