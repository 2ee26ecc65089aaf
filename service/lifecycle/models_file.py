"""Several models in one process: the file that `PSIM_MODELS` names. An unknown key is an error."""

import tomllib
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from models.errors import PsimError
from service.settings import ModelSettings, Settings


class ModelsError(PsimError):
    """The file cannot be read as a list of models; the message never holds a value of it."""


class ModelEntry(ModelSettings):
    """A model; what it does not say is as the settings say for all."""

    name: str = Field(min_length=1)
    """How requests name it."""
    bundle: Path
    """Relative paths start at the folder of the file."""

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
    """Return the settings of every model, the default one first: a single one without a file.

    Raises:
        ModelsError: the file cannot be read, or does not hold models.
    """
    if settings.models is None:
        return [settings]
    try:
        content = tomllib.loads(settings.models.read_text(encoding="utf-8"))
        entries = ModelsFile.model_validate(content).models
    except ValidationError as error:
        raise ModelsError(f"{settings.models}: {_describe(error)}") from None
    except (OSError, ValueError) as error:
        # What tomllib says has a place, and at most one character of what is there.
        said = error.strerror if isinstance(error, OSError) else error
        raise ModelsError(f"{settings.models}: {said}") from None
    return [entry.settings(settings, settings.models.parent) for entry in entries]


def _describe(error: ValidationError) -> str:
    """Say what is wrong and where, with the keys but without the values, which may be secret."""
    found = error.errors(include_input=False, include_url=False, include_context=False)
    return "; ".join(
        f"{'.'.join(map(str, one['loc'])) or 'the file'}: {_says(one['type'], one['msg'])}"
        for one in found
    )


def _says(kind: str, message: str) -> str:
    return "there is no such key" if kind == "extra_forbidden" else message
